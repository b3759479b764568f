"""Start a few processes that belong together, and never leave one behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def run_processes(script: Path, count: int, arguments=(), *, store: Path, timeout: float = 120) -> list[str]:
    """What each of `count` processes printed; any failure or a time-out kills all of them and fails the test.

    They find each other through the file `store`, so no port is taken.
    """
    paths = [store.with_name(f"{store.name}-{rank}.out") for rank in range(count)]
    processes = []
    for rank, path in enumerate(paths):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": str(count),
            "STORE": str(store),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        }
        command = [sys.executable, str(script), *map(str, arguments)]
        with path.open("w") as out:
            processes.append(
                subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
            )
    deadline = time.monotonic() + timeout
    try:
        while any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes) or time.monotonic() > deadline:
                break
            time.sleep(0.02)
    finally:
        killed = [kill(process) for process in processes]
    said = [path.read_text() for path in paths]
    for rank, process in enumerate(processes):
        if process.returncode and not killed[rank]:
            raise AssertionError(f"process {rank} failed with status {process.returncode}:\n{said[rank]}")
    if any(killed):
        raise AssertionError(f"processes did not end within {timeout:g} s:\n" + "\n".join(said))
    return said


def kill(process: subprocess.Popen) -> bool:
    """End a process and all it started; whether it still ran."""
    running = process.poll() is None
    if running:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return running
