"""Which way to the same gradient is cheapest, from counts alone, so that a seed reproduces a run.

A forward pass of a row costs 1 and a backward pass r. Surprisal is never negative, so the sign of a row's delight is
its advantage's: often some rows are kept or skipped whatever their log-probs, and only the others need screening.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparkjoy.engine.inputs import Inputs
from sparkjoy.engine.ranks import ALONE, Ranks
from sparkjoy.gates import Gate, KondoGate, rate_count
from sparkjoy.prices import FixedPrice

Plan = Literal["known", "signs", "screen", "dense"]

BACKWARD_OVER_FORWARD = 2.0
"""r of full training, until it is measured: two matrix products backward for each one forward."""


@dataclass(frozen=True)
class Candidates:
    """What the signs of the advantages leave to decide: (B,) bool each, no row in two of them.

    Rows in none of them are skipped whatever their log-probs.

    Args:
        certain: kept, unless their delight is exactly 0.
        contested: their log-probs decide.
        reserve: kept only where fewer than the quota of the others have a delight above 0.
        quota: rows that the gate keeps at most; None: no rate.
    """

    certain: Tensor
    contested: Tensor
    reserve: Tensor
    quota: int | None


@dataclass(frozen=True)
class Choice:
    """A plan, and the counts it was chosen by.

    Args:
        plan: "known": the log-probs are given. "signs": the advantages' signs decide. "screen": a forward pass without
            a graph decides, survivors are recomputed. "dense": one differentiable pass over all that may be kept,
            skipped rows at weight zero.
        reason: why, in a sentence.
    """

    plan: Plan
    reason: str


EVERYTHING = Choice("dense", "Every row is kept.")
KNOWN = Choice("known", "The log-probs to decide on were given.")


def candidates(gate: Gate, signs_decide: bool, certain_first: bool, inputs: Inputs, ranks: Ranks = ALONE) -> Candidates:
    """Sort rows by what the signs of their advantages already decide.

    >>> import torch, sparkjoy as sj
    >>> from sparkjoy.engine.inputs import check_inputs
    >>> inputs = check_inputs(torch.arange(4), torch.tensor([1.0, -1.0, 2.0, 0.0]), None, None, None)
    >>> candidates(sj.KondoGate(rate=0.25), True, True, inputs).contested
    tensor([ True, False,  True, False])
    >>> candidates(sj.KondoGate(rate=0.5), True, True, inputs).certain
    tensor([ True, False,  True, False])

    Args:
        gate: what will decide.
        signs_decide: the score is delight.
        certain_first: rows may be differentiated before the decision about the others is made.
        inputs: the checked batch of this process.
        ranks: whose rows the decision is about.
    """
    positive, negative = (inputs.advantages > 0), (inputs.advantages < 0)
    if positive.dim() == 2:
        positive, negative = positive.any(dim=1), negative.any(dim=1)
    none, teaching = torch.zeros_like(positive), positive | negative
    if type(gate) is not KondoGate:
        return Candidates(none, teaching, none, None)
    quota = None if gate.rate is None else rate_count(gate.rate, ranks.total(inputs.total))
    hard = gate.temperature == 0 and gate.negative_share == 0
    fixed = gate.price is None or type(gate.price) is FixedPrice
    if not hard or not signs_decide or not fixed or ranks.sum(int((positive & negative).any())):
        return Candidates(none, teaching, none, quota)
    price = gate.price.value if type(gate.price) is FixedPrice else None
    if price is None and quota is not None and certain_first and ranks.sum(int(teaching.count_nonzero())) <= quota:
        return Candidates(teaching, none, none, quota)
    successes = ranks.sum(int(positive.count_nonzero()))
    fits = quota is None or successes <= quota
    fills = quota is not None and successes >= quota
    losers = none if price is not None and price >= 0 else negative
    reserve, contested = (losers, none) if fills else (none, losers)
    if fits and (price is None or price <= 0) and certain_first:
        return Candidates(positive, contested, reserve, quota)
    return Candidates(none, positive | contested, reserve, quota)


def choose(
    rows: Candidates, total: int, undivided: bool, kept_fraction: float | None, backward_over_forward: float
) -> Choice:
    """The cheapest exact plan.

    Args:
        rows: what is left to decide.
        total: B.
        undivided: what may be kept is one micro-batch; a dense pass over several would hold all their graphs until the
            decision.
        kept_fraction: kept of late, for gates without a rate; None: not known yet.
        backward_over_forward: r, as measured.
    """
    certain, contested = int(rows.certain.count_nonzero()), int(rows.contested.count_nonzero())
    skipped = total - certain - contested
    settled = f"signs of the advantages keep {certain} and skip {skipped} of {total} rows"
    if contested == 0:
        return Choice("signs", f"The {settled}.")
    expected = contested if rows.quota is None else min(contested, rows.quota - certain)
    if rows.quota is None and kept_fraction is not None:
        expected = min(contested, max(0, round(kept_fraction * total) - certain))
    known = rows.quota is not None or kept_fraction is not None
    pass_cost = 1 + backward_over_forward
    screen = contested + (certain + expected) * pass_cost
    dense = (certain + contested) * pass_cost
    plan: Plan = "dense" if undivided and known and dense < screen else "screen"
    divided = "" if undivided else ", which several micro-batches rule out"
    return Choice(
        plan,
        f"The {settled}; of the other {contested} about {expected} are kept. At r = {backward_over_forward:.3g} "
        f"screening costs {screen:.4g} forward passes of a row, a dense pass {dense:.4g}{divided}.",
    )
