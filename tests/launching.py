"""Start a few processes that belong together, and never leave one behind."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1  # Linux


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
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        }
        processes.append(start([sys.executable, script, *arguments], environment, path))
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


def start(command, environment, log: Path) -> subprocess.Popen:
    """A process in a session of its own, writing to `log`; it is told to end if this one dies."""
    with log.open("a") as out:
        return subprocess.Popen(
            list(map(str, command)),
            env={**environment, "OMP_NUM_THREADS": "1"},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
        )


def leave() -> None:
    """End a worker that has said all: torch's own threads now and then abort an interpreter that is shutting down."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def kill(process: subprocess.Popen) -> bool:
    """End a process and all it started; whether it still ran."""
    running = process.poll() is None
    if running:
        # torchrun gives each of its workers a session of its own.
        for pid in [*descendants(process.pid), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return running


def descendants(pid: int) -> list[int]:
    """Children and children's children."""
    listed = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = dict(map(int, line.split()) for line in listed.splitlines())
    found, generation = [], {pid}
    while generation:
        generation = {child for child, parent in parents.items() if parent in generation}
        found += generation
    return found
