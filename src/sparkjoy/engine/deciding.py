"""From log-probs to the gate's decision, with what a user's own score or gate returns checked on the way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparkjoy import checks
from sparkjoy.checks import without_graph
from sparkjoy.engine.inputs import Inputs
from sparkjoy.engine.processes.ranks import Scored
from sparkjoy.gates import Decision, Gate
from sparkjoy.gates.decision import rule_of, weighted
from sparkjoy.scores import ScoreFunction, at_least_float32, sign_of_advantage
from sparkjoy.signs import with_sign, worth
from sparkjoy.sizes import is_size


def row_scores(score_function: ScoreFunction, inputs: Inputs, log_probs: Tensor) -> Tensor:
    """(B,) scores, summed over valid tokens; 0 for rows whose advantage is 0 at every one.

    A score that has the sign of the advantage is 0 for no other row; sizes of tokens add as squares, whatever
    their signs: their gradients point in unlike directions, so that the length of the sum is near that.
    """
    # Log-probs stay in their dtype, which says how far above 0 their rounding reaches; `surprisal` makes them float32.
    score = score_function(at_least_float32(inputs.advantages), log_probs)
    shape = f"({inputs.total},), one per row"
    checks.tensor("the score", score, (1, 2), checks.FLOATING, shape, inputs.advantages)
    if score.dim() == 2 and score.shape != log_probs.shape:
        raise ValueError(
            f"the score has shape {tuple(score.shape)}; expected that of log_probs, {tuple(log_probs.shape)}."
        )
    if score.dim() == 2:
        score = score if inputs.mask is None else score.where(inputs.mask, 0)
        precise = torch.promote_types(score.dtype, torch.float32)
        total = score.sum(dim=1, dtype=precise)
        if is_size(score_function):
            largest = score.to(precise).abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(precise).tiny)
            total = torch.copysign((score / largest).square().sum(dim=1).sqrt() * largest.squeeze(1), total)
        score = total
    if score.shape != (inputs.total,):
        raise ValueError(f"the score has shape {tuple(score.shape)}; expected ({inputs.total},), one per row.")
    if sign_of_advantage(score_function):
        return with_sign(score, worth(inputs.advantages))  # inputs are 0 where the mask is
    return score.where(inputs.teaches(), 0)


def scored_rows(gate: Gate, score: Tensor, inputs: Inputs) -> Scored:
    """What the gate decides on."""
    cost = None if inputs.row_tokens is None else inputs.row_tokens.to(score.device)
    plain = rule_of(gate) is not None and weighted(gate) is False  # keeps no row of score 0, and weighs none
    return Scored(score, cost, None if plain else inputs.teaches())


def decide(gate: Gate, scored: Scored, inputs: Inputs, score_function: ScoreFunction) -> Decision:
    """The gate's decision, about rows that teach something: a gate with a rule keeps no others."""
    score, cost, teaches = scored
    try:
        decision: Any = gate(score, cost)  # whatever a gate of the user's own returns
    except ValueError:
        inputs.check_finite()  # says which input it was, where it was one
        raise
    if not isinstance(decision, Decision):
        raise ValueError(f"the gate returned a {type(decision).__name__}; expected a sparkjoy Decision.")
    for name in ("keep", "probability", "weight"):
        part = checks.tensor(f"the gate's {name}", getattr(decision, name), shape="(B,)", beside=score)
        if part.shape != score.shape or (name == "keep" and part.dtype != torch.bool):
            raise ValueError(
                f"the gate's {name} is {part.dtype} {tuple(part.shape)}; expected "
                f"{'bool ' if name == 'keep' else ''}({len(score)},)."
            )
    if decision.price is not None:
        checks.tensor("the gate's price", decision.price, (0,), shape="one number, (), or None")
    if teaches is None:
        return decision
    if not bool(decision.weight.isfinite().all()):
        raise ValueError("the gate's weight is not finite; expected finite numbers (B,).")
    keep = decision.keep & teaches
    if weighted(gate) and not is_size(score_function):  # a size is 0 where the gradient is
        never = int((teaches & (score == 0) & (decision.probability == 0)).count_nonzero())
        if never > 1:  # one may be chance, of a score that is drawn
            raise ValueError(
                f"the score is 0 for {never} rows that have an advantage, so that {gate!r} would never keep them and "
                "its expected gradient would not be the dense one; give it a floor, such as 0.02, or a score that is 0 "
                "only where the gradient is."
            )
    return replace(
        decision,
        keep=keep,
        price=decision.price if bool(keep.any()) else None,
        probability=decision.probability.where(teaches, 0),
        weight=without_graph(decision.weight),
    )
