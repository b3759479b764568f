"""One gated step over several processes: one decision about all their rows, equally many passes on each.

Under data parallelism every process (rank) has rows of its own, and every backward pass that averages is a meeting of
all of them. So what a rank may not do alone is done together here: deciding, counting, raising an error.
`docs/distributed.md` says what holds.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparkjoy.gates import Decision
from sparkjoy.processes.data_parallel import Replicated, Sharded, Wrapped
from sparkjoy.processes.meeting import Meeting, Place, RanksError, first_difference
from sparkjoy.processes.ranks import OneProcess, Ranks, say_of_grad
from sparkjoy.step.counts import Counting
from sparkjoy.step.inputs import Inputs, check_finite


class SeveralProcesses:
    """A step of all processes that share a model.

    Args:
        wrapped: what averages the gradients.
    """

    def __init__(self, wrapped: Wrapped) -> None:
        self._wrapped = wrapped
        self._meeting = Meeting(wrapped.group, wrapped.device)
        self.size = self._meeting.size
        self._rank = self._meeting.rank
        self._sizes: list[int] = []
        self._owes_sync = False
        self._differentiated = False
        self._refused: bool | None = None  # whether some of a gradient that all refuse has been added to `.grad`

    @contextmanager
    def together(self, counting: Counting) -> Iterator[None]:
        self._meeting.begin()
        self._differentiated, self._refused = False, None
        try:
            yield
        except BaseException as error:
            try:
                if not self._meeting.over:
                    self._wrapped.catch_up()
                    self._meet("failed", failure=error)
                if self._refused is None:
                    say_of_grad(error, counting)
                raise
            finally:  # what a comparison had set aside is back by now
                self._break_off()

    def open(self, inputs: Inputs, options: Callable[[], str]) -> None:
        text = options()
        every = self._meet("open", inputs.total, zlib.crc32(text.encode()))
        if bool((every[:, 1] != every[0, 1]).any()):
            differs = first_difference(self._meeting.texts(text))
            self._meeting.over = True
            raise ValueError(
                f"{differs}; expected the same on every rank. A call that one rank leaves out, all leave out."
            )
        self._sizes = [int(size) for size in every[:, 0]]

    def total(self, rows: int) -> int:
        return sum(self._sizes)

    def screening(self) -> AbstractContextManager[None]:
        return self._wrapped.bypassed()

    def most(self, count: int) -> int:
        return int(self._meet("most", count)[:, 0].max())

    def sum(self, count: int) -> int:
        return int(self._meet("sum", count)[:, 0].sum())

    def gather(
        self, score: Tensor, cost: Tensor | None, teaches: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """One exchange of everything, in float64."""
        check_finite("the score", score)
        scored = score, cost, teaches
        self._meet("gather")
        longest = max(self._sizes)
        payload = torch.zeros(3 * longest, dtype=torch.float64, device="cpu")
        for column, values in enumerate(scored):
            if values is not None:
                payload[column * longest :][: len(values)] = values.cpu()
        columns = self._meeting.all_gather(payload).unflatten(1, (3, longest)).unbind(1)
        every, costs, teach = (
            None
            if values is None
            else torch.cat([row[:size] for row, size in zip(column, self._sizes, strict=True)]).to(values)
            for column, values in zip(columns, scored, strict=True)
        )
        assert every is not None
        return every, costs, teach

    def same(self, decision: Decision) -> Decision:
        """Rank 0's: its random draws, whatever the others have drawn."""
        self._meet("same")
        dtype = decision.weight.dtype
        parts = (decision.keep, decision.probability, decision.weight)
        price = torch.nan if decision.price is None else float(decision.price)
        payload = torch.cat(
            [torch.tensor([price], dtype=torch.float64, device="cpu"), *(part.double().cpu() for part in parts)]
        )
        payload = self._meeting.all_gather(payload)[0]
        keep, probability, weight = payload[1:].to(decision.keep.device).chunk(3)
        agreed = None if bool(payload[0].isnan()) else payload[0].to(probability.device, dtype)
        return Decision(keep.bool(), agreed, probability.to(dtype), weight.to(dtype))

    def own(self, values: Tensor) -> Tensor:
        begin = sum(self._sizes[: self._rank])
        return values[begin : begin + self._sizes[self._rank]]

    def add(self, values: Tensor) -> Tensor:
        self._meet("add")
        return self._meeting.all_gather(values).sum(dim=0)

    def parameters(self) -> list[Tensor]:
        if self._owes_sync or not self._wrapped.syncs:
            raise ValueError(
                "compare_every compares the gradient of one call, and under no_sync() those of several are averaged "
                "at once; leave compare_every out, or no_sync()."
            )
        return self._wrapped.parameters()

    @property
    def shard(self) -> int | None:
        return self._rank if self._wrapped.shards else None

    def rounds(self, parts: int, kept: int) -> int:
        """As many as the rank with most; one, of dummies, where an earlier call's gradients are yet to be averaged."""
        rounds = self.most(parts) if kept else int(self._owes_sync and self._wrapped.syncs)
        if rounds:
            self._wrapped.begin()
        return rounds

    def forward(self, work: Callable[[], Tensor]) -> Tensor:
        log_probs = self._wrapped.forward(work)
        if self._wrapped.forward_meets:
            self._meet("forward")
        return log_probs

    @contextmanager
    def backward(self, loss: Tensor, last: bool) -> Iterator[Tensor]:
        meets = self._wrapped.meets(last)
        if meets:
            self._meet("backward")
        self._differentiated = True
        with self._wrapped.backward(loss, last) as loss:
            self._meeting.over = meets  # whom an averaging backward pass waits for, nobody can tell
            yield loss
            self._meeting.over = False

    def close(self, loss: Tensor, rounds: int) -> Tensor:
        every = self._meet("close", float(loss))
        if rounds:
            self._owes_sync = not self._wrapped.syncs
        else:
            self._wrapped.rest()
        return every[:, 0].mean().to(loss)

    def _meet(self, place: Place, *numbers: float, failure: BaseException | None = None) -> Tensor:
        """(ranks, NUMBERS) what each rank brings; where one has failed, all raise."""
        try:
            return self._meeting.meet(place, (self._differentiated, *numbers), failure)[:, 1:]
        except RanksError as failed:
            self._refused = bool(failed.numbers[:, 0].any())
            grad = ".grad is as it was."
            if self._refused:
                grad = ".grad is zero now on every rank: some of the gradient had been added to it."
            if failure is not None and not isinstance(failure, Exception):
                raise failure from None  # an interrupt stays one where it came
            raise failed.kind(f"{failed}. {grad}") from failure

    def _break_off(self) -> None:
        """What all have failed in leaves nothing behind."""
        if self._refused is not None:
            self._wrapped.abandon()
        if self._refused:
            self._wrapped.zero()
            self._owes_sync = False


def ranks_of(module: nn.Module | Literal["local"] | None) -> Ranks:
    """The processes that share `module`.

    Raises:
        ValueError: it is neither a DistributedDataParallel nor an FSDP2 module.
    """
    if module is None or (isinstance(module, str) and module == "local"):
        return OneProcess(among_others=module is not None)
    compiled = sys.modules.get("torch._dynamo.eval_frame")  # who has compiled a module has imported it, so we need not
    inner: Any = module
    if compiled is not None and isinstance(module, compiled.OptimizedModule):
        inner = module._orig_mod
    if isinstance(inner, DistributedDataParallel):
        return SeveralProcesses(Replicated(inner))
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    if isinstance(inner, nn.Module) and isinstance(inner, FSDPModule):
        return SeveralProcesses(Sharded(inner))
    way_out = "leave it out in a single process"
    if isinstance(inner, FullyShardedDataParallel):
        way_out = "shard it by torch.distributed.fsdp.fully_shard instead"
    elif isinstance(inner, nn.DataParallel):
        way_out = "use one process per device instead"
    raise ValueError(
        f"module is a {type(inner).__name__}; expected the DistributedDataParallel wrapper or a module that "
        f"fully_shard was called on; {way_out}."
    )
