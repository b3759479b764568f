"""How long a run is, from which seed, and what it reports."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class RunSettings:
    """Steps, seed, optimizer, evaluations, machine."""

    steps: int = 10_000
    """Optimizer steps."""
    seed: int = 0
    """Seed of the initial weights and of every draw."""
    learning_rate: float = 1e-3
    """Adam's learning rate."""
    until_error: float | None = None
    """Stop at the first evaluation with an error at or below this fraction."""
    target_error: float | None = None
    """Report when the error first was at or below this fraction; the run goes on."""
    evaluate_every: int = 100
    """Steps between evaluations; each writes a record."""
    micro_batch_size: int | None = None
    """Rows per forward and backward pass; all at once by default."""
    threads: int = 1
    """Threads of torch; the last digits of results depend on it."""
    compare_every: int | None = None
    """Steps between comparisons of the gated gradient with the dense one, computed besides; none by default."""

    def __post_init__(self) -> None:
        for name in ("steps", "evaluate_every", "threads", "compare_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: expected at least 1.")
        for name in ("target_error", "until_error"):  # studies that stop at the target have both
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: expected a fraction, such as 0.05 for 5%.")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"--learning-rate {self.learning_rate}: expected a finite number above 0.")
