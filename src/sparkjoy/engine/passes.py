"""The forward and backward passes of one call, in micro-batches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparkjoy import checks
from sparkjoy.engine.batches import Rows
from sparkjoy.engine.inputs import Inputs, finite_where_valid
from sparkjoy.engine.ledger import Ledger
from sparkjoy.engine.normalizer import Normalizer, divisor
from sparkjoy.engine.packing import AT_ONCE, Packing
from sparkjoy.engine.processes.ranks import ALONE, Ranks
from sparkjoy.engine.screening import LogProbFunction, screening
from sparkjoy.engine.sound import check_discrete, check_graph, check_numbers, check_padding, valid
from sparkjoy.gradients import Leaves, refuse_hooks
from sparkjoy.losses import Loss, reinforce
from sparkjoy.scores import at_least_float32

Seen = tuple[Any, Tensor]
"""Rows, and their exact log-probs, detached."""

STEPS_IN_HOOK = (
    "this batch may take several backward passes: the hook would run once in each, with a part of the gradient. Leave "
    "out micro_batch_size and micro_batch_tokens, or make them large enough for all rows; or step after the call "
    "instead of in a hook."
)


@dataclass(frozen=True)
class Graph:
    """Differentiable log-probs of some rows, made before it was decided which of them to keep.

    Args:
        rows: (n,) which ones.
        part: what was given of them.
        log_probs: theirs.
        seen: the same without a graph at their places among all rows, 0 elsewhere.
    """

    rows: Tensor
    part: Inputs
    log_probs: Tensor
    seen: Tensor


class HowToRun(NamedTuple):
    """The options of `GatedBackward` that say how passes are run; what they mean is said there."""

    loss: Loss = reinforce
    normalizer: Normalizer = "batch"
    packing: Packing = AT_ONCE
    backward: Callable[[Tensor], Any] = torch.Tensor.backward
    ranks: Ranks = ALONE


class Passes:
    """What one call runs.

    Args:
        log_prob_fn: `rows -> log-probs`, differentiable.
        inputs: the checked batch of this process.
        ledger: counts every pass.
        how: the options that say how.
        discrete: refuse log-probs above 0 that would be differentiated.
        lessons: where to put rows and their exact log-probs, each row once; None: nowhere.
    """

    def __init__(
        self,
        log_prob_fn: LogProbFunction,
        inputs: Inputs,
        ledger: Ledger,
        how: HowToRun,
        discrete: bool = False,
        lessons: list[Seen] | None = None,
    ) -> None:
        self.log_prob_fn = log_prob_fn
        self.ledger = ledger
        self._inputs = inputs
        self._how = how
        self._discrete = discrete
        self._lessons = lessons
        self._told: Tensor | None = None  # (B,) bool, which rows are among the lessons
        self._losses: list[Tensor] = []
        self._rounds = 0
        self._divisor: float | None = None

    def screen(self, rows: Tensor | None, draft: LogProbFunction | None = None) -> Tensor | None:
        """The log-probs of `rows` (None: all) without a graph, 0 elsewhere; None where there are no rows.

        From `draft`, or from the log-prob function itself.
        """
        packing, ranks = self._how.packing, self._how.ranks
        source, own = (self.log_prob_fn, True) if draft is None else (draft, False)
        parts = packing.divide(self._inputs, rows)
        rounds = ranks.most(len(parts))  # passes may be meetings, a draft's too where it runs a sharded policy
        found, seen = [], None
        with screening(), ranks.screening():
            for number in range(rounds):
                part_rows: Rows = parts[number] if number < len(parts) else slice(0, 1)  # a filler, for the others
                part, columns = packing.trimmed(self._inputs.take(part_rows))
                work = partial(self.ledger.screen, source, part, own)
                found.append((part_rows, columns, ranks.forward(work) if own else work(), part))
        for part_rows, columns, log_probs, part in found[: len(parts)]:
            if own:
                self._teach(part_rows, part, log_probs)
            log_probs = finite_where_valid("the screening forward pass: log_probs", log_probs, part.mask)
            seen = self._placed(seen, part_rows, columns, log_probs, part.total)
        self.ledger.lap("screen")
        return seen

    def forward(self, rows: Tensor | None) -> Graph:
        """Differentiable log-probs of `rows` (None: all) in one pass."""
        part_rows = slice(None) if rows is None else rows
        part, columns = self._how.packing.trimmed(self._inputs.take(part_rows))
        self.ledger.lap("gather")
        log_probs = self.ledger.forward(self.log_prob_fn, part)
        self._teach(part_rows, part, log_probs)
        seen = finite_where_valid("the dense forward pass: log_probs", log_probs.detach(), part.mask)
        seen = self._placed(None, part_rows, columns, seen, part.total)
        self.ledger.lap("forward")
        every = torch.arange(self._inputs.total, device=log_probs.device)
        return Graph(every if rows is None else rows, part, log_probs, seen)

    def differentiate_graph(self, graph: Graph, weight: Tensor, keep: Tensor) -> None:
        """Add the gradient of a forward pass made before, each row times its weight (B,)."""
        self._rounds += 1
        with self._refusing_hooks(graph.log_probs, 1, 1):
            self._add(graph.log_probs, graph.part, weight[graph.rows], keep)

    def differentiate(
        self, keep: Tensor, weight: Tensor | None, kept_everywhere: int, watches: bool = False
    ) -> Tensor | None:
        """Forward and backward over the kept rows, each times its weight (None: 1).

        Args:
            keep: (B,) bool.
            weight: (B,), or None.
            kept_everywhere: rows to differentiate in all processes.
            watches: whether to return the log-probs that were differentiated, detached, 0 elsewhere.
        """
        all_kept = kept_everywhere == self._how.ranks.total(self._inputs.total)
        parts = self._how.packing.divide(self._inputs, None if all_kept else keep.nonzero().squeeze(1))
        rounds = self._how.ranks.rounds(len(parts), kept_everywhere)
        watched = None
        for number in range(1, rounds + 1):
            filler = number > len(parts)  # other ranks have more, and wait for this one
            part_rows: Rows = slice(0, 1) if filler else parts[number - 1]
            part, columns = self._how.packing.trimmed(self._inputs.take(part_rows))
            part_weight = None if weight is None else weight[part_rows]
            if filler:
                part_weight = self._inputs.advantages.new_zeros(1)
            self.ledger.lap("gather")
            log_probs = self._how.ranks.forward(partial(self.ledger.forward, self.log_prob_fn, part))
            if not filler:
                self._teach(part_rows, part, log_probs)
            if watches and not filler:
                values = valid(log_probs.detach(), part.mask)
                watched = self._placed(watched, part_rows, columns, values, part.total)
            where = f"micro-batch {number} of {rounds}"
            with self._refusing_hooks(log_probs, number, rounds):
                self._add(log_probs, part, part_weight, keep, where, last=number == rounds)
        self._rounds += rounds
        return watched

    def close(self) -> Tensor:
        """The loss of all processes, 0-dim and detached, when all passes are done."""
        losses = self._losses
        loss = losses[0] if len(losses) == 1 else sum(losses, start=self._inputs.advantages.new_zeros(()))
        return self._how.ranks.close(loss, self._rounds)

    def _add(
        self,
        log_probs: Tensor,
        part: Inputs,
        weight: Tensor | None,
        keep: Tensor,
        where: str = "the dense pass",
        last: bool = True,
    ) -> None:
        if self._divisor is None:
            self._divisor = divisor(self._how.normalizer, self._inputs, keep, log_probs, self._how.ranks)
        loss = _terms(self._how.loss, log_probs, part, weight).sum() / self._divisor
        self._check(loss, log_probs, part, where)
        self.ledger.lap("forward")
        backward = self._how.backward
        steps = _accumulation_steps(backward)
        with self._how.ranks.backward(loss, last) as differentiable:
            self.ledger.backward(backward, differentiable if steps == 1 else differentiable * steps, part)
        self.ledger.lap("backward")
        self._losses.append(loss.detach())

    def _check(self, loss: Tensor, log_probs: Tensor, part: Inputs, where: str) -> None:
        """Raise a ValueError that names the pass, before it is differentiated, if its gradient would be wrong."""
        check_graph(loss, log_probs)
        all_finite = check_numbers(loss, log_probs, part.mask, where, unbounded=self._how.loss is reinforce)
        if self._discrete:
            check_discrete(log_probs, part.mask, where)
        if self._how.ranks.size == 1 and not all_finite:
            with self.ledger.uncounted():
                check_padding(log_probs, where)

    @contextmanager
    def _refusing_hooks(self, log_probs: Tensor, number: int, rounds: int) -> Iterator[None]:
        """Around the first backward pass: what steps within it is refused where a batch of this size may take several.

        Before `.grad` is touched, or, inside of a reentrant checkpoint, before the first such parameter's is.
        """
        how = self._how
        several = rounds > 1 or (how.ranks.size == 1 and not how.packing.holds(self._inputs, self._inputs.total))
        if number > 1 or not several:
            yield
            return
        with Leaves(partial(refuse_hooks, why=STEPS_IN_HOOK)) as leaves:
            leaves.look(log_probs)
            yield

    def _teach(self, rows: Rows, part: Inputs, log_probs: Tensor) -> None:
        """Put among the lessons what is not there yet: of the kept rows some were screened, and others kept by sign."""
        if self._lessons is None:
            return
        if self._told is None:
            self._told = self._inputs.advantages.new_zeros(self._inputs.total, dtype=torch.bool)
        new = (~self._told[rows]).nonzero().squeeze(1)
        if len(new) == 0:
            return
        self._told[rows] = True
        if len(new) < part.total:
            part, log_probs = part.take(new), log_probs[new]
        self._lessons.append((part.batch, log_probs.detach()))

    def _placed(self, into: Tensor | None, rows: Rows, columns: slice, log_probs: Tensor, total: int) -> Tensor:
        """Log-probs of some rows at their places among those of the whole batch."""
        inputs = self._inputs
        if isinstance(rows, slice) and total == inputs.total and columns == slice(None):
            return log_probs
        if into is None:
            whole = log_probs.shape[1:] if inputs.mask is None or log_probs.dim() == 1 else inputs.mask.shape[1:]
            into = log_probs.new_zeros((inputs.total, *whole))
        into[rows if log_probs.dim() == 1 else (rows, columns)] = log_probs.to(into)
        return into


def _terms(loss: Loss, log_probs: Tensor, part: Inputs, weight: Tensor | None) -> Tensor:
    """Weighted terms of the loss, 0 where the mask is 0."""
    log_probs = at_least_float32(valid(log_probs, part.mask))  # float16 has no sum above 65504
    known = part.log_probs if part.behavior_log_probs is None else part.behavior_log_probs
    terms = loss(log_probs, part.advantages, log_probs.detach() if known is None else known, part.mask)
    checks.tensor("the loss", terms, (), checks.FLOATING, "terms, one for each log-prob", log_probs)
    if terms.shape != log_probs.shape:
        raise ValueError(
            f"the loss has shape {tuple(terms.shape)}; expected that of log_probs, {tuple(log_probs.shape)}."
        )
    terms = valid(terms, part.mask)
    if weight is None:
        return terms
    weight = weight.to(terms.dtype)
    weight = weight if terms.dim() == 1 else weight.unsqueeze(1)
    return terms.where(weight != 0, 0) * weight


def _accumulation_steps(backward: Callable[[Tensor], Any]) -> int:
    """What accelerate's `backward` divides a loss by: steps of its own, where a call here is normalised already."""
    method = backward.func if isinstance(backward, partial) else backward
    accelerate = sys.modules.get("accelerate.accelerator")  # who has an Accelerator has imported it, so we need not
    if accelerate is None or not isinstance(method, MethodType):
        return 1
    own = method.__func__ is accelerate.Accelerator.backward
    return method.__self__.gradient_accumulation_steps if own else 1  # type: ignore[attr-defined]
