"""What a run's audits have found about its draft so far: the "screening" of its records."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from sparkjoy_lab.drafts.drafted import Drafting


@dataclass
class AuditTally:
    """Sums over the run; those named "since" start anew at every record."""

    steps: int = 0
    proposed: int = 0
    learn_seconds: float = 0.0
    audits: int = 0
    recall: float = 0.0
    draft_recall: float = 0.0
    audits_since: int = 0
    recall_since: float = 0.0
    ranked: int = 0
    spearman: float = 0.0
    timed: int = 0
    draft_seconds: float = 0.0
    exact_seconds: float = 0.0
    draft_flops: int = 0
    exact_flops: int = 0
    exact: bool = False

    def stepped(self, drafting: Drafting) -> None:
        """Count a step, and what its audit found, if it had one."""
        self.steps += 1
        self.proposed += drafting.proposed
        self.learn_seconds += drafting.learn_seconds
        self.exact = drafting.exact
        found = drafting.audit
        if found is None:
            return
        self.audits += 1
        self.audits_since += 1
        self.recall += found.recall
        self.draft_recall += found.draft_recall
        self.recall_since += found.recall
        if not math.isnan(found.spearman):
            self.ranked += 1
            self.spearman += found.spearman
        if found.draft_seconds is not None and found.exact_seconds is not None:
            self.timed += 1
            self.draft_seconds += found.draft_seconds
            self.exact_seconds += found.exact_seconds
        self.draft_flops += found.draft_flops or 0
        self.exact_flops += found.exact_flops or 0

    def record(self) -> dict[str, Any] | None:
        """Means over the run, and the recall since the last record too, so that a draft gone bad shows."""
        if not self.steps:
            return None
        learning = _ratio(self.learn_seconds, self.steps)
        forward = _ratio(self.exact_seconds, self.timed)
        record = {
            "recall": _ratio(self.recall, self.audits),
            "draft_recall": _ratio(self.draft_recall, self.audits),
            "recall_since": _ratio(self.recall_since, self.audits_since),
            "spearman": _ratio(self.spearman, self.ranked),
            "proposed": _ratio(self.proposed, self.steps),
            "seconds_over_forward": _ratio(self.draft_seconds, self.exact_seconds),
            "learn_over_forward": learning / forward if learning is not None and forward else None,
            "flops_over_forward": _ratio(self.draft_flops, self.exact_flops),
            "audits": self.audits,
            "exact": self.exact,
        }
        self.audits_since, self.recall_since = 0, 0.0
        return record

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


def _ratio(above: float, below: float) -> float | None:
    return above / below if below else None
