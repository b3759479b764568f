"""What a run's comparisons with the dense gradient have found: the "comparison" of its records."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from sparkjoy.gradients import Comparison

MEANS = ("cosine", "relative_error", "norm_ratio")


@dataclass
class ComparisonTally:
    """Sums since the last record."""

    compared: int = 0
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(MEANS, 0.0))
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MEANS, 0))
    seconds: float = 0.0

    def stepped(self, comparison: Comparison) -> None:
        """Count one."""
        self.compared += 1
        self.seconds += comparison.seconds
        for name in MEANS:
            value = getattr(comparison, name)
            if value is not None:
                self.sums[name] += value
                self.counts[name] += 1

    def record(self) -> dict[str, Any] | None:
        """Means since the last record; None where there never was a comparison."""
        if not self.compared:
            return None
        means = {name: self.sums[name] / self.counts[name] if self.counts[name] else None for name in MEANS}
        self.sums, self.counts = dict.fromkeys(MEANS, 0.0), dict.fromkeys(MEANS, 0)
        return {**means, "compared": self.compared, "seconds": self.seconds}

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
