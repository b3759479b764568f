"""What ran, in numbers that add up."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Rows, tokens and FLOPs of some passes, counted from what ran.

    >>> ran = Counts(forward_rows=3) + Counts(forward_rows=2, backward_rows=2, backward_flops=8)
    >>> ran.forward_rows, ran.backward_rows, ran.forward_flops, ran.backward_flops
    (5, 2, None, 8)

    Args:
        screened_rows: rows whose log-probs were computed to decide or to audit, without a graph, drafted ones too.
        forward_rows: rows that went through `log_prob_fn`, screened and audited ones included.
        backward_rows: rows whose gradient arrived at what `log_prob_fn` returned.
        screened_tokens: as the rows, in tokens that the mask counts; equal to the rows for (B,) log-probs.
        forward_tokens: likewise.
        backward_tokens: likewise.
        forward_flops: FLOPs of all forward passes, a draft's included; None when not counted.
        backward_flops: FLOPs of all backward passes; None when not counted.
    """

    screened_rows: int = 0
    forward_rows: int = 0
    backward_rows: int = 0
    screened_tokens: int = 0
    forward_tokens: int = 0
    backward_tokens: int = 0
    forward_flops: int | None = None
    backward_flops: int | None = None

    @property
    def flops(self) -> int | None:
        """FLOPs of all passes; None when not counted."""
        if self.forward_flops is None or self.backward_flops is None:
            return None
        return self.forward_flops + self.backward_flops

    def __add__(self, other: Counts) -> Counts:
        pairs = ((field.name, getattr(self, field.name), getattr(other, field.name)) for field in fields(Counts))
        return Counts(**{name: b if a is None else a if b is None else a + b for name, a, b in pairs})
