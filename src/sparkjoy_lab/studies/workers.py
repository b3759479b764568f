"""Runs in several processes at once: `--jobs`. Each trains one run after another, as the study's own process would."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any

from sparkjoy_lab.studies.runs import Run
from sparkjoy_lab.training.loop import OnStep, Record

SAID_EVERY = 0.2
"""Seconds between two messages of how far a run is."""


class StoppedError(Exception):
    """The study ends: a signal came, or another run failed."""


class Workers:
    """Processes that train, to be used by as many threads; as a context they are there inside, and nobody after it.

    Args:
        count: how many.
        out: the study's folder.
    """

    def __init__(self, count: int, out: Path) -> None:
        self.out = out
        self.failure: Exception | None = None
        self._stopped = threading.Event()
        self._idle: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        spawn = multiprocessing.get_context("spawn")
        with _without_interrupts():
            for _ in range(count):
                mine, other = spawn.Pipe()
                process = spawn.Process(target=work, args=(other, out), daemon=True)
                process.start()
                other.close()  # so that its end is the end of the pipe
                self._processes.append(process)
                self._pipes.append(mine)
                self._idle.put(mine)

    def train(self, run: Run, on_step: OnStep) -> list[Record]:
        """The records of a run that the next idle process trains; the first error of any run ends all of them.

        Raises:
            StoppedError: the study ends for another reason.
            Exception: what the run raised.
        """
        pipe = self._idle.get()
        try:
            found: list[Record] | Exception = self._found(pipe, run, on_step)
        except (EOFError, OSError):  # of the pipe
            if self._stopped.is_set():
                raise StoppedError from None
            found = ValueError("a process that trained was ended from outside, as where memory runs out.")
        finally:
            self._idle.put(pipe)
        if isinstance(found, Exception):
            self.failure = self.failure or found
            self.stop()
            raise found
        return found

    def _found(self, pipe: Connection, run: Run, on_step: OnStep) -> list[Record] | Exception:
        if self._stopped.is_set():
            raise StoppedError
        pipe.send(run)
        while isinstance(said := pipe.recv(), tuple):
            if isinstance(said[0], str):
                warnings.showwarning(said[0], UserWarning, *said[1:])
            else:
                on_step(*said)
        found: list[Record] | Exception = said
        return found

    def stop(self) -> None:
        """Have every process end after the step it is at, with a checkpoint of it."""
        if not self._stopped.is_set():
            self._stopped.set()
            for process in self._processes:
                process.terminate()

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is not None:
                self.stop()
            for pipe in self._pipes if kind is None else ():
                pipe.close()
            for process in self._processes:
                process.join()
        finally:  # a second signal, while a long step is waited for
            for process in self._processes:
                process.kill()


def work(pipe: Connection, out: Path) -> None:
    """Train the runs that come through the pipe until it ends, and send what they come to: a process's whole life."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)  # a signal to the whole group is for the first process, which passes it on once
    warnings.showwarning = lambda message, category, *place, **_: pipe.send((str(message), *place[:2]))
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            pipe.send(_outcome(pipe, pipe.recv(), out))


def _outcome(pipe: Connection, run: Run, out: Path) -> Any:
    """The run's records, or its error; on the way, how far it is: which fails, and ends it, where nobody listens."""
    said_at = -1.0

    def on_step(step: int, record: Record | None) -> None:
        nonlocal said_at
        if time.monotonic() - said_at > SAID_EVERY:
            said_at = time.monotonic()
            pipe.send((step, record))

    try:
        records = run.train(out, on_step)
        if said_at >= 0:
            pipe.send((records[-1]["step"], records[-1]))
        return records
    except Exception as error:
        error.add_note(traceback.format_exc())
        return error


def available_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Have processes start with SIGINT blocked for good: Ctrl-C goes to all that a terminal runs."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
