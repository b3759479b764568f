"""Peak memory of one step, each measured in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Step = Callable[[], object]

# glibc returns a freed block of this size to the system at once, so that what is resident is what is in use.
# The profiler would say on the terminal that it starts and stops.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "KINETO_LOG_LEVEL": "10"}


@dataclass(frozen=True)
class PeakMemory:
    """Bytes of one step above what was there before it.

    Args:
        resident: of the process, as the system counts; None where that cannot be read (elsewhere than on Linux).
        tensors: of tensors, as torch's CPU allocator counts; repeats to the byte. None where not asked for.
        before: resident before the step; None likewise.
    """

    resident: int | None
    tensors: int | None
    before: int | None


def peak_memory(prepare: Callable[..., Step], *arguments: Any, threads: int = 1, tensors: bool = True) -> PeakMemory:
    """Peak memory of `prepare(*arguments)()` above what is there already, in a fresh process.

    The step runs once before: weights, gradients and optimizer state that it leaves behind do not count, if it keeps
    them (`zero_grad(set_to_none=False)`).

    Args:
        prepare: a function of a module's top level, `(*arguments) -> step`; the process imports it by its name.
        arguments: what it takes; they must pickle.
        threads: of torch.
        tensors: count those too, which takes another step, under the profiler: slow where a step has many operations.

    Returns:
        A `PeakMemory`.

    Raises:
        ValueError: the process ended before it had measured.
        Exception: what `prepare` or the step raises.
    """
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)  # read when a process starts
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            return fresh.submit(_measure, prepare, arguments, threads, tensors).result()
    except BrokenProcessPool:
        raise ValueError("the process that measures memory was ended from outside, as where memory runs out.") from None
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _measure(prepare: Callable[..., Step], arguments: tuple[Any, ...], threads: int, tensors: bool) -> PeakMemory:
    torch.set_num_threads(threads)
    step = prepare(*arguments)
    step()
    gc.collect()
    before = resident = None
    status = Path("/proc/self/status")
    if status.exists():
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
        before = _kilobytes(status, "VmRSS")
        step()
        resident = _kilobytes(status, "VmHWM") - before
    return PeakMemory(resident, _tensor_peak(step) if tensors else None, before)


def _kilobytes(status: Path, name: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def _tensor_peak(step: Step) -> int:
    """The greatest sum of what the step's tensors take, from the allocator's own events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    recorded = profiler.profiler
    if recorded is None or recorded.kineto_results is None:
        raise RuntimeError("torch.profiler gave no results; its memory events are what is counted.")
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
