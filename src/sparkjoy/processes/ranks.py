"""One gated step over several processes: one decision about all their rows, equally many passes on each.

Under data parallelism every process (rank) has rows of its own, and every backward pass that averages gradients is a
collective. So what a rank may not do alone, all do together here: deciding, counting, raising an error.
`docs/distributed.md` says what holds.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparkjoy import checks
from sparkjoy.gates import Decision
from sparkjoy.processes.data_parallel import Replicated, Sharded, Wrapped
from sparkjoy.processes.meeting import Meeting, RanksError
from sparkjoy.step.counts import Counting
from sparkjoy.step.inputs import Inputs, check_finite


class Ranks:
    """What a step asks of the processes that share its model, and the answers of a process that is alone.

    Args:
        local: whether other processes may exist, with models of their own.
    """

    size = 1
    """How many there are."""
    shard: int | None = None
    """Which part of every gradient this rank has; None: all of it."""

    def __init__(self, local: bool = False) -> None:
        self._local = local

    @contextmanager
    def together(self, counting: Counting) -> Iterator[None]:
        """Around a step: what one rank raises, all raise, and say whether the step had added to `.grad`."""
        if not self._local and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
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

    def open(self, inputs: Inputs, options: Callable[[], dict[str, str]]) -> None:
        """Begin with this rank's inputs; `options`, in words, have to be the same on all ranks."""

    def total(self, rows: int) -> int:
        """How many rows all ranks have, of which `rows` are this one's."""
        return rows

    def screening(self) -> AbstractContextManager[None]:
        """Around forward passes without a graph."""
        return nullcontext()

    def counts(self, count: int) -> list[int]:
        """The count of every rank."""
        return [count]

    def gather(self, score: Tensor, *columns: Tensor | None) -> list[Any]:
        """What a gate decides on, (N,) each or None, of the rows of all ranks, in their order."""
        return [score, *columns]

    def same(self, decision: Decision) -> Decision:
        """The decision that holds: rank 0's, whatever the others have drawn."""
        return decision

    def own(self, values: Tensor) -> Tensor:
        """This rank's part of values (N,) of all rows."""
        return values

    def add(self, values: Tensor) -> Tensor:
        """The sum of the ranks' values, on the CPU."""
        return values.cpu()

    def parameters(self) -> list[Tensor]:
        """Those whose gradients are averaged."""
        return []

    def rounds(self, parts: int, kept: int) -> int:
        """How many micro-batches every rank runs, of which `parts` are this one's, and `kept` the rows of all."""
        return parts

    def forward(self, work: Callable[[], Tensor], own: bool = True) -> Tensor:
        """Do a forward pass, the policy's `own` or a draft's."""
        return work()

    def backward(self, loss: Tensor, last: bool) -> AbstractContextManager[Tensor]:
        """Around the backward pass of a micro-batch, which is of the loss that is handed out."""
        return nullcontext(loss)

    def close(self, loss: Tensor) -> Tensor:
        """The loss of all ranks, when all micro-batches are done."""
        return loss


class SeveralRanks(Ranks):
    """The ranks that share a model which averages its gradients.

    Args:
        wrapped: the model.
    """

    def __init__(self, wrapped: Wrapped) -> None:
        self._wrapped = wrapped
        self._meeting = Meeting(wrapped.group, wrapped.device)
        self._rank, self.size = self._meeting.rank, self._meeting.size
        self.shard = self._rank if wrapped.shards else None
        self._sizes: list[int] = []
        self._owes_sync = False  # whether gradients of earlier calls are yet to be averaged

    @contextmanager
    def together(self, counting: Counting) -> Iterator[None]:
        self._meeting.begin()
        try:
            try:
                yield
            except BaseException as error:
                if self._meeting.over:
                    raise
                self._wrapped.catch_up()
                self._meeting.meet("failed", failure=error)
        except RanksError as failed:  # all raise it; what a gradient check had set aside is back by now
            (kind, sentence, began), own = failed.args, failed.__cause__
            self._wrapped.abandon()
            grad = ".grad is as it was."
            if began:
                self._wrapped.zero()
                self._owes_sync = False
                grad = ".grad is zero now on every rank: some of the gradient had been added to it."
            if own is not None and not isinstance(own, Exception):
                raise own from None  # an interrupt stays one where it came
            raise kind(f"{sentence}. {grad}") from own
        except BaseException as error:
            say_of_grad(error, counting)
            raise

    def open(self, inputs: Inputs, options: Callable[[], dict[str, str]]) -> None:
        words = options()
        sizes, sums = self._meeting.meet("open", inputs.total, zlib.crc32(repr(words).encode())).T.long().tolist()
        for rank, checksum in enumerate(sums):
            if checksum != sums[0]:
                self._meeting.over = True  # all raise this
                first, other = self._meeting.told(0, words), self._meeting.told(rank, words)
                name = next(name for name in first if first[name] != other[name])
                raise ValueError(
                    f"{name} is {first[name]} on rank 0 and {other[name]} on rank {rank}; expected the same on every "
                    "rank. A call that one rank leaves out, all leave out."
                )
        self._sizes = sizes

    def total(self, rows: int) -> int:
        return sum(self._sizes)

    def screening(self) -> AbstractContextManager[None]:
        return self._wrapped.screening()

    def counts(self, count: int) -> list[int]:
        return self._meeting.meet("counts", count)[:, 0].long().tolist()

    def gather(self, score: Tensor, *columns: Tensor | None) -> list[Any]:
        check_finite("the score", score)
        self._meeting.meet("gather")
        given = [score, *columns]
        own = torch.stack([(torch.zeros_like(score) if column is None else column).double() for column in given])
        padded = self._meeting.all_gather(nn.functional.pad(own, (0, max(self._sizes) - len(score))))
        every = torch.cat([part[:, :size] for part, size in zip(padded, self._sizes, strict=True)], dim=1)
        return [None if column is None else found.to(column) for column, found in zip(given, every, strict=True)]

    def same(self, decision: Decision) -> Decision:
        self._meeting.meet("same")
        parts = (decision.keep, decision.price, decision.probability, decision.weight)
        parts = self._meeting.told(0, [part if part is None else part.detach().cpu() for part in parts])
        found: list[Any] = [part if part is None else part.to(decision.keep.device) for part in parts]
        return Decision(*found)

    def own(self, values: Tensor) -> Tensor:
        return values.narrow(0, sum(self._sizes[: self._rank]), self._sizes[self._rank])

    def add(self, values: Tensor) -> Tensor:
        self._meeting.meet("add")
        return self._meeting.all_gather(values).sum(dim=0)

    def parameters(self) -> list[Tensor]:
        if self._owes_sync or not self._wrapped.averages(last=True):
            raise ValueError(
                "compare_every compares the gradient of one call, and under no_sync() those of several are averaged "
                "at once; leave compare_every out, or no_sync()."
            )
        return list(self._wrapped.module.parameters())

    def rounds(self, parts: int, kept: int) -> int:
        # As many as the rank with most; one, of dummies, where only gradients of earlier calls are to be averaged.
        rounds = max(self.counts(parts)) if kept else int(self._owes_sync and self._wrapped.averages(last=True))
        if rounds:
            self._wrapped.begin()
        return rounds

    def forward(self, work: Callable[[], Tensor], own: bool = True) -> Tensor:
        log_probs = self._wrapped.forward(work, own)
        if self._wrapped.shards:
            self._meeting.meet("forward")
        return log_probs

    @contextmanager
    def backward(self, loss: Tensor, last: bool) -> Iterator[Tensor]:
        averages = self._wrapped.averages(last)
        if averages:
            self._meeting.meet("backward")
        self._meeting.began = True
        with self._wrapped.backward(loss, last) as loss:
            self._meeting.over = averages  # whom an averaging backward pass waits for, nobody can tell
            yield loss
            self._meeting.over = False

    def close(self, loss: Tensor) -> Tensor:
        every = self._meeting.meet("close", float(loss))
        if self._meeting.began:
            self._owes_sync = not self._wrapped.averages(last=True)
        else:
            self._wrapped.abandon()
        return every[:, 0].mean().to(loss)


def ranks_of(module: nn.Module | Literal["local"] | None) -> Ranks:
    """The processes that share `module`.

    Raises:
        ValueError: it is neither a DistributedDataParallel nor an FSDP2 module.
    """
    if module is None or (isinstance(module, str) and module == "local"):
        return Ranks(local=module is not None)
    inner = getattr(module, "_orig_mod", module)  # of a module that torch.compile has wrapped
    if isinstance(inner, DistributedDataParallel):
        return SeveralRanks(Replicated(inner))
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    if isinstance(inner, FSDPModule):
        return SeveralRanks(Sharded(inner))
    way_out = "leave it out in a single process"
    if isinstance(inner, FullyShardedDataParallel):
        way_out = "shard it by torch.distributed.fsdp.fully_shard instead"
    elif isinstance(inner, nn.DataParallel):
        way_out = "use one process per device instead"
    raise ValueError(
        f"module is a {type(inner).__name__}; expected the DistributedDataParallel wrapper or a module that "
        f"fully_shard was called on; {way_out}."
    )


def say_of_grad(error: BaseException, counting: Counting) -> None:
    """Add to an error that the step it broke off had added to `.grad`, if it had."""
    if counting.differentiated:
        checks.add_sentence(error, "By then a backward pass had begun, which adds to .grad: zero it.")
