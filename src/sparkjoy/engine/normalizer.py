"""What the sum of the kept terms is divided by."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from sparkjoy import checks
from sparkjoy.engine.inputs import Inputs
from sparkjoy.engine.processes.ranks import Ranks
from sparkjoy.gates import Gate
from sparkjoy.gates.decision import weighted

Normalizer = Literal["batch", "samples", "kept"] | float


def checked_normalizer(normalizer: Any) -> Normalizer:
    """One of the words, or a number above 0."""
    if isinstance(normalizer, str) and normalizer in ("batch", "samples", "kept"):
        return normalizer  # type: ignore[return-value]  # one of the words
    expected = "'batch', 'samples', 'kept' or a number above 0"
    return checks.number("normalizer", normalizer, expected, lambda divisor: divisor > 0)


def check_unbiased(normalizer: Normalizer, gate: Gate | None) -> None:
    """Raise a ValueError where a divisor follows the draws of a gate whose mean gradient is to be the dense one."""
    if normalizer == "kept" and weighted(gate):
        raise ValueError(
            f"normalizer is 'kept' and the gate {gate!r}: weights stand in for the skipped rows already, so that the "
            "gradient over the kept ones alone would be several times the dense one. Take 'batch', which is the same "
            "for all gates, 'samples' or a number."
        )


def divisor(normalizer: Normalizer, inputs: Inputs, keep: Tensor, log_probs: Tensor, ranks: Ranks) -> float:
    """What a process divides by, whose gradients are then averaged; 1 where nothing but masked tokens would count.

    Args:
        normalizer: as `GatedBackward`'s.
        inputs: the rows of this process.
        keep: (B,) bool, which of them are kept.
        log_probs: of any of them: of what shape a row's are.
        ranks: the processes.
    """
    if normalizer == "batch":
        count: float = max(1, ranks.sum(inputs.tokens(log_probs)))
    elif normalizer == "samples":
        count = ranks.total(inputs.total)
    elif normalizer == "kept":
        count = max(1, ranks.sum(_kept_tokens(inputs, keep, log_probs)))
    else:
        count = normalizer
    return count / ranks.size


def _kept_tokens(inputs: Inputs, keep: Tensor, log_probs: Tensor) -> int:
    if inputs.row_tokens is not None:
        return int(inputs.row_tokens[keep.cpu()].sum())
    return int(keep.count_nonzero()) * (log_probs.shape[1] if log_probs.dim() == 2 else 1)
