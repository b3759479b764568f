"""Log-probs to decide on, without a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

LogProbFunction = Callable[[Any], Tensor]
"""`rows -> log-probs` of the actions taken in them: (n,) or (n, T)."""


@contextmanager
def screening(device: torch.device) -> Iterator[None]:
    """No graph inside, and the training stream's random state is left alone.

    >>> with screening(torch.device("cpu")):
    ...     (torch.ones(2, requires_grad=True) * torch.rand(2)).requires_grad
    False
    """
    devices = [] if device.type == "cpu" else [device]
    device_type = "cuda" if device.type == "cpu" else device.type
    with torch.no_grad(), torch.random.fork_rng(devices, device_type=device_type):
        yield
