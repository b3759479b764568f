"""SIGINT and SIGTERM while a run goes on: it ends after the step it is at, with a checkpoint of it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


class Terminated(SystemExit):
    """SIGTERM came."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


class Stopping:
    """Notes the first signal, for the work to end when it is ready to; a second one ends it where it is.

    Args:
        enabled: False leaves the signals as they are.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled and threading.current_thread() is threading.main_thread()
        self.asked: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopping:
        for number in (signal.SIGINT, signal.SIGTERM) if self.enabled else ():
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._noted)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def end_if_asked(self) -> None:
        """Raise what the signal would have raised."""
        if self.asked is not None:
            end(self.asked)

    def _noted(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None:
            end(number)
        self.asked = number


def end(number: int, frame: FrameType | None = None) -> None:
    """Raise KeyboardInterrupt for SIGINT, Terminated for SIGTERM: a signal handler."""
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """Have SIGTERM unwind the program as Ctrl-C does, unless it is ignored or somebody's own."""
    mine = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if mine:
        signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if mine:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def leaving_on_sigint() -> Iterator[None]:
    """While the command imports, which takes seconds, SIGINT ends it in one line."""
    takes = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if takes:
        signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        if takes:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"sparkjoy: interrupted before anything was begun\n")
    os._exit(130)
