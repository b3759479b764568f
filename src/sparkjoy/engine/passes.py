"""The forward and backward passes of one call, in micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from sparkjoy.engine.inputs import Inputs, finite_where_valid
from sparkjoy.engine.ledger import Ledger
from sparkjoy.engine.packing import Packing
from sparkjoy.engine.ranks import Ranks
from sparkjoy.engine.screening import LogProbFunction, screening
from sparkjoy.engine.survivors import Rows
from sparkjoy.losses import Loss

Normalizer = Literal["batch", "samples", "kept"] | float


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
        inputs: the checked batch.
        ledger: counts every pass.
        loss: as `GatedBackward`'s.
        normalizer: as `GatedBackward`'s.
        packing: how rows are divided into micro-batches.
        backward: as `GatedBackward`'s.
        ranks: the processes that run them together.
    """

    def __init__(
        self,
        log_prob_fn: LogProbFunction,
        inputs: Inputs,
        ledger: Ledger,
        loss: Loss,
        normalizer: Normalizer,
        packing: Packing,
        backward: Callable[[Tensor], Any],
        ranks: Ranks,
    ) -> None:
        self.log_prob_fn = log_prob_fn
        self.inputs = inputs
        self.ledger = ledger
        self.loss = loss
        self.normalizer = normalizer
        self.packing = packing
        self.backward = backward
        self.ranks = ranks
        self.seen: Tensor | None = None
        self.total_loss: Tensor | None = None
        self._divisor: float | None = None

    def screen(self, rows: Tensor | None, draft: LogProbFunction | None = None) -> None:
        """See the log-probs of `rows` (None: all) without a graph, from `draft` or from the log-prob function itself.

        The training stream's random state is left alone.
        """
        source = self.log_prob_fn if draft is None else draft
        parts = self.ranks.evened(self.packing.divide(self.inputs, rows))
        with screening(self.inputs.advantages.device), self.ranks.screening():
            for part_rows in parts:
                part, columns = self._part(self.inputs, part_rows)
                log_probs = self.ledger.screen(source, part, own=draft is None)
                if part_rows is not None:
                    see = partial(self._see, "the screening forward pass", part_rows, columns, log_probs, part)
                    self.ranks.hold(see)
        self.ledger.lap("screen")

    def forward(self, rows: Tensor | None) -> Graph:
        """Differentiable log-probs of `rows` (None: all) in one pass."""
        part_rows = slice(None) if rows is None else rows
        part, columns = self._part(self.inputs, part_rows)
        self.ledger.lap("gather")
        log_probs = self.ledger.forward(self.log_prob_fn, part)
        self._see("the dense forward pass", part_rows, columns, log_probs.detach(), part)
        self.ledger.lap("forward")
        return Graph(torch.arange(self.inputs.total) if rows is None else rows, part, log_probs)

    def differentiate_graph(self, graph: Graph, weight: Tensor, keep: Tensor) -> None:
        """Add the gradient of a forward pass made before, each row times its weight (B,)."""
        self._add(graph.log_probs, graph.part, weight[graph.rows], keep, "the dense pass")

    def differentiate(
        self,
        rows: Tensor | None,
        weight: Tensor | None,
        keep: Tensor,
        weigh_seen: Callable[[Rows], Tensor] | None = None,
        dealt: Inputs | None = None,
    ) -> None:
        """Forward and backward over `rows` (None: all), each times its weight (B,) (None: 1).

        Args:
            rows: indices (n,).
            weight: (B,), or None.
            keep: (B,) bool, what the normalizer "kept" counts.
            weigh_seen: for rows whose log-probs were not known: `rows -> weights`, asked once they are.
            dealt: the rows to take, where they are not this process's own.
        """
        inputs = self.inputs if dealt is None else dealt
        parts = self.ranks.evened(self.packing.divide(inputs, rows))
        for number, part_rows in enumerate(parts, start=1):
            with self.ranks.micro_batch(last=number == len(parts)):
                part, columns = self._part(inputs, part_rows)
                self.ledger.lap("gather")
                log_probs = self.ranks.forward(partial(self.ledger.forward, self.log_prob_fn, part))
                if part_rows is None:
                    part_weight: Tensor | None = part.advantages.new_zeros(1)
                else:
                    part_weight = None if weight is None else weight[part_rows]
                    if weigh_seen is not None:
                        self._see(f"micro-batch {number}", part_rows, columns, log_probs.detach(), part)
                        part_weight = weigh_seen(part_rows)
                self._add(log_probs, part, part_weight, keep, f"micro-batch {number} of {len(parts)}")

    def _part(self, inputs: Inputs, rows: Rows | None) -> tuple[Inputs, slice]:
        """A micro-batch without needless padding, and its columns; None: a filler of one row."""
        return self.packing.trimmed(self.inputs.take(slice(0, 1)) if rows is None else inputs.take(rows))

    def _add(self, log_probs: Tensor, part: Inputs, weight: Tensor | None, keep: Tensor, where: str) -> None:
        if self._divisor is None:
            self._divisor = self._count(keep, log_probs) / self.ranks.size  # gradients are averaged
        loss = self._terms(log_probs, part, weight).sum() / self._divisor
        self._check_graph(loss, log_probs)
        self.ranks.hold(partial(self._check_finite, loss, log_probs, where))
        self.ledger.lap("forward")
        self.ledger.backward(self.backward, loss, part)
        self.ledger.lap("backward")
        self.total_loss = loss.detach() if self.total_loss is None else self.total_loss + loss.detach()

    def _see(self, what: str, rows: Rows, columns: slice, log_probs: Tensor, part: Inputs) -> None:
        log_probs = finite_where_valid(f"{what}: log_probs", log_probs, part.mask)
        if part.total == self.inputs.total and columns == slice(None):
            self.seen = log_probs
            return
        if self.seen is None:
            width = () if log_probs.dim() == 1 else (self._width(log_probs),)
            self.seen = log_probs.new_zeros((self.inputs.total, *width))
        if log_probs.dim() == 1:
            self.seen[rows] = log_probs
        else:
            self.seen[rows, columns] = log_probs

    def _width(self, log_probs: Tensor) -> int:
        return log_probs.shape[1] if self.inputs.mask is None else self.inputs.mask.shape[1]

    def _terms(self, log_probs: Tensor, rows: Inputs, weight: Tensor | None) -> Tensor:
        """Weighted terms of the loss, 0 where the mask is 0."""
        if rows.mask is not None:
            log_probs = log_probs.where(rows.mask, 0)
        known = rows.log_probs if rows.behavior_log_probs is None else rows.behavior_log_probs
        terms = self.loss(log_probs, rows.advantages, log_probs.detach() if known is None else known, rows.mask)
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

    def _count(self, keep: Tensor, log_probs: Tensor) -> float:
        """What the sum of the terms is divided by; a count of 0, with nothing but masked tokens, divides by 1."""
        if self.normalizer == "batch":
            count = self.inputs.tokens(log_probs)
        elif self.normalizer == "samples":
            count = self.inputs.total
        elif self.normalizer != "kept":
            return self.normalizer
        elif self.inputs.row_tokens is not None:
            count = int(self.inputs.row_tokens[keep.cpu()].sum())
        else:
            count = int(keep.count_nonzero()) * (log_probs.shape[1] if log_probs.dim() == 2 else 1)
        return max(1, self.ranks.sum(count))

    def _check_graph(self, loss: Tensor, log_probs: Tensor) -> None:
        if not log_probs.requires_grad:
            raise ValueError(
                "the log-prob function returned log-probs without a graph, so there is nothing to differentiate; "
                "compute them with gradients enabled, from parameters that require them."
            )
        if not loss.requires_grad:
            raise ValueError("the loss has no graph; expected terms computed from the log-probs it was given.")

    def _check_finite(self, loss: Tensor, log_probs: Tensor, where: str) -> None:
        if not math.isfinite(loss.item()):
            raise ValueError(
                f"{where}: the loss is {loss.item()}, from log-probs between {log_probs.min().item():g} and "
                f"{log_probs.max().item():g}; expected finite numbers. Earlier micro-batches have added to .grad: zero "
                "it."
            )
