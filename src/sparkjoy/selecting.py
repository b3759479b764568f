"""Which rows to train on, for a trainer that owns its loop: the engine's decision without its passes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from sparkjoy import checks
from sparkjoy.gates import Decision, Gate
from sparkjoy.gates.decision import GATE, rule_of, weighs
from sparkjoy.losses import LOSS, Loss, reinforce, size_of
from sparkjoy.noise import noise_sums
from sparkjoy.scores import (
    SCORE,
    ScoreFunction,
    advantage_score,
    advantage_size,
    delight,
    is_size,
    reads_log_probs,
    sign_of_advantage,
)
from sparkjoy.signs import fates, worth
from sparkjoy.step.deciding import decide, row_scores, to_decide_on
from sparkjoy.step.inputs import check_inputs


class Selection(NamedTuple):
    """What to train on.

    Args:
        rows: (K,) indices of the kept rows, in order.
        weights: (K,) what to multiply their advantages by: 1, unless the gate is weighted.
        decision: the gate's, about all rows.
    """

    rows: Tensor
    weights: Tensor
    decision: Decision


def select(
    gate: Gate,
    advantages: Tensor,
    log_probs: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    loss: Loss = reinforce,
    score: ScoreFunction | None = None,
    cost: Tensor | None = None,
) -> Selection:
    """The rows of a batch that a gate keeps, and the weights of their advantages.

    Train on `batch[rows]` with `advantages[rows] * weights`, and divide by what you would divide the whole batch's loss
    by: the batch's rows or tokens, not the kept ones'. For a loss proportional to its advantages the gradient is then
    that of the whole batch with the skipped rows at 0, on average the whole batch's own for a weighted gate.

    >>> import torch, sparkjoy as sj
    >>> advantages, log_probs = torch.tensor([1.0, -1.0, 0.5, 0.0]), torch.tensor([-0.5, -1.0, -3.0, -1.0])
    >>> rows, weights, _ = sj.select(sj.KondoGate(rate=0.25), advantages, log_probs)
    >>> rows, weights
    (tensor([2]), tensor([1.]))
    >>> gate = sj.UnbiasedGate(noise=0.3, generator=torch.Generator().manual_seed(0))
    >>> sj.select(gate, advantages, log_probs).weights
    tensor([1.7175, 1.0691])

    Args:
        gate: decides. With several processes, give it the advantages and log-probs of all of them, in the same order
            everywhere, and generators of the same seed.
        advantages: (B,), or (B, T) with log-probs of (B, T).
        log_probs: (B,) or (B, T), of the actions taken, under the policy as it is now, such as the sampler's where that
            is not stale; else give an `UnbiasedGate` a floor (docs/your_own_loop.md). None: for a hard gate on delight,
            where the signs of the advantages settle what it keeps (a price of 0); for a weighted gate sizes are |U|.
        mask: (B, T), 1 for tokens that count.
        loss: what you train with; a weighted gate asks for the size of a row's gradient in it.
        score: what the gate decides on; None: delight, or that size.
        cost: (B,), what each row costs, such as its tokens with the prompt; None: its valid tokens.

    Raises:
        ValueError: NaN, infinite or misshapen input, or log-probs that the decision needs and were not given.
    """
    checks.function("gate", gate, GATE, ..., ...)
    loss = checks.function("loss", loss, LOSS, ..., ..., ..., ...)
    if score is not None:
        checks.function("score", score, SCORE, ..., ...)
    rule = rule_of(gate)
    inputs = check_inputs({}, advantages, log_probs, None, mask, counts_signs=log_probs is None)
    if score is None:
        size = advantage_size if log_probs is None else size_of(loss)
        score = size if weighs(gate) else delight
    if log_probs is not None or not reads_log_probs(score):
        known = inputs.blank_log_probs() if inputs.log_probs is None else inputs.log_probs
        scores = row_scores(score, inputs, known)
    else:
        assert inputs.signs is not None  # counted where log-probs are not known
        good, bad, differs = inputs.signs
        scores = worth(inputs.advantages)
        signs_tell = sign_of_advantage(score) and not differs
        of_good, of_bad = fates(rule if signs_tell else None, good, bad, len(scores))
        open_ = good * (of_good is None) + bad * (of_bad is None)
        if open_:
            raise ValueError(
                f"log_probs is None, and the signs of the advantages leave {open_} of {len(scores)} rows open; give "
                "the log-probs of the actions taken, such as the sampler's."
            )
    scores, tokens, teaches = to_decide_on(gate, rule, scores, inputs)
    if cost is not None:
        checks.cost(cost, scores)
    decision, rows = decide(gate, scores, tokens if cost is None else cost, teaches, inputs, sized=is_size(score))
    rows = rows.to(scores.device)
    return Selection(rows, decision.weight[rows], decision)


def learn(
    gate: Gate,
    weights: Tensor,
    advantages: Tensor,
    decided_on: Tensor,
    differentiated: Tensor,
    mask: Tensor | None = None,
    *,
    loss: Loss = reinforce,
) -> None:
    """Tell a noise budget what its draws really added, where it decided on log-probs that were not the policy's own.

    `GatedBackward` does so by itself. Of the kept rows alone, in their order; over several processes, of all of them.

    >>> import torch, sparkjoy as sj
    >>> gate, stale = sj.UnbiasedGate(noise=0.3), torch.tensor([-0.5, -1.0, -3.0, -1.0])
    >>> advantages = torch.tensor([1.0, -1.0, 0.5, 0.0])
    >>> rows, weights, _ = sj.select(gate, advantages, stale)
    >>> learn(gate, weights, advantages[rows], stale[rows], stale[rows] - 0.1)

    Args:
        gate: the one that decided; one without `learn` is told nothing.
        weights: (K,) as `select` returned them.
        advantages: (K,), or (K, T) with log-probs of (K, T).
        decided_on: (K,) or (K, T) log-probs that `select` was given.
        differentiated: the same of the policy as it was differentiated.
        mask: (K, T), 1 for tokens that count.
        loss: as `select`'s.

    Raises:
        ValueError: NaN, infinite or misshapen input.
    """
    if not hasattr(gate, "learn") or len(weights) == 0:
        return
    size = size_of(checks.function("loss", loss, LOSS, ..., ..., ..., ...))
    used, exact = (
        row_scores(size, check_inputs({}, advantages, log_probs, None, mask), log_probs)
        for log_probs in (decided_on, differentiated)
    )
    gate.learn(*noise_sums(exact, used, weights).tolist())


def select_by_score(gate: Gate, score: Tensor, cost: Tensor | None = None) -> Selection:
    """`select` for a trainer that scores its rows itself: (N,) delights, or for a weighted gate signed sizes.

    >>> import torch, sparkjoy as sj
    >>> select_by_score(sj.KondoGate(rate=0.5), torch.tensor([0.5, -1.0, 2.0, 0.0])).rows
    tensor([0, 2])
    """
    return select(gate, score, score=advantage_size if weighs(gate) else advantage_score, cost=cost)
