"""Standard output that may be closed, full or ASCII only, without the work ending for it."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class Output:
    """A text stream whose reader may leave, as `| head` does: what is said after that goes nowhere.

    Args:
        stream: where to write.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._gone = False

    def write(self, text: str) -> int:
        """Write, or do nothing where nobody reads."""
        self._do(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush, likewise."""
        self._do(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _do(self, action: Callable[[], object]) -> None:
        if self._gone:
            return
        try:
            action()
        except OSError as error:
            self._gone = True
            with contextlib.suppress(OSError, ValueError):  # so that Python's own flush in the end succeeds
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
            print(f"sparkjoy: nobody takes the output any more ({error.strerror}); the work goes on", file=sys.stderr)

    @classmethod
    @contextmanager
    def in_place_of_stdout(cls) -> Iterator[None]:
        """Stand in for sys.stdout, which from now on replaces what its encoding lacks."""
        before = sys.stdout
        if before is None:  # closed before Python began
            yield
            return
        if isinstance(before, io.TextIOWrapper):
            before.reconfigure(errors="replace")
        sys.stdout = cls(before)
        try:
            yield
        finally:
            with contextlib.suppress(ValueError):
                sys.stdout.flush()
            sys.stdout = before
