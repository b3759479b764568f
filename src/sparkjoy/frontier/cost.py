"""What a step takes: its seconds, and its peak bytes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor


class SavedBytes:
    """Counts what autograd keeps for the backward pass, at most at a time: the same number on every run.

    Neither gradients nor what an operation needs only while it runs are in it, nor what a checkpoint computes anew.

    >>> weight = torch.ones(4, requires_grad=True)
    >>> with SavedBytes([weight]) as counted:
    ...     (weight.exp().exp()).sum().backward()
    >>> counted.peak  # the results of both, 4 numbers of 4 bytes each
    32

    Args:
        there_anyway: tensors that are not counted, such as parameters.
    """

    def __init__(self, there_anyway: Iterable[Tensor]) -> None:
        self.peak = 0
        self._held = 0
        self._uses: Counter[int] = Counter()
        strided = (tensor for tensor in there_anyway if tensor.layout == torch.strided)
        self._there_anyway = {tensor.untyped_storage().data_ptr() for tensor in strided}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda saved: saved.tensor)

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)

    def _pack(self, tensor: Tensor) -> _Saved:
        if tensor.layout != torch.strided:
            return _Saved(tensor, lambda: None)
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place in self._there_anyway:
            return _Saved(tensor, lambda: None)
        if not self._uses[place]:
            self._held += size
            self.peak = max(self.peak, self._held)
        self._uses[place] += 1

        def release() -> None:
            self._uses[place] -= 1
            if not self._uses[place]:
                self._held -= size

        return _Saved(tensor, release)


class _Saved:
    """A tensor kept for the backward pass, which says when it is let go."""

    def __init__(self, tensor: Tensor, release: Callable[[], None]) -> None:
        self.tensor = tensor
        self._release = release

    def __del__(self) -> None:
        self._release()


def timed(step: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds of a step until the device is done with it, and what it returned."""
    wait(device)
    start = time.perf_counter()
    result = step()
    wait(device)
    return time.perf_counter() - start, result


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def with_peak(step: Callable[[], Any], device: torch.device, there_anyway: Iterable[Tensor]) -> tuple[Any, int]:
    """What a step returned, and its peak bytes above what was there before: see `PEAK_BYTES`."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = step()
        return result, torch.cuda.max_memory_allocated(device) - before
    with SavedBytes(there_anyway) as saved:
        result = step()
    return result, saved.peak


PEAK_BYTES = {
    True: "peak of what torch allocated on the GPU, above weights and gradients",
    False: "at most kept at a time for the backward pass, above weights and gradients",
}
"""What `with_peak` counts, by whether it is on a GPU."""
