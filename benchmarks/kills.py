"""Kill `sparkjoy train` at random moments, go on, and compare with the run that was never killed, to the bit.

    python benchmarks/kills.py --kills 100 --out out/kills.json

Each time: a fresh run, a SIGKILL or a SIGTERM at a random moment of it, the same command again until its end. It counts
as a failure unless the signal ended the process as it should, the same command ended well, and records (but for
seconds), weights and the optimizer's state are those of the unbroken run. Checkpoints are written at each of the many
evaluations, so that kills fall into the writing as well.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from sparkjoy_lab import cli
from sparkjoy_lab.bench.timing import options
from sparkjoy_lab.training import loop
from sparkjoy_lab.training.checkpoint import load_checkpoint
from sparkjoy_lab.training.tracking import write_json

TASKS = {
    "reversal": "reversal --method kondo --rate 0.1 --prompt-length 3 --width 16 --heads 2 --layers 1 --feed-forward 16"
    " --held-out 20 --steps 60 --evaluate-every 2",
    "mnist": "mnist --method kondo --rate 0.03 --steps 300 --evaluate-every 10",
}
STATUS = {signal.SIGKILL: (-signal.SIGKILL,), signal.SIGTERM: (-signal.SIGTERM, 128 + signal.SIGTERM)}
"""Exit statuses after a signal; SIGTERM ends a process as ever where it comes before training does."""
LONGEST_SECONDS = 300.0


def start(arguments: Sequence[str], out: Path) -> BaseProcess:
    """`sparkjoy train ... --out OUT` in a process that need not import torch again."""
    process = multiprocessing.get_context("fork").Process(target=_command, args=(arguments, out))
    process.start()
    return process


def _command(arguments: Sequence[str], out: Path) -> None:
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    loop.CHECKPOINT_SECONDS = 0.0
    sys.argv = ["sparkjoy", "train", *arguments, "--out", str(out)]
    cli.main()


def finish(process: BaseProcess) -> int | None:
    """The exit status; negative for a signal, None after `LONGEST_SECONDS`, when it is killed."""
    process.join(LONGEST_SECONDS)
    status = process.exitcode
    if status is None:
        process.kill()
        process.join()
    return status


def records(out: Path) -> int:
    """How many a run has written so far."""
    path = out / "records.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def result(out: Path) -> dict[str, Any]:
    """What must be equal: the records and the checkpoint."""
    rows = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    return {"records": rows, "checkpoint": load_checkpoint(out / "checkpoint.pt")}


def differences(given: Any, expected: Any, name: str = "result") -> list[str]:
    """Where two results differ, to the bit; seconds apart."""
    if name.endswith("seconds"):
        return []
    if isinstance(expected, torch.Tensor):
        return [] if torch.equal(given, expected) else [name]
    if isinstance(expected, dict) and given.keys() == expected.keys():
        return [line for key in expected for line in differences(given[key], expected[key], f"{name}.{key}")]
    if isinstance(expected, list | tuple) and len(given) == len(expected):
        pairs = enumerate(zip(given, expected, strict=True))
        return [line for number, pair in pairs for line in differences(*pair, f"{name}.{number}")]
    return [] if repr(given) == repr(expected) else [name]


def killed(arguments: Sequence[str], out: Path, wanted: int, pause: float, number: signal.Signals) -> int | None:
    """Run until there are `wanted` records and `pause` seconds more, then send the signal; the exit status."""
    process = start(arguments, out)
    deadline = time.monotonic() + LONGEST_SECONDS
    while process.is_alive() and records(out) < wanted and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(pause)
    if process.is_alive() and process.pid is not None:
        os.kill(process.pid, number)
    return finish(process)


def check(arguments: Sequence[str], kills: int, folder: Path, seed: int = 0) -> tuple[Counter[str], list[str]]:
    """Kill as many runs, each once, go on with each and compare: kills by signal, and a line for each failure."""
    began = time.monotonic()
    if finish(start(arguments, folder / "whole")) != 0:
        raise ValueError(f"sparkjoy train {' '.join(arguments)} fails without being killed.")
    expected = result(folder / "whole")
    between = (time.monotonic() - began) / len(expected["records"])  # seconds from one record to the next
    chance, done, failures = random.Random(seed), Counter[str](), list[str]()
    while done.total() < kills:
        number = chance.choice([signal.SIGKILL, signal.SIGTERM])
        wanted, pause = chance.randrange(len(expected["records"])), between * chance.random()
        with tempfile.TemporaryDirectory(dir=folder) as name:
            status = killed(arguments, Path(name), wanted, pause, number)
            if status == 0:  # it was at its end before: no kill
                continue
            done[number.name] += 1
            wrong = [] if status in STATUS[number] else [f"status {status} when killed"]
            if (status := finish(start(arguments, Path(name)))) != 0:
                wrong.append(f"status {status} when run again")
            else:
                wrong += differences(result(Path(name)), expected)
        if wrong:
            failures.append(f"{number.name} after {wanted} records and {pause:.3f} s: {', '.join(wrong)}")
    return done, failures


def main() -> None:
    """Kill, print and write."""
    parser = options(__doc__, out="out/kills.json")
    parser.add_argument("--kills", type=int, default=100, help="shared by the tasks")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for task in given.tasks:
        with tempfile.TemporaryDirectory() as folder:
            done, failures = check(TASKS[task].split(), given.kills // len(given.tasks), Path(folder), given.seed)
        results[task] = {"kills": done, "failures": failures}
        print(
            f"{task}: {len(failures)} failures in {done.total()} kills ({dict(done)})", *failures, sep="\n", flush=True
        )
    write_json(given.out, {"seed": given.seed, "tasks": results})
    raise SystemExit(any(task["failures"] for task in results.values()))


if __name__ == "__main__":
    main()
