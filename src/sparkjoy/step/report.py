"""What one call of the engine did, counted from what ran."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from sparkjoy.gates import Decision
from sparkjoy.gradients import Comparison
from sparkjoy.step.counts import Counts, Plan


@dataclass(frozen=True, kw_only=True)
class BackwardReport(Counts):
    """What one call did: the `Counts` of what ran, and what was decided.

    Under several processes decision, kept, total and loss are about the rows of all of them, in the order of the ranks,
    and the same everywhere; the counts of what ran and seconds are this process's.

    >>> import torch, sparkjoy as sj
    >>> logits = torch.zeros(4, 2, requires_grad=True)
    >>> advantages = torch.tensor([1.0, -1.0, 3.0, 0.0])
    >>> report = sj.gated_backward(lambda rows: logits.log_softmax(1)[rows, 0], torch.arange(4), advantages, None)
    >>> report.kept, report.forward_rows, report.backward_rows, report.plan
    (4, 4, 4, 'dense')
    >>> print(report)
    dense: 4 of 4 rows kept; 4 rows forward (0 to decide), 4 backward; loss 0.52

    Args:
        decision: the gate's, about all rows; rows of zero advantage are never kept below rate 1.
        kept: rows kept.
        total: rows given.
        loss: 0-dim, detached, normalised as asked; 0 when nothing is kept.
        noise: what a weighted gate's draws added to the second moment of the gradient, over the batch's own (see
            `sparkjoy.noise`); estimated on the exact sizes of the kept rows where the gate decided on others. None for
            other gates.
        proposed: rows that went on to the gate, by a draft or by their sign; without verification, the kept ones. None:
            there is no draft.
        comparison: of the gated gradient with the dense one, under `compare_every`; None at other steps, and where
            every row is kept anyway. What it ran is counted there alone.
        seconds: host seconds by phase: screen (deciding included), gather, forward, backward.
        plan: how the gate came to know what it decided on: "known", "signs", "draft", "screen" or "dense".
        reason: why that was the cheapest way, in a sentence.
    """

    decision: Decision
    kept: int
    total: int
    loss: Tensor
    noise: float | None
    proposed: int | None
    comparison: Comparison | None
    seconds: dict[str, float]
    plan: Plan
    reason: str = field(repr=False)

    def __str__(self) -> str:
        """One line; `repr` shows everything."""
        noise = "" if self.noise is None else f"; noise {self.noise:.2g}"
        draft = "" if self.proposed is None else f"; {self.proposed} proposed by a draft"
        return (
            f"{self.plan}: {self.kept} of {self.total} rows kept{draft}; {self.forward_rows} rows forward "
            f"({self.screened_rows} to decide), {self.backward_rows} backward; loss {self.loss.item():.3g}{noise}"
        )
