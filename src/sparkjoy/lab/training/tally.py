"""What a run has done so far, counted: the numbers of its records."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparkjoy.engine.report import BackwardReport
from sparkjoy.lab.training.audits import AuditTally
from sparkjoy.lab.training.comparing import ComparisonTally
from sparkjoy.lab.training.processes import Share

COUNTED_BY_EACH = (
    "samples",
    "forward_samples",
    "backward_samples",
    "forward_tokens",
    "backward_tokens",
    "forward_flops",
    "backward_flops",
    "compared_samples",
)


@dataclass
class Tally:
    """Cumulative counts and seconds of a run, and what has come in since its last record."""

    samples: int = 0
    kept: int = 0
    forward_samples: int = 0
    backward_samples: int = 0
    forward_tokens: int = 0
    backward_tokens: int = 0
    forward_flops: int = 0
    backward_flops: int = 0
    compared_samples: int = 0
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("sample", "screen", "backward", "optimizer", "total"), 0.0)
    )
    price_sum: float = 0.0
    priced_steps: int = 0
    reward_sum: float = 0.0
    steps_since: int = 0
    audits: AuditTally = field(default_factory=AuditTally)
    comparisons: ComparisonTally = field(default_factory=ComparisonTally)

    def sampled(self, rows: int, tokens: int, flops: int, reward: Tensor) -> None:
        """Count a rollout of `rows`; its forward pass counts too."""
        self.samples += rows
        self.forward_samples += rows
        self.forward_tokens += tokens
        self.forward_flops += flops
        self.reward_sum += reward.item()
        self.steps_since += 1

    def stepped(self, report: BackwardReport, forward_is_the_rollouts: bool) -> None:
        """Count a backward step; the rollout's own forward pass, where that was differentiated, is counted already."""
        self.kept += report.kept
        if not forward_is_the_rollouts:
            self.forward_samples += report.forward_rows
            self.forward_tokens += report.forward_tokens
        self.backward_samples += report.backward_rows
        self.backward_tokens += report.backward_tokens
        self.forward_flops += report.forward_flops or 0
        self.backward_flops += report.backward_flops or 0
        self.seconds["screen"] += report.seconds["screen"]
        self.seconds["backward"] += sum(report.seconds[phase] for phase in ("gather", "forward", "backward"))
        if report.drafting is not None:
            self.audits.stepped(report.drafting)
        if report.comparison is not None:
            self.comparisons.stepped(report.comparison)
            self.compared_samples += report.comparison.backward_rows
        if report.decision.price is not None:
            self.price_sum += report.decision.price.item()
            self.priced_steps += 1

    def hand_over(self, share: Share) -> None:
        """Give what the processes have counted to the first; the others start anew.

        What was kept and its price, every process knows of all rows; seconds are the first one's.
        """
        if share.count == 1:
            return
        sums = share.reduce([getattr(self, name) for name in COUNTED_BY_EACH])
        for name, value in zip(COUNTED_BY_EACH, sums, strict=True):
            setattr(self, name, int(value))
        mean = share.mean(torch.tensor(self.reward_sum, dtype=torch.float64))
        self.reward_sum = mean.item()
        if not share.first:
            self.price_sum, self.priced_steps, self.reward_sum, self.steps_since = 0.0, 0, 0.0, 0

    def record(self) -> dict[str, Any]:
        """The counts, the mean price and reward since the last record; starts the next one."""
        comparison = self.comparisons.record()
        record = {
            "reward": self.reward_sum / max(1, self.steps_since),
            "price": self.price_sum / self.priced_steps if self.priced_steps else None,
            "samples": self.samples,
            "kept": self.kept,
            "forward_samples": self.forward_samples,
            "backward_samples": self.backward_samples,
            "forward_tokens": self.forward_tokens,
            "backward_tokens": self.backward_tokens,
            "forward_flops": self.forward_flops,
            "backward_flops": self.backward_flops,
            "seconds": dict(self.seconds),
            "screening": self.audits.record(),
            "comparison": comparison and {**comparison, "backward_samples": self.compared_samples},
        }
        self.price_sum, self.priced_steps, self.reward_sum, self.steps_since = 0.0, 0, 0.0, 0
        return record

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            if name in ("audits", "comparisons"):
                getattr(self, name).load_state_dict(value)
            else:
                setattr(self, name, value)
