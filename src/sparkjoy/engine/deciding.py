"""From log-probs to the gate's decision, with what a user's own score or gate returns checked on the way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparkjoy.engine.inputs import Inputs
from sparkjoy.engine.ranks import Scored
from sparkjoy.gates import Decision, Gate, KondoGate
from sparkjoy.scores import ScoreFunction, at_least_float32, delight, without_graph


def row_scores(score_function: ScoreFunction, inputs: Inputs, log_probs: Tensor) -> Tensor:
    """(B,) scores, summed over valid tokens; 0 for rows whose advantage is 0 at every one."""
    # Log-probs stay in their dtype, which says how far above 0 their rounding reaches; `surprisal` makes them float32.
    score = score_function(at_least_float32(inputs.advantages), log_probs)
    if score.dim() == 2:
        valid = score if inputs.mask is None else score.where(inputs.mask, 0)
        score = valid.sum(dim=1, dtype=torch.promote_types(valid.dtype, torch.float32))
    if score.shape != (inputs.total,):
        raise ValueError(f"the score has shape {tuple(score.shape)}; expected ({inputs.total},), one per row.")
    return score if score_function is delight else score.where(inputs.teaches(), 0)  # delight is 0 there already


def scored_rows(gate: Gate, score: Tensor, inputs: Inputs) -> Scored:
    """What the gate decides on."""
    cost = None if inputs.row_tokens is None else inputs.row_tokens.to(score.device)
    hard = type(gate) is KondoGate and gate.temperature == 0  # keeps no score of 0, so no row that teaches nothing
    return Scored(score, cost, None if hard else inputs.teaches())


def decide(gate: Gate, scored: Scored, inputs: Inputs) -> Decision:
    """The gate's decision, about rows that teach something."""
    score, cost, teaches = scored
    try:
        decision: Any = gate(score, cost)  # whatever a gate of the user's own returns
    except ValueError:
        inputs.check_finite()  # says which input it was, where it was one
        raise
    if not isinstance(decision, Decision):
        raise ValueError(f"the gate returned a {type(decision).__name__}; expected a sparkjoy Decision.")
    if decision.keep.shape != score.shape or decision.keep.dtype != torch.bool:
        raise ValueError(f"the gate's keep is {decision.keep.dtype} {tuple(decision.keep.shape)}; expected bool (B,).")
    if teaches is None:
        return decision
    if decision.weight.shape != score.shape or not bool(decision.weight.isfinite().all()):
        raise ValueError(f"the gate's weight is {tuple(decision.weight.shape)} or not finite; expected finite (B,).")
    keep = decision.keep & teaches
    return replace(
        decision,
        keep=keep,
        price=decision.price if bool(keep.any()) else None,
        probability=decision.probability.where(teaches, 0),
        weight=without_graph(decision.weight),
    )
