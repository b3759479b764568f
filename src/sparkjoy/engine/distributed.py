"""One gated step over several processes: one decision about all their rows, equally many passes on each.

Under data parallelism every process (rank) has rows of its own, and every backward pass that averages is a meeting of
all of them. So what a rank may not do alone is done together here: deciding, counting, raising an error.

All meetings begin alike, by a few numbers of which the first says that a rank has failed. A rank where anything is
raised goes straight to a meeting and says so; the others hear of it wherever they meet next, and all raise the same.
`docs/distributed.md` says what holds.
"""

from __future__ import annotations

import contextlib
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparkjoy.engine.inputs import Inputs, check_finite
from sparkjoy.engine.options import first_difference
from sparkjoy.engine.ranks import OneProcess, Ranks, Scored
from sparkjoy.engine.wrapped import Replicated, Sharded, Wrapped
from sparkjoy.gates import Decision

PLACES = ("failed", "open", "sum", "most", "gather", "same", "add", "forward", "backward", "close")
"""Where ranks meet."""

KINDS: tuple[type[Exception], ...] = (ValueError, TypeError, RuntimeError)
"""What all ranks raise: the kind of the first failure, the last one for any other kind."""

NUMBERS = 3
"""A meeting can be had for, besides those that every meeting begins with."""

TEXT = 4096
"""Bytes of a sentence that is told to the others."""


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
        self._owes_sync = False
        self._told = False  # all know of the failure, or cannot be told
        self._differentiated = False

    @contextmanager
    def together(self) -> Iterator[None]:
        self._told = self._differentiated = False
        try:
            yield
        except BaseException as error:
            if not self._told:
                self._wrapped.catch_up()
                self._meet("failed", failure=error)
            raise

    def open(self, inputs: Inputs, options: Callable[[], str]) -> None:
        given = (inputs.log_probs, inputs.mask, inputs.behavior_log_probs)
        bits = sum((tensor is not None) << bit for bit, tensor in enumerate(given))
        text = options()
        every = self._meet("open", inputs.total, bits, zlib.crc32(text.encode()))
        if bool((every[:, 1] != every[0, 1]).any()):
            self._told = True
            raise ValueError(
                "log_probs, mask or behavior_log_probs is given on some ranks and not on others; give it on all or on "
                "none."
            )
        if bool((every[:, 2] != every[0, 2]).any()):
            differs = first_difference(self._texts(text))
            self._told = True
            raise ValueError(f"{differs}; expected the same options on every rank.")
        self._sizes = [int(size) for size in every[:, 0]]

    def total(self, rows: int) -> int:
        return sum(self._sizes)

    def screening(self) -> AbstractContextManager[None]:
        return self._wrapped.bypassed()

    def most(self, count: int) -> int:
        return int(self._meet("most", count)[:, 0].max())

    def sum(self, count: int) -> int:
        return int(self._meet("sum", count)[:, 0].sum())

    def gather(self, scored: Scored) -> Scored:
        """One exchange of everything, in float64."""
        check_finite("the score", scored.score)
        self._meet("gather")
        longest = max(self._sizes)
        payload = torch.zeros(3 * longest, dtype=torch.float64)
        for column, values in enumerate(scored):
            if values is not None:
                payload[column * longest :][: len(values)] = values.cpu()
        columns = self._all_gather(payload).unflatten(1, (3, longest)).unbind(1)
        score, cost, teaches = (
            None
            if values is None
            else torch.cat([row[:size] for row, size in zip(column, self._sizes, strict=True)]).to(values)
            for column, values in zip(columns, scored, strict=True)
        )
        assert score is not None
        return Scored(score, cost, teaches)

    def same(self, decision: Decision) -> Decision:
        """Rank 0's: its random draws, whatever the others have drawn."""
        self._meet("same")
        dtype = decision.weight.dtype
        parts = (decision.keep, decision.probability, decision.weight)
        price = torch.nan if decision.price is None else float(decision.price)
        payload = torch.cat([torch.tensor([price], dtype=torch.float64), *(part.double().cpu() for part in parts)])
        payload = self._all_gather(payload)[0]
        keep, probability, weight = payload[1:].to(decision.keep.device).chunk(3)
        agreed = None if bool(payload[0].isnan()) else payload[0].to(probability.device, dtype)
        return Decision(keep.bool(), agreed, probability.to(dtype), weight.to(dtype))

    def own(self, values: Tensor) -> Tensor:
        begin = sum(self._sizes[: self._rank])
        return values[begin : begin + self._sizes[self._rank]]

    def add(self, values: Tensor) -> Tensor:
        self._meet("add")
        return self._all_gather(values).sum(dim=0)

    def rounds(self, parts: int, kept: int) -> int:
        """As many as the rank with most; one, of fillers, where an earlier call's gradients are yet to be averaged."""
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
            self._told = meets  # whom an averaging backward pass waits for, nobody can tell
            yield loss
            self._told = False

    def close(self, loss: Tensor, rounds: int) -> Tensor:
        every = self._meet("close", float(loss))
        if rounds:
            self._owes_sync = not self._wrapped.syncs
        else:
            self._wrapped.rest()
        return every[:, 0].mean().to(loss)

    def _meet(self, place: str, *numbers: float, failure: BaseException | None = None) -> Tensor:
        """(ranks, NUMBERS) what each brings, where all have come to the same place; else all raise the same."""
        kind = 0
        if failure is not None:
            kind = next((code for code, kind in enumerate(KINDS, 1) if isinstance(failure, kind)), len(KINDS))
        header = [kind, PLACES.index(place), float(self._differentiated), *numbers]
        every = self._all_gather(torch.tensor(header + [0] * (3 + NUMBERS - len(header)), dtype=torch.float64))
        kinds, places, differentiated = every[:, :3].long().T
        apart = len(set(places.tolist())) > 1
        if not bool(kinds.any()) and not apart:
            return every[:, 3:]
        said = self._texts(_sentence(failure) if failure is not None else PLACES[int(places[self._rank])])
        self._told = True
        self._wrapped.abandon()
        grad = ".grad is as it was."
        if bool(differentiated.any()):
            self._wrapped.zero()
            self._owes_sync = False
            grad = ".grad is zero now on every rank: some of the gradient had been added to it."
        if failure is not None and not isinstance(failure, Exception):
            raise failure  # an interrupt stays one where it came
        failed = kinds.nonzero().flatten().tolist()
        if not failed:
            where = ", ".join(f"rank {rank} at {text!r}" for rank, text in enumerate(said))
            raise RuntimeError(f"the ranks are out of step: {where}. They were given different work. {grad}")
        who = f"rank {', '.join(map(str, failed))} of {self.size}" if len(failed) < self.size else "every rank"
        raise KINDS[int(kinds[failed[0]]) - 1](
            f"{who} failed, so none goes on: {said[failed[0]].rstrip('.')}. {grad}"
        ) from failure

    def _texts(self, text: str) -> list[str]:
        """What each rank says."""
        data = text.encode()[:TEXT]
        every = self._all_gather(torch.tensor(list(data) + [0] * (TEXT - len(data)), dtype=torch.uint8))
        return [bytes(row.tolist()).rstrip(b"\0").decode(errors="ignore") for row in every]

    def _all_gather(self, tensor: Tensor) -> Tensor:
        """(ranks, *shape), on the CPU."""
        tensor = tensor.to(self._wrapped.device)
        every = [torch.empty_like(tensor) for _ in range(self.size)]
        try:
            dist.all_gather(every, tensor, self._group)
        except RuntimeError as error:
            self._told = True
            raise RuntimeError(self._lost(error)) from error
        return torch.stack(every).cpu()

    def _lost(self, error: RuntimeError) -> str:
        """A sentence that says which ranks do not answer, where gloo can."""
        missing = "another rank"
        with contextlib.suppress(ValueError):  # of a backend that has no such barrier
            try:
                dist.monitored_barrier(self._group, timedelta(seconds=5), wait_all_ranks=True)
            except RuntimeError as barrier:
                found = re.search(r"Ranks? ([\d, ]+) failed", str(barrier))
                missing = f"rank {found[1].strip(', ')}" if found else missing
        return (
            f"{missing} of {self.size} does not answer rank {self._rank}: it has ended, was stopped, or did not make "
            f"this call within the time-out of the process group ({str(error).splitlines()[0][:200]})."
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


def _sentence(error: BaseException) -> str:
    """What is told of an error: of what is not meant for the user's eye, its kind too."""
    said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return said.rstrip(": ")
