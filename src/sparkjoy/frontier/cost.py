"""What a step takes: seconds, and peak bytes above weights and gradients."""

from __future__ import annotations

import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

PEAK_IS = {
    True: "peak of what torch allocated on the GPU, above weights and gradients",
    False: "at most kept at a time for the backward pass, above weights and gradients",
}
"""What `with_peak` counts, by whether it is on a GPU."""


def timed(step: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds of a step until the device is done with it, and what it returned."""
    synchronize(device)
    start = time.perf_counter()
    result = step()
    synchronize(device)
    return time.perf_counter() - start, result


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def with_peak(step: Callable[[], Any], device: torch.device, there_anyway: Iterable[Tensor]) -> tuple[Any, int]:
    """What a step returned, and its peak bytes: see `PEAK_IS`."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = step()
        return result, torch.cuda.max_memory_allocated(device) - before
    saved = SavedBytes(there_anyway)
    with saved:
        result = step()
    return result, saved.peak


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the most that autograd keeps at a time for the backward pass: the same number on every run.

    It counts neither gradients, nor what an operation needs only while it runs, nor what a checkpoint computes anew.

    >>> weight = torch.ones(4, requires_grad=True)
    >>> counted = SavedBytes([weight])
    >>> with counted:
    ...     (weight.exp().exp()).sum().backward()
    >>> counted.peak  # the results of both, 4 numbers of 4 bytes each
    32

    Args:
        there_anyway: tensors that are not counted, such as parameters.
    """

    def __init__(self, there_anyway: Iterable[Tensor]) -> None:
        super().__init__(self._pack, lambda kept: kept())
        self.peak = self._held = 0
        self._uses: Counter[int] = Counter()  # by storage
        strided = (tensor for tensor in there_anyway if tensor.layout == torch.strided)
        self._there_anyway = {tensor.untyped_storage().data_ptr() for tensor in strided}

    def _pack(self, tensor: Tensor) -> Callable[[], Tensor]:
        def kept() -> Tensor:
            return tensor

        storage = tensor.untyped_storage() if tensor.layout == torch.strided else None
        if storage is not None and storage.data_ptr() not in self._there_anyway:
            place, size = storage.data_ptr(), storage.nbytes()
            self._count(place, size, 1)
            weakref.finalize(kept, self._count, place, size, -1)
        return kept

    def _count(self, place: int, size: int, change: int) -> None:
        """Change how often a storage is kept; its bytes count once, while it is kept at all."""
        before, now = self._uses[place], self._uses[place] + change
        self._uses[place] = now
        self._held += size * ((now > 0) - (before > 0))
        self.peak = max(self.peak, self._held)
