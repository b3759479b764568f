"""How much memory there is, so that what cannot fit is refused before it is tried."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

if sys.platform != "win32":
    import resource

FLOAT = 4
TRAINED = 4 * FLOAT
"""Bytes a parameter takes in training: itself, its gradient and Adam's two moments."""


def machine_memory() -> int | None:
    """Bytes that this process can have at most; None where the system does not say."""
    known = []
    with contextlib.suppress(ValueError, OSError, AttributeError):
        known.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(ValueError, OSError):  # of a container
        known.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(known, default=None)


def check_memory(needed: int, flags: str) -> None:
    """Raise a ValueError where the least that `flags` ask for is more than the machine has.

    Args:
        needed: bytes, at the very least.
        flags: what asks for them, as the user wrote it.
    """
    there = machine_memory()
    if there is not None and needed > there:
        raise ValueError(
            f"{flags}: takes {needed // 10**9:,} GB of memory or more; this machine has {there // 10**9:,} GB."
        )


@contextmanager
def within_machine_memory() -> Iterator[None]:
    """Have what does not fit fail with an error, rather than the system end the process."""
    there = machine_memory()
    if sys.platform != "linux" or there is None or torch.cuda.is_available():  # CUDA's own mappings are no measure
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    soft = min([there, *(limit for limit in before if limit != resource.RLIM_INFINITY)])
    resource.setrlimit(resource.RLIMIT_DATA, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
