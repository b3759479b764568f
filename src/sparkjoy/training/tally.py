"""What a run has done so far, counted: the numbers of its records."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from sparkjoy.engine.backward import BackwardReport


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
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("sample", "screen", "backward", "optimizer", "total"), 0.0)
    )
    price_sum: float = 0.0
    priced_steps: int = 0
    reward_sum: float = 0.0
    steps_since: int = 0
    rollout_flops: int | None = None
    """Of the run's first rollout, and counted for each: more than run where a sampler shares equal prefixes."""

    def sampled(self, rows: int, tokens: int, reward: Tensor) -> None:
        """Count a rollout of `rows`; its forward pass counts too."""
        self.samples += rows
        self.forward_samples += rows
        self.forward_tokens += tokens
        self.forward_flops += self.rollout_flops or 0
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
        if report.decision.price is not None:
            self.price_sum += report.decision.price.item()
            self.priced_steps += 1

    def record(self) -> dict[str, Any]:
        """The counts, the mean price and reward since the last record; starts the next one."""
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
        }
        self.price_sum, self.priced_steps, self.reward_sum, self.steps_since = 0.0, 0, 0.0, 0
        return record

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
