"""Every example runs, at short settings."""

import os
import re
import sys
import time
from pathlib import Path

import pytest
from launching import kill, start

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(command, log, timeout=150):
    """What the command says; it and all it started are killed at the time limit."""
    process = start(command, os.environ, log)
    deadline = time.monotonic() + timeout
    try:
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        killed = kill(process)
    said = log.read_text()
    assert not killed, f"no end within {timeout} s: {said}"
    assert process.returncode == 0, said
    return said


def test_your_own_loop_learns_and_saves_backward_rows(tmp_path):
    example = EXAMPLES / "01_your_own_loop.py"
    said = run([sys.executable, "-W", "error", example, "--iterations", 10, "--episodes", 8], tmp_path / "log")
    kept, total = map(int, re.search(r"(\d+) of (\d+) rows", said).groups())
    assert 0 < kept < 0.6 * total  # the budget finds its own rate


@pytest.mark.slow
def test_many_processes_go_on_with_another_number_of_them(tmp_path):
    example, checkpoint = EXAMPLES / "03_many_processes.py", tmp_path / "checkpoint"

    def iterations(processes, until, *flags):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
        command = [*torchrun, example, "--iterations", until, "--checkpoint", checkpoint, *flags]
        said = run(command, tmp_path / f"{until}.log")
        found = re.findall(r"iteration (\d+), (\d) processes: (\d+)% right, kept 26 of 256 rows", said)
        return [tuple(map(int, line)) for line in found]

    ddp, fsdp = iterations(2, 100), iterations(1, 150, "--fsdp")
    again = iterations(2, 200, "--fsdp")
    assert [(step, count) for step, count, _ in ddp + fsdp + again] == [(50, 2), (100, 2), (150, 1), (200, 2)]
    right = [share for _, _, share in ddp + fsdp + again]
    assert right[0] < right[1] - 10
    assert min(right[2:]) > right[0] + 10  # it went on, and did not begin anew
