"""The `sparkjoy` command while it is still importing, which takes seconds: one line for Ctrl-C and for what fails.

Nothing is done where sparkjoy is imported as a library.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType, TracebackType


def quiet_if_command() -> None:
    """Where this process is the command, let SIGINT, and an error of the system's, end it in one line until `ready`."""
    module = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]  # python's own flags, where it is -m sparkjoy
    if Path(sys.argv[0]).stem != "sparkjoy" and module[-2:] != ["-m", "sparkjoy"]:
        return
    sys.excepthook = _say
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def ready() -> None:
    """From now on SIGINT raises KeyboardInterrupt, and errors are shown, as ever."""
    if sys.excepthook is _say:
        sys.excepthook = sys.__excepthook__
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"sparkjoy: interrupted before anything was begun\n")
    os._exit(130)


def _say(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not isinstance(error, OSError | ImportError):
        sys.__excepthook__(kind, error, trace)
        return
    own = isinstance(error, ModuleNotFoundError) and str(error.name).partition(".")[0] == "sparkjoy"
    way_out = "; the command is of another version: install it anew, pip install -e '.[cli]'" if own else ""
    os.write(2, f"sparkjoy: {' '.join(str(error).split())}{way_out}\n".encode(errors="replace"))
    os._exit(2)
