"""The forward and backward passes of one call, in micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from sparkjoy import checks
from sparkjoy.engine.batches import Rows
from sparkjoy.engine.hooks import check_nothing_steps, leaves
from sparkjoy.engine.inputs import Inputs, finite_where_valid
from sparkjoy.engine.ledger import Ledger
from sparkjoy.engine.packing import AT_ONCE, Packing
from sparkjoy.engine.processes.ranks import ALONE, Ranks
from sparkjoy.engine.screening import LogProbFunction, screening
from sparkjoy.losses import Loss, reinforce
from sparkjoy.scores import at_least_float32, surprisal

Normalizer = Literal["batch", "samples", "kept"] | float


def checked_normalizer(normalizer: Any) -> Normalizer:
    """One of the words, or a number above 0."""
    if isinstance(normalizer, str) and normalizer in ("batch", "samples", "kept"):
        return normalizer  # type: ignore[return-value]
    expected = "'batch', 'samples', 'kept' or a number above 0"
    return checks.number("normalizer", normalizer, expected, lambda divisor: divisor > 0)


@dataclass(frozen=True)
class Graph:
    """Differentiable log-probs of some rows, made before it was decided which of them to keep."""

    rows: Tensor
    part: Inputs
    log_probs: Tensor


class Passes:
    """What one call runs, and what it has seen of the log-probs on the way.

    Args:
        log_prob_fn: `rows -> log-probs`, differentiable.
        inputs: the checked batch of this process.
        ledger: counts every pass.
        loss: as `GatedBackward`'s.
        normalizer: as `GatedBackward`'s.
        packing: how rows are divided into micro-batches.
        backward: as `GatedBackward`'s.
        ranks: the processes that run as many passes each.
        watches: whether `differentiated` is to be filled.
        discrete: refuse log-probs above 0 that would be differentiated.
    """

    def __init__(
        self,
        log_prob_fn: LogProbFunction,
        inputs: Inputs,
        ledger: Ledger,
        loss: Loss = reinforce,
        normalizer: Normalizer = "batch",
        packing: Packing = AT_ONCE,
        backward: Callable[[Tensor], Any] = torch.Tensor.backward,
        ranks: Ranks = ALONE,
        watches: bool = False,
        discrete: bool = False,
    ) -> None:
        self.log_prob_fn = log_prob_fn
        self.inputs = inputs
        self.ledger = ledger
        self.loss = loss
        self.normalizer = normalizer
        self.packing = packing
        self.backward = backward
        self.ranks = ranks
        self.discrete = discrete
        self.seen: Tensor | None = None
        """Log-probs that were computed to decide on, 0 elsewhere; None: none were."""
        self.differentiated: Tensor | None = None
        """Log-probs of the rows differentiated, detached, 0 elsewhere; None: none were, or nobody asked."""
        self._watches = watches
        self._losses: list[Tensor] = []
        self._rounds = 0
        self._divisor: float | None = None

    def screen(self, rows: Tensor | None, draft: LogProbFunction | None = None) -> None:
        """See the log-probs of `rows` (None: all) without a graph, from `draft` or from the log-prob function itself.

        The training stream's random state is left alone.
        """
        source, own = (self.log_prob_fn, True) if draft is None else (draft, False)
        parts = self.packing.divide(self.inputs, rows)
        rounds = self.ranks.most(len(parts))  # a rank with fewer runs fillers: the others wait for it
        seen = []
        with screening(self.inputs.advantages.device), self.ranks.screening():
            for part_rows in parts:
                part, columns = self.packing.trimmed(self.inputs.take(part_rows))
                seen.append((part_rows, columns, self._screened(source, part, own), part))
            for _ in range(rounds - len(parts)):
                self._screened(source, self._filler(), own)
        for found in seen:
            self._see("the screening forward pass", *found)
        self.ledger.lap("screen")

    def forward(self, rows: Tensor | None) -> Graph:
        """Differentiable log-probs of `rows` (None: all) in one pass."""
        part_rows = slice(None) if rows is None else rows
        part, columns = self.packing.trimmed(self.inputs.take(part_rows))
        self.ledger.lap("gather")
        log_probs = self.ledger.forward(self.log_prob_fn, part)
        self._see("the dense forward pass", part_rows, columns, log_probs.detach(), part)
        self.ledger.lap("forward")
        return Graph(torch.arange(self.inputs.total) if rows is None else rows, part, log_probs)

    def differentiate_graph(self, graph: Graph, weight: Tensor, keep: Tensor) -> None:
        """Add the gradient of a forward pass made before, each row times its weight (B,)."""
        self._rounds += 1
        self._check_hooks(graph.log_probs, 1)
        self._add(graph.log_probs, graph.part, weight[graph.rows], self._divide_by(self.inputs, keep, graph.log_probs))

    def differentiate(
        self,
        inputs: Inputs,
        rows: Tensor | None,
        weight: Tensor | None,
        keep: Tensor,
        kept_everywhere: int,
    ) -> None:
        """Forward and backward over `rows` (None: all) of `inputs`, each times its weight (None: 1).

        Args:
            inputs: the rows this process works on.
            rows: indices (n,).
            weight: one for every row of `inputs`, or None.
            keep: bool, one for every row of `inputs`: what the normalizer "kept" counts.
            kept_everywhere: rows to differentiate in all processes.
        """
        parts = self.packing.divide(inputs, rows)
        rounds = self.ranks.rounds(len(parts), kept_everywhere)
        for number in range(1, rounds + 1):
            part_weight = None
            if number > len(parts):  # other ranks have more, and wait for this one
                part, part_weight = self._filler(), self.inputs.advantages.new_zeros(1)
            else:
                part_rows = parts[number - 1]
                part, columns = self.packing.trimmed(inputs.take(part_rows))
                part_weight = None if weight is None else weight[part_rows]
            self.ledger.lap("gather")
            log_probs = self.ranks.forward(partial(self.ledger.forward, self.log_prob_fn, part))
            if self._watches and number <= len(parts):
                values = _valid(log_probs.detach(), part.mask)
                self.differentiated = self._placed(self.differentiated, part_rows, columns, values, part.total)
            divisor = self._divide_by(inputs, keep, log_probs)
            if number == 1:
                self._check_hooks(log_probs, rounds)
            where = f"micro-batch {number} of {rounds}"
            self._add(log_probs, part, part_weight, divisor, where, last=number == rounds)
        self._rounds += rounds

    def close(self) -> Tensor:
        """The loss of all processes, 0-dim and detached, when all passes are done."""
        losses = self._losses
        loss = losses[0] if len(losses) == 1 else sum(losses, start=self.inputs.advantages.new_zeros(()))
        return self.ranks.close(loss, self._rounds)

    def _add(
        self,
        log_probs: Tensor,
        part: Inputs,
        weight: Tensor | None,
        divisor: float,
        where: str = "the dense pass",
        last: bool = True,
    ) -> None:
        loss = self._terms(log_probs, part, weight).sum() / divisor
        _check_graph(loss, log_probs)
        self._check(loss, log_probs, part, where)
        self.ledger.lap("forward")
        steps = _accumulation_steps(self.backward)
        with self.ranks.backward(loss, last) as differentiable:
            self.ledger.backward(self.backward, differentiable if steps == 1 else differentiable * steps, part)
        self.ledger.lap("backward")
        self._losses.append(loss.detach())

    def _check_hooks(self, log_probs: Tensor, rounds: int) -> None:
        """Refuse what steps within a backward pass, at once where a batch of this size may take several."""
        if rounds > 1 or (self.ranks.size == 1 and not self.packing.holds(self.inputs, self.inputs.total)):
            check_nothing_steps(log_probs)

    def _check(self, loss: Tensor, log_probs: Tensor, part: Inputs, where: str) -> None:
        """Raise a ValueError that names the pass, before it is differentiated, if its gradient would be wrong."""
        alone = self.ranks.size == 1  # several see to `.grad` themselves
        # A bounded loss is finite with an infinite log-prob, and its gradient may not be: both are read, at once.
        seen = log_probs.detach()
        if part.mask is None and self.loss is reinforce:  # it has no bound
            total, of_all = loss.item(), 0.0
        else:
            precise = torch.promote_types(loss.dtype, torch.float32)
            total, of_all = torch.stack((loss.detach().to(precise), seen.sum(dtype=precise))).tolist()
        all_finite = math.isfinite(of_all) or bool(seen.isfinite().all())
        if not math.isfinite(total) or not (all_finite or bool(_valid(seen, part.mask).isfinite().all())):
            advice = " Earlier micro-batches have added to .grad: zero it." if alone and self._losses else ""
            raise ValueError(
                f"{where}: the loss is {total}, from log-probs between {seen.min().item():g} and "
                f"{seen.max().item():g}; expected finite numbers.{advice}"
            )
        if self.discrete:
            try:
                surprisal(_valid(log_probs.detach(), part.mask))
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
        if alone and not all_finite:
            rows, tokens = self.ledger.backward_rows, self.ledger.backward_tokens
            sound = _zero_arrives(log_probs)
            self.ledger.backward_rows, self.ledger.backward_tokens = rows, tokens
            if not sound:
                raise ValueError(
                    f"{where}: log-probs are NaN or infinite where the mask is 0, and the gradient of the others would "
                    "be NaN with them (0 times NaN); replace the padding before it is computed with, as by "
                    "logits.where(mask, 0), not afterwards."
                )

    def _screened(self, source: LogProbFunction, part: Inputs, own: bool) -> Tensor:
        work = partial(self.ledger.screen, source, part, own)
        return self.ranks.forward(work) if own else work()  # the model's passes may be meetings, a draft's are not

    def _filler(self) -> Inputs:
        """A row to run at weight zero."""
        return self.packing.trimmed(self.inputs.take(slice(0, 1)))[0]

    def _see(self, what: str, rows: Rows, columns: slice, log_probs: Tensor, part: Inputs) -> None:
        log_probs = finite_where_valid(f"{what}: log_probs", log_probs, part.mask)
        self.seen = self._placed(self.seen, rows, columns, log_probs, part.total)

    def _placed(self, into: Tensor | None, rows: Rows, columns: slice, log_probs: Tensor, total: int) -> Tensor:
        """Log-probs of some rows at their places among those of the whole batch."""
        if isinstance(rows, slice) and total == self.inputs.total and columns == slice(None):
            return log_probs
        if into is None:
            width = () if log_probs.dim() == 1 else (self._width(log_probs),)
            into = log_probs.new_zeros((self.inputs.total, *width))
        into[rows if log_probs.dim() == 1 else (rows, columns)] = log_probs
        return into

    def _width(self, log_probs: Tensor) -> int:
        return log_probs.shape[1] if self.inputs.mask is None else self.inputs.mask.shape[1]

    def _terms(self, log_probs: Tensor, rows: Inputs, weight: Tensor | None) -> Tensor:
        """Weighted terms of the loss, 0 where the mask is 0."""
        if rows.mask is not None:
            log_probs = log_probs.where(rows.mask, 0)
        log_probs = at_least_float32(log_probs)  # float16 has no sum above 65504
        known = rows.log_probs if rows.behavior_log_probs is None else rows.behavior_log_probs
        terms = self.loss(log_probs, rows.advantages, log_probs.detach() if known is None else known, rows.mask)
        checks.tensor("the loss", terms, (), checks.FLOATING, "terms, one for each log-prob", log_probs)
        if terms.shape != log_probs.shape:
            raise ValueError(
                f"the loss has shape {tuple(terms.shape)}; expected that of log_probs, {tuple(log_probs.shape)}."
            )
        if rows.mask is not None:
            terms = terms.where(rows.mask, 0)
        if weight is None:
            return terms
        weight = weight.to(terms.dtype)
        weight = weight if terms.dim() == 1 else weight.unsqueeze(1)
        return terms.where(weight != 0, 0) * weight

    def _divide_by(self, inputs: Inputs, keep: Tensor, log_probs: Tensor) -> float:
        """What the sum of the terms is divided by; a count of 0, with nothing but masked tokens, divides by 1."""
        if self._divisor is None:
            self._divisor = self._count(inputs, keep, log_probs) / self.ranks.size  # processes average gradients
        return self._divisor

    def _count(self, inputs: Inputs, keep: Tensor, log_probs: Tensor) -> float:
        if self.normalizer == "batch":
            return max(1, self.ranks.sum(self.inputs.tokens(log_probs)))
        if self.normalizer == "samples":
            return self.ranks.total(self.inputs.total)
        if self.normalizer == "kept":
            if inputs.row_tokens is not None:
                return max(1, self.ranks.sum(int(inputs.row_tokens[keep.cpu()].sum())))
            width = log_probs.shape[1] if log_probs.dim() == 2 else 1
            return max(1, self.ranks.sum(int(keep.count_nonzero()) * width))
        return self.normalizer


def _valid(log_probs: Tensor, mask: Tensor | None) -> Tensor:
    return log_probs if mask is None else log_probs.where(mask, 0)


def _check_graph(loss: Tensor, log_probs: Tensor) -> None:
    if not log_probs.requires_grad:
        raise ValueError(
            "the log-prob function returned log-probs without a graph, so there is nothing to differentiate; compute "
            "them with gradients enabled, from parameters that require them."
        )
    if not loss.requires_grad:
        raise ValueError("the loss has no graph; expected terms computed from the log-probs it was given.")


def _zero_arrives(log_probs: Tensor) -> bool:
    """Whether a gradient of 0 at `log_probs` stays a number on its way to the leaves, whose `.grad` is left alone.

    A backward pass of its own, for the rare function that returns padding as NaN or infinite. Where a graph does not
    allow two, as a compiled function's, nothing is known, and the answer is no.
    """
    try:
        zeros = torch.zeros_like(log_probs)
        gradients = torch.autograd.grad(log_probs, list(leaves(log_probs)), zeros, retain_graph=True, allow_unused=True)
    except RuntimeError:
        return False
    return all(gradient is None or bool(gradient.isfinite().all()) for gradient in gradients)


def _accumulation_steps(backward: Callable[[Tensor], Any]) -> int:
    """What accelerate's `backward` divides a loss by: steps of its own, where a call here is normalised already."""
    accelerator = getattr(getattr(backward, "func", backward), "__self__", None)
    steps = getattr(accelerator, "gradient_accumulation_steps", 1)
    return steps if isinstance(steps, int) else 1
