"""Which way to the same gradient is cheapest, from counts alone, so that a seed reproduces a run.

A forward pass costs 1 a row and a backward pass r; of all rows a fraction k is kept. Known log-probs cost k(1 + r), a
screening forward 1 + k(1 + r), a dense pass with skipped rows at weight zero 1 + r.
"""

from __future__ import annotations

from typing import Literal

Plan = Literal["known", "screen", "dense"]

BACKWARD_OVER_FORWARD = 2.0
"""r of full training: a backward pass has two matrix products for each one of the forward pass."""


def cheapest_plan(known: bool, drafted: bool, undivided: bool, kept_fraction: float | None) -> Plan:
    """The cheapest exact plan.

    >>> cheapest_plan(known=False, drafted=False, undivided=True, kept_fraction=0.03)
    'screen'
    >>> cheapest_plan(known=False, drafted=False, undivided=True, kept_fraction=0.9)
    'dense'

    Args:
        known: the log-probs are there already.
        drafted: a source of its own gives the log-probs to decide on, so the decision cannot come from the dense pass.
        undivided: the batch is one micro-batch; a dense pass over several would hold all their graphs until the
            decision.
        kept_fraction: what is expected to be kept; None: not known yet.
    """
    if known:
        return "known"
    if drafted or not undivided or kept_fraction is None:
        return "screen"
    screened = 1 + kept_fraction * (1 + BACKWARD_OVER_FORWARD)
    return "dense" if screened > 1 + BACKWARD_OVER_FORWARD else "screen"
