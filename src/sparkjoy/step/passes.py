"""The forward and backward passes of one call, in micro-batches; what is refused before it is differentiated."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sparkjoy import checks
from sparkjoy.draft import Draft
from sparkjoy.gates import Gate
from sparkjoy.gradients import Leaves, leaves, refuse_hooks
from sparkjoy.losses import Loss, reinforce
from sparkjoy.processes.ranks import Ranks
from sparkjoy.scores import ScoreFunction, at_least_float32, surprisal
from sparkjoy.signs import Rule
from sparkjoy.step.batches import Rows
from sparkjoy.step.counts import Counting
from sparkjoy.step.inputs import Inputs, LogProbFunction, finite_where_valid
from sparkjoy.step.packing import Packing

Normalizer = Literal["batch", "samples", "kept"] | float
STEPS_IN_HOOK = (
    "this batch may take several backward passes: the hook would run once in each, with a part of the gradient. Leave "
    "out micro_batch_size and micro_batch_tokens, or make them large enough for all rows; or step after the call "
    "instead of in a hook."
)


class Options(NamedTuple):
    """The options of `GatedBackward` that a step reads; what they mean is said there.

    Args:
        gate: None where it would keep everything.
        rule: what it says that signs decide for it.
        score: what it decides on.
        size: of a row's gradient in the loss, for a weighted gate.
        ranks: the processes that share the model.
    """

    gate: Gate | None
    rule: Rule | None
    score: ScoreFunction
    size: ScoreFunction | None
    draft: Draft | None
    loss: Loss
    normalizer: Normalizer
    packing: Packing
    backward: Callable[[Tensor], Any]
    ranks: Ranks


class Passes:
    """What one call runs.

    Args:
        log_prob_fn: `rows -> log-probs`, differentiable.
        inputs: the checked batch of this process.
        counting: counts every pass.
        options: say how.
        discrete: refuse log-probs above 0 that would be differentiated.
    """

    def __init__(
        self,
        log_prob_fn: LogProbFunction,
        inputs: Inputs,
        counting: Counting,
        options: Options,
        discrete: bool = False,
    ) -> None:
        self.log_prob_fn = log_prob_fn
        self.counting = counting
        self.inputs = inputs
        self.options = options
        self._discrete = discrete
        self._graph: tuple[Tensor | None, Inputs, Tensor] | None = None
        self._losses: list[Tensor] = []
        self._rounds = 0
        self._divisor: float | None = None

    def screen(self, rows: Tensor | None, draft: LogProbFunction | None = None) -> Tensor | None:
        """The log-probs of `rows` (None: all) without a graph, 0 elsewhere; None where there are no rows.

        From `draft`, or from the log-prob function itself. What is drawn inside stays drawn: with torch's random
        state put back, a thread that draws meanwhile, such as a sampler's, would draw the same numbers again.
        """
        packing, ranks = self.options.packing, self.options.ranks
        source, own = (self.log_prob_fn, True) if draft is None else (draft, False)
        parts = packing.divide(self.inputs, rows)
        rounds = ranks.most(len(parts))  # passes may be meetings, a draft's too where it runs a sharded policy
        found, seen = [], None
        with torch.no_grad(), ranks.screening():
            try:
                for number in range(rounds):
                    part_rows: Rows = parts[number] if number < len(parts) else slice(0, 1)  # a dummy, for the others
                    part, columns = packing.trimmed(self.inputs.take(part_rows))
                    work = partial(self.counting.screen, source, part, own)
                    found.append((part_rows, columns, ranks.forward(work) if own else work(), part))
            finally:
                # Older versions of torch keep weights that were cast in here, without a graph, for later passes.
                torch.clear_autocast_cache()
        for part_rows, columns, log_probs, part in found[: len(parts)]:
            log_probs = finite_where_valid("the screening forward pass: log_probs", log_probs, part.mask)
            seen = self._placed(seen, part_rows, columns, log_probs, part.total)
        self.counting.lap("screen")
        return seen

    def forward(self, rows: Tensor | None) -> Tensor:
        """The log-probs of `rows` (None: all), detached, 0 elsewhere, by one pass whose graph is held for later."""
        part_rows = slice(None) if rows is None else rows
        part, columns = self.options.packing.trimmed(self.inputs.take(part_rows))
        self.counting.lap("gather")
        log_probs = self.counting.forward(self.log_prob_fn, part)
        self._graph = rows, part, log_probs
        seen = finite_where_valid("the dense forward pass: log_probs", log_probs.detach(), part.mask)
        self.counting.lap("forward")
        return self._placed(None, part_rows, columns, seen, part.total)

    @property
    def holds_graph(self) -> bool:
        """Whether a forward pass was made before it was decided which of its rows to keep."""
        return self._graph is not None

    def differentiate_graph(self, weight: Tensor, rows: Tensor) -> None:
        """Add the gradient of the forward pass made before, each row times its weight (B,), 0 for those not kept."""
        assert self._graph is not None  # `holds_graph`
        of_graph, part, log_probs = self._graph
        self._rounds += 1
        with self._refusing_hooks(log_probs, 1, 1):
            self._add(log_probs, part, weight if of_graph is None else weight[of_graph], rows)

    def differentiate(
        self, rows: Tensor | None, weight: Tensor | None, kept_everywhere: int, watches: bool = False
    ) -> Tensor | None:
        """Forward and backward over the kept rows, each times its weight (None: 1).

        Args:
            rows: (n,) those that are kept here; None: all.
            weight: (B,), or None.
            kept_everywhere: rows to differentiate in all processes.
            watches: whether to return the log-probs that were differentiated, detached, 0 elsewhere.
        """
        packing, ranks, watched = self.options.packing, self.options.ranks, None
        if kept_everywhere == ranks.total(self.inputs.total):
            rows = None
        if packing.at_once and (rows is None or len(rows)):
            parts: list[Rows] = [slice(None) if rows is None else rows]
        else:
            parts = packing.divide(self.inputs, rows)
        rounds = ranks.rounds(len(parts), kept_everywhere)
        for number in range(1, rounds + 1):
            dummy = number > len(parts)  # other ranks have more, and wait for this one
            part_rows: Rows = slice(0, 1) if dummy else parts[number - 1]
            part, columns = self.inputs.take(part_rows), slice(None)
            if packing.trim is not None:
                part, columns = packing.trimmed(part)
            part_weight = None if weight is None else weight[part_rows]
            if dummy:
                part_weight = self.inputs.advantages.new_zeros(1)
            self.counting.lap("gather")
            log_probs = ranks.forward(partial(self.counting.forward, self.log_prob_fn, part))
            if watches and not dummy:
                values = valid(log_probs.detach(), part.mask)
                watched = self._placed(watched, part_rows, columns, values, part.total)
            where = f"micro-batch {number} of {rounds}"
            with self._refusing_hooks(log_probs, number, rounds):
                self._add(log_probs, part, part_weight, rows, where, last=number == rounds)
        self._rounds += rounds
        return watched

    def close(self) -> Tensor:
        """The loss of all processes, 0-dim and detached, when all passes are done."""
        losses = self._losses
        loss = losses[0] if len(losses) == 1 else sum(losses, start=self.inputs.advantages.new_zeros(()))
        return self.options.ranks.close(loss, self._rounds)

    def _add(
        self,
        log_probs: Tensor,
        part: Inputs,
        weight: Tensor | None,
        rows: Tensor | None,
        where: str = "the dense pass",
        last: bool = True,
    ) -> None:
        if self._divisor is None:
            self._divisor = self._divided_by(rows, log_probs)
        loss = loss_terms(self.options.loss, log_probs, part, weight).sum() / self._divisor
        value = loss.detach()
        self._check(loss, value, log_probs, part, where)
        self.counting.lap("forward")
        backward = self.options.backward
        steps = 1 if backward is torch.Tensor.backward else _accumulation_steps(backward)
        with self.options.ranks.backward(loss, last) as differentiable:
            self.counting.backward(backward, differentiable if steps == 1 else differentiable * steps)
        self.counting.lap("backward")
        self._losses.append(value)

    def _divided_by(self, rows: Tensor | None, log_probs: Tensor) -> float:
        """What this process divides by, whose gradients are then averaged; 1 where only masked tokens would count."""
        normalizer, ranks = self.options.normalizer, self.options.ranks
        if normalizer == "batch":
            count: float = max(1, ranks.sum(self.inputs.tokens(log_probs)))
        elif normalizer == "samples":
            count = ranks.total(self.inputs.total)
        elif normalizer == "kept":
            count = max(1, ranks.sum(self.inputs.tokens(log_probs, rows)))
        else:
            count = normalizer
        return count / ranks.size

    def _check(self, loss: Tensor, value: Tensor, log_probs: Tensor, part: Inputs, where: str) -> None:
        """Raise a ValueError that names the pass, before it is differentiated, if its gradient would be wrong."""
        if not log_probs.requires_grad:
            raise ValueError(
                "the log-prob function returned log-probs without a graph, so there is nothing to differentiate; "
                "compute them with gradients enabled, from parameters that require them."
            )
        if not loss.requires_grad:
            raise ValueError("the loss has no graph; expected terms computed from the log-probs it was given.")
        seen = log_probs.detach()
        if part.mask is None and self.options.loss is reinforce:  # infinite where a log-prob is: one number tells
            total, of_all = value.item(), 0.0
        else:  # finite with an infinite log-prob, and its gradient may not be
            total, of_all = checks.read(value, seen.sum(dtype=torch.promote_types(seen.dtype, torch.float32)))
        all_finite = math.isfinite(of_all) or bool(seen.isfinite().all())
        if not math.isfinite(total) or not (all_finite or bool(valid(seen, part.mask).isfinite().all())):
            raise ValueError(
                f"{where}: the loss is {total}, from log-probs between {seen.min().item():g} and "
                f"{seen.max().item():g}; expected finite numbers."
            )
        if self._discrete:
            try:
                surprisal(valid(seen, part.mask))
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
        if self.options.ranks.size == 1 and not all_finite:
            with self.counting.uncounted():
                _check_padding(log_probs, where)

    @contextmanager
    def _refusing_hooks(self, log_probs: Tensor, number: int, rounds: int) -> Iterator[None]:
        """Around the first backward pass: what steps within it is refused where a batch of this size may take several.

        Before `.grad` is touched, or, inside of a reentrant checkpoint, before the first such parameter's is.
        """
        packing, alone = self.options.packing, self.options.ranks.size == 1
        divides = alone and not packing.at_once and not packing.holds(self.inputs, self.inputs.total)
        several = rounds > 1 or divides
        if number > 1 or not several:
            yield
            return
        with Leaves(partial(refuse_hooks, why=STEPS_IN_HOOK)) as found:
            found.look(log_probs)
            yield

    def _placed(self, into: Tensor | None, rows: Rows, columns: slice, log_probs: Tensor, total: int) -> Tensor:
        """Log-probs of some rows at their places among those of the whole batch."""
        inputs = self.inputs
        if isinstance(rows, slice) and total == inputs.total and columns == slice(None):
            return log_probs
        if into is None:
            whole = log_probs.shape[1:] if inputs.mask is None or log_probs.dim() == 1 else inputs.mask.shape[1:]
            into = log_probs.new_zeros((inputs.total, *whole))
        into[rows if log_probs.dim() == 1 else (rows, columns)] = log_probs.to(into)
        return into


def valid(log_probs: Tensor, mask: Tensor | None) -> Tensor:
    """Log-probs, 0 where the mask is."""
    return log_probs if mask is None else log_probs.where(mask, 0)


def loss_terms(loss: Loss, log_probs: Tensor, part: Inputs, weight: Tensor | None) -> Tensor:
    """Weighted terms of the loss, 0 where the mask is 0."""
    mask = part.mask
    log_probs = at_least_float32(
        log_probs if mask is None else log_probs.where(mask, 0)
    )  # float16 has no sum above 65504
    known = part.log_probs if part.behavior_log_probs is None else part.behavior_log_probs
    terms = loss(log_probs, part.advantages, log_probs.detach() if known is None else known, mask)
    checks.tensor("the loss", terms, (), checks.FLOATING, "terms, one for each log-prob", log_probs)
    if terms.shape != log_probs.shape:
        raise ValueError(
            f"the loss has shape {tuple(terms.shape)}; expected that of log_probs, {tuple(log_probs.shape)}."
        )
    terms = terms if mask is None else terms.where(mask, 0)
    if weight is None:
        return terms
    weight = weight.to(terms.dtype)
    weight = weight if terms.dim() == 1 else weight.unsqueeze(1)
    return terms.where(weight != 0, 0) * weight


def _check_padding(log_probs: Tensor, where: str) -> None:
    """Raise a ValueError where padding that is no number would make the gradients of the rest NaN.

    By a backward pass of zeros, which leaves `.grad` alone, for the rare function that returns padding as NaN or
    infinite. Where a graph does not allow two, as a compiled function's, nothing is known, and that is refused too.
    """
    try:
        zeros = torch.zeros_like(log_probs)
        gradients = torch.autograd.grad(log_probs, leaves(log_probs), zeros, retain_graph=True, allow_unused=True)
        arrives = all(gradient is None or bool(gradient.isfinite().all()) for gradient in gradients)
    except RuntimeError:
        arrives = False
    if not arrives:
        raise ValueError(
            f"{where}: log-probs are NaN or infinite where the mask is 0, and the gradient of the others would "
            "be NaN with them (0 times NaN); replace the padding before it is computed with, as by "
            "logits.where(mask, 0), not afterwards."
        )


def _accumulation_steps(backward: Callable[[Tensor], Any]) -> int:
    """What accelerate's `backward` divides a loss by: steps of its own, where a call here is normalised already."""
    method = backward.func if isinstance(backward, partial) else backward
    accelerate = sys.modules.get("accelerate.accelerator")  # who has an Accelerator has imported it, so we need not
    if accelerate is None or not isinstance(method, MethodType):
        return 1
    own = method.__func__ is accelerate.Accelerator.backward
    return method.__self__.gradient_accumulation_steps if own else 1  # type: ignore[attr-defined]
