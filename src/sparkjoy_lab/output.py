"""Standard output and error that may be closed, full or ASCII only, without the work ending for it."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
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
            said = f"sparkjoy: nobody takes the output any more ({error.strerror}); the work goes on"
            print(said, file=sys.stderr)  # which may be this very stream


@contextmanager
def warnings_in_a_line() -> Iterator[None]:
    """Have a warning of ours be a line without its place in the code, and one that many runs give be said once."""
    package, default = str(Path(__file__).parent.parent), warnings.showwarning
    said: set[tuple[str, int]] = set()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if not filename.startswith(package):
            default(message, category, filename, lineno, file, line)
        elif (filename, lineno) not in said:
            said.add((filename, lineno))
            print(f"sparkjoy: {message}", file=sys.stderr)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = default


@contextmanager
def lasting_output() -> Iterator[None]:
    """Have sys.stdout and sys.stderr outlast their readers, and replace what their encodings lack."""
    before = sys.stdout, sys.stderr
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if None not in before:  # closed before Python began
        sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                with contextlib.suppress(ValueError):  # closed
                    stream.flush()
        sys.stdout, sys.stderr = before
