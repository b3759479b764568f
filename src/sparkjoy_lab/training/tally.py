"""What a run has done so far, counted: the numbers of its records."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sparkjoy.step.counts import Counts
from sparkjoy.step.report import BackwardReport
from sparkjoy_lab.drafts.drafted import Drafting
from sparkjoy_lab.flops import CountedFlops
from sparkjoy_lab.training.audits import AuditTally
from sparkjoy_lab.training.comparing import ComparisonTally
from sparkjoy_lab.training.processes import Share


@dataclass
class Tally:
    """Cumulative counts and seconds of a run, and what has come in since its last record."""

    samples: int = 0
    kept: int = 0
    ran: Counts = field(default_factory=Counts)
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
        self.ran += Counts(forward_rows=rows, forward_tokens=tokens)
        self.forward_flops += flops
        self.reward_sum += reward.item()
        self.steps_since += 1

    def stepped(
        self, report: BackwardReport, flops: CountedFlops, drafting: Drafting | None, forward_is_the_rollouts: bool
    ) -> None:
        """Count a backward step; the rollout's own forward pass, where that was differentiated, is counted already."""
        self.kept += report.kept
        self.ran += replace(report, forward_rows=0, forward_tokens=0) if forward_is_the_rollouts else report
        self.forward_flops += flops.forward_flops
        self.backward_flops += flops.backward_flops
        self.seconds["screen"] += report.seconds["screen"]
        self.seconds["backward"] += sum(report.seconds[phase] for phase in ("gather", "forward", "backward"))
        if drafting is not None:
            self.audits.stepped(drafting)
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
        ran = asdict(self.ran)
        own = [self.samples, self.compared_samples, self.forward_flops, self.backward_flops]
        everyones = map(int, share.reduce([*own, *ran.values()]))
        self.samples, self.compared_samples, self.forward_flops, self.backward_flops, *sums = everyones
        self.ran = Counts(**dict(zip(ran, sums, strict=True)))
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
            "forward_samples": self.ran.forward_rows,
            "backward_samples": self.ran.backward_rows,
            "forward_tokens": self.ran.forward_tokens,
            "backward_tokens": self.ran.backward_tokens,
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
            elif name == "ran":
                self.ran = Counts(**value)
            else:
                setattr(self, name, value)
