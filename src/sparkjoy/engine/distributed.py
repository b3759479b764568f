"""One gated step over several processes: one decision about all their rows, equally many passes on each.

Under data parallelism every process (rank) has rows of its own, and every forward and backward pass is a meeting of all
of them. So what a rank may not do alone is done together here: deciding, counting, raising an error.
`docs/distributed.md` says what is global and what is local.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparkjoy.engine.inputs import Inputs
from sparkjoy.engine.ranks import OneProcess, Ranks, Scored
from sparkjoy.engine.wrapped import Replicated, Sharded, Wrapped
from sparkjoy.gates import Decision

Result = TypeVar("Result")


class SeveralProcesses:
    """A step of all processes that share a model.

    Args:
        wrapped: what averages the gradients.
    """

    def __init__(self, wrapped: Wrapped) -> None:
        self._wrapped = wrapped
        self._group = wrapped.group
        self._rank = dist.get_rank(self._group)
        self.size = dist.get_world_size(self._group)
        self._sizes: list[int] = []
        self._failure: ValueError | None = None
        self._owes_sync = False

    def open(self, check: Callable[[], Inputs]) -> Inputs:
        self._failure = None
        inputs, failure = _attempt(check)
        given = 0
        if inputs is not None:
            given = sum((t is not None) << bit for bit, t in enumerate((inputs.log_probs, inputs.mask)))
        described = [int(failure is None), 0 if inputs is None else inputs.total, given]
        every = self._all_gather(torch.tensor(described, dtype=torch.int64))
        self._raise_failures(every[:, 0], failure)
        if bool((every[:, 2] != every[0, 2]).any()):
            raise ValueError("log_probs or mask is given on some ranks and not on others; give it on all or on none.")
        self._sizes = every[:, 1].tolist()
        assert inputs is not None  # _raise_failures saw to it
        return inputs

    def total(self, rows: int) -> int:
        return sum(self._sizes)

    def screening(self) -> AbstractContextManager[None]:
        return self._wrapped.bypassed()

    def most(self, count: int) -> int:
        return int(self._all_gather(torch.tensor([count])).max())

    def sum(self, count: int) -> int:
        return int(self._all_gather(torch.tensor([count])).sum())

    def gather(self, score: Callable[[], Scored]) -> Scored:
        """One exchange of everything, in float64; its first number says whether the rank has anything to give."""
        scored, failure = _attempt(score)
        longest = max(self._sizes)
        payload = torch.zeros(1 + 3 * longest, dtype=torch.float64)
        if scored is not None:
            payload[0] = 1
            for column, values in enumerate(scored):
                if values is not None:
                    payload[1 + column * longest :][: len(values)] = values.cpu()
        every = self._all_gather(payload)
        self._raise_failures(every[:, 0], failure)
        assert scored is not None  # _raise_failures saw to it
        columns = every[:, 1:].unflatten(1, (3, longest)).unbind(1)
        score_, cost, teaches = (
            None
            if values is None
            else torch.cat([row[:size] for row, size in zip(column, self._sizes, strict=True)]).to(values)
            for column, values in zip(columns, scored, strict=True)
        )
        assert score_ is not None
        return Scored(score_, cost, teaches)

    def same(self, decision: Decision) -> Decision:
        """Rank 0's: its random draws, whatever the others have drawn."""
        dtype = decision.weight.dtype
        parts = (decision.keep, decision.probability, decision.weight)
        price = torch.nan if decision.price is None else float(decision.price)
        payload = torch.cat([torch.tensor([price], dtype=torch.float64), *(part.double().cpu() for part in parts)])
        payload = payload.to(self._wrapped.device)
        dist.broadcast(payload, dist.get_global_rank(self._group, 0), self._group)
        keep, probability, weight = payload[1:].to(decision.keep.device).chunk(3)
        agreed = None if bool(payload[0].isnan()) else payload[0].to(probability.device, dtype)
        return Decision(keep.bool(), agreed, probability.to(dtype), weight.to(dtype))

    def own(self, values: Tensor) -> Tensor:
        begin = sum(self._sizes[: self._rank])
        return values[begin : begin + self._sizes[self._rank]]

    def add(self, values: Tensor) -> Tensor:
        return self._all_gather(values).sum(dim=0)

    def rounds(self, parts: int, kept: int) -> int:
        """As many as the rank with most; one, of fillers, where an earlier call's gradients are yet to be averaged."""
        if kept:
            return self.most(parts)
        return int(self._owes_sync and self._wrapped.syncs)

    def forward(self, work: Callable[[], Tensor]) -> Tensor:
        return self._wrapped.forward(work)

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        return self._wrapped.micro_batch(last)

    def hold(self, check: Callable[[], None]) -> None:
        """Remember the first failure: the other ranks wait for this one's backward passes."""
        failure = _attempt(check)[1]
        self._failure = self._failure or failure

    def close(self, loss: Tensor, rounds: int) -> Tensor:
        if not rounds:
            self._wrapped.rest()
            return loss
        self._owes_sync = not self._wrapped.syncs
        every = self._all_gather(torch.stack([torch.tensor(float(self._failure is None)), loss.cpu()]).double())
        self._raise_failures(every[:, 0], self._failure)
        return every[:, 1].mean().to(loss)

    def _all_gather(self, tensor: Tensor) -> Tensor:
        """(ranks, *shape), on the CPU."""
        tensor = tensor.to(self._wrapped.device)
        every = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(every, tensor, self._group)
        return torch.stack(every).cpu()

    def _raise_failures(self, sound: Tensor, own: ValueError | None) -> None:
        if own is not None:
            raise own
        failed = (sound == 0).nonzero().flatten().tolist()
        if failed:
            raise ValueError(
                f"rank {', '.join(map(str, failed))} of {self.size} found its input or its log-probs wrong, so none "
                "goes on; its own error says what."
            )


def ranks_of(module: nn.Module | Literal["local"] | None) -> Ranks:
    """The processes that share `module`.

    Raises:
        ValueError: it is neither a DistributedDataParallel nor an FSDP2 module.
    """
    if module is None or module == "local":
        return OneProcess(among_others=module == "local")
    inner = getattr(module, "_orig_mod", module)  # torch.compile's wrapper
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


def _attempt(work: Callable[[], Result]) -> tuple[Result | None, ValueError | None]:
    """What `work` returns, or the ValueError it raised."""
    try:
        return work(), None
    except ValueError as error:
        return None, error
