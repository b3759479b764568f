"""What a step asks of the processes it runs in, and the answers of a process that is alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, TypeAlias

import torch.distributed as dist
from torch import Tensor

from sparkjoy import checks
from sparkjoy.gates import Decision
from sparkjoy.step.counts import Counting
from sparkjoy.step.inputs import Inputs

if TYPE_CHECKING:
    from sparkjoy.processes.distributed import SeveralProcesses


class OneProcess:
    """A step of this process alone, and what it asks of processes: what is not said to be local is the same on all.

    Args:
        among_others: whether other processes may exist.
    """

    size = 1
    """How many there are."""

    def __init__(self, among_others: bool = False) -> None:
        self._among_others = among_others

    @contextmanager
    def together(self, counting: Counting) -> Iterator[None]:
        """Around a step: what one process raises, all raise, and say whether the step had added to `.grad`."""
        if not self._among_others and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError(
                f"there are {dist.get_world_size()} processes, but no module was given: each would decide by itself, "
                "and one without survivors would leave the others waiting. Give GatedBackward(module=...) the "
                'DistributedDataParallel or fully_shard module, or module="local" where the processes train apart.'
            )
        try:
            yield
        except BaseException as error:
            say_of_grad(error, counting)
            raise

    def open(self, inputs: Inputs, options: Callable[[], str]) -> None:
        """Begin with the local inputs, if those of all go together; `options` have to be alike everywhere."""

    def total(self, rows: int) -> int:
        """Rows of all ranks, `rows` of them local."""
        return rows

    def screening(self) -> AbstractContextManager[None]:
        """Around forward passes without a graph."""
        return nullcontext()

    def most(self, count: int) -> int:
        """The largest of the ranks' counts."""
        return count

    def sum(self, count: int) -> int:
        """The sum of the ranks' counts."""
        return count

    def gather(
        self, score: Tensor, cost: Tensor | None, teaches: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What a gate decides on, (N,) each, of all rows, rank by rank, from the local ones."""
        return score, cost, teaches

    def same(self, decision: Decision) -> Decision:
        """The decision that holds."""
        return decision

    def own(self, values: Tensor) -> Tensor:
        """This process's part of values (N,) of all rows."""
        return values

    def add(self, values: Tensor) -> Tensor:
        """The sum of the ranks' values, on the CPU."""
        return values.cpu()

    def parameters(self) -> list[Tensor]:
        """Those whose gradients are averaged."""
        return []

    @property
    def shard(self) -> int | None:
        """Which part of every gradient this process has; None: all of it."""
        return None

    def rounds(self, parts: int, kept: int) -> int:
        """How many micro-batches every rank runs, of which `parts` are this one's own."""
        return parts

    def forward(self, work: Callable[[], Tensor]) -> Tensor:
        """Do a forward pass."""
        return work()

    def backward(self, loss: Tensor, last: bool) -> AbstractContextManager[Tensor]:
        """Around the backward pass of a micro-batch, of the loss that is handed out."""
        return nullcontext(loss)

    def close(self, loss: Tensor, rounds: int) -> Tensor:
        """The loss of all ranks, when all micro-batches are done."""
        return loss


Ranks: TypeAlias = "OneProcess | SeveralProcesses"
"""The processes of a step."""


def say_of_grad(error: BaseException, counting: Counting) -> None:
    """Add to an error that the step it broke off had added to `.grad`, if it had."""
    if counting.differentiated:
        checks.add_sentence(error, "By then a backward pass had begun, which adds to .grad: zero it.")
