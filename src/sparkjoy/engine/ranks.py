"""What a step asks of the processes it runs in, and the answers of a process that is alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from sparkjoy.engine.inputs import Inputs
from sparkjoy.engine.survivors import Rows


class Ranks(Protocol):
    """The processes (ranks) of a step: what they have to do together."""

    size: int
    """How many there are."""

    def open(self, check: Callable[[], Inputs]) -> Inputs:
        """This rank's inputs, if `check` finds them sound on every rank."""
        ...

    def evened(self, parts: Sequence[Rows]) -> Sequence[Rows | None]:
        """This rank's micro-batches, with fillers (None) up to the number of the rank with most."""
        ...

    def screening(self) -> AbstractContextManager[None]:
        """Around forward passes without a graph."""
        ...

    def forward(self, work: Callable[[], Tensor]) -> Tensor:
        """Do a differentiable forward pass."""
        ...

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Around a forward and a backward pass."""
        ...

    def sum(self, count: int) -> int:
        """The sum of the ranks' counts."""
        ...

    def hold(self, check: Callable[[], None]) -> None:
        """Run a check whose failure may be this rank's alone."""
        ...

    def close(self, loss: Tensor) -> Tensor:
        """The loss of all ranks, when all micro-batches are done."""
        ...


class OneProcess:
    """A step of this process alone.

    Args:
        among_others: whether other processes may exist.
    """

    size = 1

    def __init__(self, among_others: bool = False) -> None:
        self._among_others = among_others

    def open(self, check: Callable[[], Inputs]) -> Inputs:
        if not self._among_others and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError(
                f"there are {dist.get_world_size()} processes, but no module was given: each would decide by itself, "
                "and one without survivors would leave the others waiting. Give GatedBackward(module=...) the "
                'DistributedDataParallel or fully_shard module, or module="local" where the processes train apart.'
            )
        return check()

    def evened(self, parts: Sequence[Rows]) -> Sequence[Rows]:
        return parts

    def screening(self) -> AbstractContextManager[None]:
        return nullcontext()

    def forward(self, work: Callable[[], Tensor]) -> Tensor:
        return work()

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def sum(self, count: int) -> int:
        return count

    def hold(self, check: Callable[[], None]) -> None:
        check()

    def close(self, loss: Tensor) -> Tensor:
        return loss
