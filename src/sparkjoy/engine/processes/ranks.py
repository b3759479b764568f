"""What a step asks of the processes it runs in, and the answers of a process that is alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, Protocol

import torch.distributed as dist
from torch import Tensor

from sparkjoy import checks
from sparkjoy.engine.inputs import Inputs
from sparkjoy.engine.ledger import Ledger
from sparkjoy.gates import Decision


class Scored(NamedTuple):
    """What a gate decides on.

    Args:
        score: (N,).
        cost: (N,) tokens, or None.
        teaches: (N,) bool, rows that have a gradient; None where the score says so.
    """

    score: Tensor
    cost: Tensor | None
    teaches: Tensor | None


class Ranks(Protocol):
    """The processes of a step. What is not said to be local is the same on all of them."""

    size: int
    """How many there are."""

    def together(self, ledger: Ledger) -> AbstractContextManager[None]:
        """Around a step: what one process raises, all raise, and say whether the step had added to `.grad`."""
        ...

    def open(self, inputs: Inputs, options: Callable[[], str]) -> None:
        """Begin with the local inputs, if those of all go together; `options` have to be alike everywhere."""
        ...

    def total(self, rows: int) -> int:
        """Rows of all ranks, `rows` of them local."""
        ...

    def screening(self) -> AbstractContextManager[None]:
        """Around forward passes without a graph."""
        ...

    def most(self, count: int) -> int:
        """The largest of the ranks' counts."""
        ...

    def sum(self, count: int) -> int:
        """The sum of the ranks' counts."""
        ...

    def gather(self, scored: Scored) -> Scored:
        """The scores of all rows, rank by rank, from the local ones."""
        ...

    def same(self, decision: Decision) -> Decision:
        """The decision that holds."""
        ...

    def own(self, values: Tensor) -> Tensor:
        """This process's part of values (N,) of all rows."""
        ...

    def add(self, values: Tensor) -> Tensor:
        """The sum of the ranks' values, on the CPU."""
        ...

    def parameters(self) -> list[Tensor]:
        """Those whose gradients are averaged."""
        ...

    @property
    def shard(self) -> int | None:
        """Which part of every gradient this process has; None: all of it."""
        ...

    def rounds(self, parts: int, kept: int) -> int:
        """How many micro-batches every rank runs, of which `parts` are this one's own."""
        ...

    def forward(self, work: Callable[[], Tensor]) -> Tensor:
        """Do a forward pass."""
        ...

    def backward(self, loss: Tensor, last: bool) -> AbstractContextManager[Tensor]:
        """Around the backward pass of a micro-batch, of the loss that is handed out."""
        ...

    def close(self, loss: Tensor, rounds: int) -> Tensor:
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

    @contextmanager
    def together(self, ledger: Ledger) -> Iterator[None]:
        if not self._among_others and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError(
                f"there are {dist.get_world_size()} processes, but no module was given: each would decide by itself, "
                "and one without survivors would leave the others waiting. Give GatedBackward(module=...) the "
                'DistributedDataParallel or fully_shard module, or module="local" where the processes train apart.'
            )
        try:
            yield
        except BaseException as error:
            say_of_grad(error, ledger)
            raise

    def open(self, inputs: Inputs, options: Callable[[], str]) -> None:
        pass

    def total(self, rows: int) -> int:
        return rows

    def screening(self) -> AbstractContextManager[None]:
        return nullcontext()

    def most(self, count: int) -> int:
        return count

    def sum(self, count: int) -> int:
        return count

    def gather(self, scored: Scored) -> Scored:
        return scored

    def same(self, decision: Decision) -> Decision:
        return decision

    def own(self, values: Tensor) -> Tensor:
        return values

    def add(self, values: Tensor) -> Tensor:
        return values.cpu()

    def parameters(self) -> list[Tensor]:
        return []

    @property
    def shard(self) -> int | None:
        return None

    def rounds(self, parts: int, kept: int) -> int:
        return parts

    def forward(self, work: Callable[[], Tensor]) -> Tensor:
        return work()

    def backward(self, loss: Tensor, last: bool) -> AbstractContextManager[Tensor]:
        return nullcontext(loss)

    def close(self, loss: Tensor, rounds: int) -> Tensor:
        return loss


ALONE = OneProcess()


def say_of_grad(error: BaseException, ledger: Ledger) -> None:
    """Add to an error that the step it broke off had added to `.grad`, if it had."""
    if ledger.differentiated:
        checks.add_sentence(error, "By then a backward pass had begun, which adds to .grad: zero it.")
