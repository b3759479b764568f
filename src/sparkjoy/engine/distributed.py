"""One gated step over several processes: one decision about all their rows, equally many passes on each.

Under data parallelism every process (rank) has rows of its own, and every forward and backward pass is a meeting of all
of them. So what a rank may not do alone is done together here: deciding, counting, raising an error.
`docs/distributed.md` says what is global and what is local.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparkjoy.engine.dealing import Layout, deal, row_layout
from sparkjoy.engine.deciding import decide, row_scores
from sparkjoy.engine.inputs import Inputs
from sparkjoy.engine.passes import Passes
from sparkjoy.engine.plan import EVERYTHING, KNOWN, Choice, candidates
from sparkjoy.engine.ranks import OneProcess, Ranks
from sparkjoy.engine.screening import LogProbFunction
from sparkjoy.engine.survivors import Rows
from sparkjoy.engine.wrapped import Replicated, Sharded, Wrapped
from sparkjoy.gates import Decision, Gate, KondoGate
from sparkjoy.scores import ScoreFunction, delight, reads_log_probs

Result = TypeVar("Result")


class SeveralProcesses:
    """A step of all processes that share a model.

    Args:
        wrapped: what averages the gradients.
        deals: whether survivors may move to another rank.
    """

    def __init__(self, wrapped: Wrapped, deals: bool) -> None:
        self._wrapped = wrapped
        self._group = wrapped.group
        self._rank = dist.get_rank(self._group)
        self.size = dist.get_world_size(self._group)
        self._deals = deals
        self._sizes: list[int] = []
        self._layouts_agree = False
        self._layout: Layout | None = None
        self._failure: ValueError | None = None
        self._owes_sync = False

    def run(
        self, gate: Gate | None, score: ScoreFunction, screen: LogProbFunction | None, passes: Passes
    ) -> tuple[Choice, Decision]:
        """Decide about the rows of all ranks, differentiate what is kept of this one's, and say how.

        Args:
            gate: None: everything is kept.
            score: as `GatedBackward`'s.
            screen: likewise.
            passes: of this rank.
        """
        inputs = passes.inputs
        if gate is None:
            ones = torch.ones(sum(self._sizes), dtype=inputs.advantages.dtype, device=inputs.advantages.device)
            passes.differentiate(None, None, ones[self._own].bool())
            return EVERYTHING, Decision(ones.bool(), None, ones, ones)
        everyone = self._everyone(inputs)
        log_probs = inputs.log_probs
        if log_probs is None and not reads_log_probs(score):
            log_probs = torch.zeros_like(inputs.advantages)
        if log_probs is None:
            choice, scores = self._screened(gate, score, screen, passes, everyone)
        else:
            choice, scores = KNOWN, self._gather(lambda: row_scores(score, inputs, log_probs))
        decision = self._of_first(decide(gate, scores, everyone))
        passes.ledger.lap("screen")
        self._differentiate_kept(gate, decision, passes)
        return choice, decision

    def open(self, check: Callable[[], Inputs]) -> Inputs:
        self._failure = None
        inputs, failure = _attempt(check)
        given = 0
        if inputs is not None:
            given = sum((t is not None) << bit for bit, t in enumerate((inputs.log_probs, inputs.mask)))
            self._layout = row_layout(inputs) if self._deals else None
        layout = zlib.crc32(repr(self._layout).encode())
        described = [int(failure is None), 0 if inputs is None else inputs.total, given, layout]
        every = self._all_gather(torch.tensor(described, dtype=torch.int64))
        self._raise_failures(every[:, 0], failure)
        if bool((every[:, 2] != every[0, 2]).any()):
            raise ValueError("log_probs or mask is given on some ranks and not on others; give it on all or on none.")
        self._sizes = every[:, 1].tolist()
        self._layouts_agree = bool((every[:, 3] == every[0, 3]).all())
        assert inputs is not None  # _raise_failures saw to it
        return inputs

    def evened(self, parts: Sequence[Rows]) -> Sequence[Rows | None]:
        most = int(self._all_gather(torch.tensor([len(parts)])).max())
        return [*parts, *[None] * (most - len(parts))]

    def screening(self) -> AbstractContextManager[None]:
        return self._wrapped.bypassed()

    def forward(self, work: Callable[[], Tensor]) -> Tensor:
        return self._wrapped.forward(work)

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        return self._wrapped.micro_batch(last)

    def sum(self, count: int) -> int:
        return int(self._all_gather(torch.tensor([count])).sum())

    def hold(self, check: Callable[[], None]) -> None:
        """Remember the first failure: the other ranks wait for this one's passes."""
        failure = _attempt(check)[1]
        self._failure = self._failure or failure

    def close(self, loss: Tensor) -> Tensor:
        self._owes_sync = not self._wrapped.syncs
        every = self._all_gather(torch.stack([torch.tensor(float(self._failure is None)), loss.cpu()]).double())
        self._raise_failures(every[:, 0], self._failure)
        return every[:, 1].mean().to(loss)

    @property
    def _own(self) -> slice:
        """This rank's rows of everyone's."""
        begin = sum(self._sizes[: self._rank])
        return slice(begin, begin + self._sizes[self._rank])

    def _everyone(self, inputs: Inputs) -> Inputs:
        """What signs and lengths say of the rows of all ranks: advantages (N, 2) have the signs of each row's."""
        advantages = inputs.advantages if inputs.advantages.dim() == 2 else inputs.advantages.unsqueeze(1)
        signs = torch.stack([(advantages > 0).any(dim=1), (advantages < 0).any(dim=1)], dim=1).long().cpu()
        tokens = torch.zeros(inputs.total, dtype=torch.long) if inputs.row_tokens is None else inputs.row_tokens
        every = self._all_rows(torch.cat([signs, tokens.unsqueeze(1)], dim=1))
        signs = (every[:, :2] * torch.tensor([1, -1])).to(inputs.advantages)
        return Inputs(None, signs, None, None, None, None if inputs.row_tokens is None else every[:, 2], ())

    def _screened(
        self, gate: Gate, score: ScoreFunction, screen: LogProbFunction | None, passes: Passes, everyone: Inputs
    ) -> tuple[Choice, Tensor]:
        """The scores of all rows, of which only those are screened that the signs of the advantages leave open."""
        inputs = passes.inputs
        rows = candidates(gate, score is delight, False, everyone)

        def scores() -> Tensor:
            if passes.seen is None:
                return torch.zeros_like(inputs.advantages if inputs.advantages.dim() == 1 else inputs.advantages[:, 0])
            return row_scores(score, inputs, passes.seen)

        def see(which: Tensor) -> Tensor:
            if bool(which.any()):
                own = which[self._own]
                passes.screen(None if bool(own.all()) else own.nonzero().squeeze(1), screen)
            return self._gather(scores)

        every = see(rows.contested)
        if bool(rows.reserve.any()) and rows.quota is not None and int((every > 0).count_nonzero()) < rows.quota:
            every = see(rows.reserve)
        contested = int(rows.contested.count_nonzero())
        settled = f"The signs of the advantages skip {len(every) - contested} of the {len(every)} rows of all processes"
        if not contested:
            return Choice("signs", f"{settled}."), every
        return Choice("screen", f"{settled}; the others are screened, so that all processes decide alike."), every

    def _differentiate_kept(self, gate: Gate, decision: Decision, passes: Passes) -> None:
        """The same number of micro-batches on every rank; none where nothing is kept anywhere."""
        keep = decision.keep[self._own]
        if not bool(decision.keep.any()):
            if self._owes_sync and self._wrapped.syncs:
                self._settle(keep, passes)
            else:
                self._wrapped.rest()
            return
        weight = None if type(gate) is KondoGate else decision.weight[self._own]
        if self._deals and self._layouts_agree and self._layout is not None:
            dealt, weights = deal(passes.inputs, decision, self._sizes, self._rank, self._layout, self._all_gather)
            passes.differentiate(None, None if weight is None else weights, keep, dealt=dealt)
        else:
            passes.differentiate(None if bool(keep.all()) else keep.nonzero().squeeze(1), weight, keep)

    def _settle(self, keep: Tensor, passes: Passes) -> None:
        """Average what earlier calls have left in .grad, by a backward pass of a filler."""
        first = torch.zeros(1, dtype=torch.long, device=keep.device)
        nothing = torch.zeros(len(keep), dtype=passes.inputs.advantages.dtype, device=keep.device)
        passes.differentiate(first, nothing, keep)

    def _gather(self, scores: Callable[[], Tensor]) -> Tensor:
        """The scores of all rows, in float64 on the way; a failure of one rank is raised on all."""
        own, failure = _attempt(scores)
        failure = self._failure or failure
        payload = torch.zeros(1 + max(self._sizes), dtype=torch.float64)
        if own is not None and failure is None:
            payload[0] = 1
            payload[1 : 1 + len(own)] = own.cpu()
        every = self._all_gather(payload)
        self._raise_failures(every[:, 0], failure)
        assert own is not None  # _raise_failures saw to it
        return torch.cat([row[1 : 1 + size] for row, size in zip(every, self._sizes, strict=True)]).to(own)

    def _of_first(self, decision: Decision) -> Decision:
        """Rank 0's decision: its random draws, whatever the others have drawn."""
        dtype = decision.weight.dtype
        parts = (decision.keep, decision.probability, decision.weight)
        price = torch.nan if decision.price is None else float(decision.price)
        payload = torch.cat([torch.tensor([price], dtype=torch.float64), *(part.double().cpu() for part in parts)])
        payload = payload.to(self._wrapped.device)
        dist.broadcast(payload, dist.get_global_rank(self._group, 0), self._group)
        keep, probability, weight = payload[1:].to(decision.keep.device).chunk(3)
        agreed = None if bool(payload[0].isnan()) else payload[0].to(probability.device, dtype)
        return Decision(keep.bool(), agreed, probability.to(dtype), weight.to(dtype))

    def _all_rows(self, own: Tensor) -> Tensor:
        """(N, ...) rows of all ranks, from as many on each as its batch has."""
        padded = torch.zeros(max(self._sizes), *own.shape[1:], dtype=own.dtype)
        padded[: len(own)] = own
        every = self._all_gather(padded)
        return torch.cat([rows[:size] for rows, size in zip(every, self._sizes, strict=True)])

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


def ranks_of(module: nn.Module | Literal["local"] | None, deal_survivors: bool) -> Ranks:
    """The processes that share `module`.

    Raises:
        ValueError: it is neither a DistributedDataParallel nor an FSDP2 module.
    """
    if module is None or module == "local":
        return OneProcess(among_others=module == "local")
    inner = getattr(module, "_orig_mod", module)  # torch.compile's wrapper
    if isinstance(inner, DistributedDataParallel):
        return SeveralProcesses(Replicated(inner), deal_survivors)
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    if isinstance(inner, nn.Module) and isinstance(inner, FSDPModule):
        return SeveralProcesses(Sharded(inner), deal_survivors)
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
