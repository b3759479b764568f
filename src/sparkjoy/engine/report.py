"""What one call of the engine did, counted from what ran."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from sparkjoy.engine.comparing import Comparison
from sparkjoy.engine.plan import Choice, Plan
from sparkjoy.gates import Decision


@dataclass(frozen=True)
class BackwardReport:
    """What one call did, counted from what ran.

    Under several processes decision, kept, total and loss are about the rows of all of them, in the order of the ranks,
    and the same everywhere; the counts of what ran, FLOPs and seconds are this process's.

    Args:
        decision: the gate's, about all rows; rows of zero advantage are never kept below rate 1.
        kept: rows kept.
        total: rows given.
        loss: 0-dim, detached, normalised as asked; 0 when nothing is kept.
        noise: what a weighted gate's draws added to the second moment of the gradient, over the batch's own (see
            `sparkjoy.noise`); estimated on the exact sizes of the kept rows where the gate decided on others. None for
            other gates.
        comparison: of the gated gradient with the dense one, under `compare_every`; None at other steps, and where
            every row is kept anyway. What it ran is counted there alone.
        screened_rows: rows whose log-probs were computed to decide, without a graph.
        forward_rows: rows that went through `log_prob_fn`, screening included.
        backward_rows: rows whose gradient arrived at what `log_prob_fn` returned.
        screened_tokens: as the rows, in tokens that the mask counts; equal to the rows for (B,) log-probs.
        forward_tokens: likewise.
        backward_tokens: likewise.
        forward_flops: FLOPs of all forward passes; None when not counted.
        backward_flops: FLOPs of all backward passes; None when not counted.
        seconds: host seconds by phase: screen (deciding included), gather, forward, backward.
        choice: the plan and the counts it was chosen by.
    """

    decision: Decision
    kept: int
    total: int
    loss: Tensor
    noise: float | None
    comparison: Comparison | None
    screened_rows: int
    forward_rows: int
    backward_rows: int
    screened_tokens: int
    forward_tokens: int
    backward_tokens: int
    forward_flops: int | None
    backward_flops: int | None
    seconds: dict[str, float]
    choice: Choice = field(repr=False)

    @property
    def plan(self) -> Plan:
        """Which way to the gradient was taken: "known", "signs", "screen" or "dense"."""
        return self.choice.plan

    @property
    def reason(self) -> str:
        """Why, in a sentence."""
        return self.choice.reason

    @property
    def flops(self) -> int | None:
        """FLOPs of all passes; None when not counted."""
        if self.forward_flops is None or self.backward_flops is None:
            return None
        return self.forward_flops + self.backward_flops
