"""Ctrl-C while the `sparkjoy` command is still importing: one line, not a traceback. Imports take seconds.

Nothing is done where sparkjoy is imported as a library.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType


def quiet_if_command() -> None:
    """Where this process is the command, let SIGINT end it at once, until it is `ready`."""
    module = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]  # python's own flags, where it is -m sparkjoy
    is_command = Path(sys.argv[0]).stem == "sparkjoy" or module[-2:] == ["-m", "sparkjoy"]
    if is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def ready() -> None:
    """From now on SIGINT raises KeyboardInterrupt, as ever."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"sparkjoy: interrupted before anything was begun\n")
    os._exit(130)
