"""From a batch to the gate's decision: known log-probs, signs, a draft, or the cheapest pass that tells enough.

Surprisal is never negative, so the sign of a row's delight is its advantage's: often some rows are kept or skipped
whatever their log-probs, and only the others need a forward pass. Which way is the cheapest is told from counts alone,
so that a seed reproduces a run: a forward pass of a row costs 1 and a backward pass r.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparkjoy import checks
from sparkjoy.gates import Decision, Gate
from sparkjoy.noise import expected_noise, noise_ratio, noise_sums
from sparkjoy.processes.ranks import Ranks
from sparkjoy.scores import ScoreFunction, at_least_float32, is_size, reads_log_probs, sign_of_advantage
from sparkjoy.signs import Rule, fates, with_sign, worth
from sparkjoy.step.inputs import Inputs
from sparkjoy.step.passes import Options, Passes

BACKWARD_OVER_FORWARD = 2.0
"""r of full training, until it is measured: two matrix products backward for each one forward."""


def scores_of_rows(
    options: Options, passes: Passes, kept_fraction: float | None, backward_over_forward: float | None
) -> tuple[Tensor, bool, bool]:
    """What the gate is to decide on.

    Args:
        options: of the step.
        passes: run what has to be run.
        kept_fraction: kept in the last steps, for gates without a rate; None: not known yet.
        backward_over_forward: r; None: not known.

    Returns:
        (B,) scores, where signs or a draft have decided about a row any number of the sign that says so; whether they
        are of the policy as it is now; whether the row at the margin has a score of its own.
    """
    draft, inputs = options.draft, passes.inputs
    log_probs, score = inputs.log_probs, options.score
    if log_probs is None and not reads_log_probs(score):
        log_probs = inputs.blank_log_probs()
    if draft is not None and draft.source is None and draft.verify is None:
        score = draft.score or score
    elif draft is not None or log_probs is None:
        return _looked(options, passes, kept_fraction, backward_over_forward or BACKWARD_OVER_FORWARD)
    given = inputs.log_probs is not None
    reason = "The log-probs to decide on were given." if given else "The score reads no log-probs."
    passes.counting.plan, passes.counting.reason = "known", reason
    assert log_probs is not None  # the draft saw to it
    return row_scores(score, inputs, log_probs), False, True


def _looked(options: Options, passes: Passes, kept_fraction: float | None, r: float) -> tuple[Tensor, bool, bool]:
    """Signs first, then the draft, then the policy about what they leave open."""
    score, draft, ranks = options.score, options.draft, options.ranks
    inputs, counting, rule = passes.inputs, passes.counting, options.rule
    assert inputs.signs is not None  # counted where log-probs are not known
    goods, bads, differs = inputs.signs
    signs_tell = all(map(sign_of_advantage, (score, (draft and draft.score) or score)))
    signs_tell = signs_tell and not any(ranks.counts(differs))
    total, value = ranks.total(inputs.total), worth(inputs.advantages)
    good, bad = fates(rule if signs_tell else None, sum(ranks.counts(goods)), sum(ranks.counts(bads)), total)
    kept = (value > 0) * (good is True) | (value < 0) * (bad is True)
    open_ = (value > 0) * (good is None) | (value < 0) * (bad is None)
    of_kept = goods * (good is True) + bads * (bad is True)
    of_open = goods * (good is None) + bads * (bad is None)
    priced = rule is None or rule.rate is None or not any(ranks.counts(of_kept))
    narrowed_by = "signs of the advantages"
    if draft is not None:
        counting.plan = "draft"
        drafted = _drafted(draft.source, draft.score or score, passes, open_, of_open, ranks)
        if draft.verify is None:
            counting.reason = f"A draft decides about {of_open} of {inputs.total} rows."
            return torch.where(open_, drafted, value.to(drafted.dtype)), False, priced
        assert rule is not None  # the draft saw to it
        (everywhere,) = ranks.gather(drafted)
        proposed = ranks.own(draft.propose(everywhere, rule, sum(ranks.counts(of_kept)), total))
        open_ = open_ & proposed
        of_open = int(open_.count_nonzero())
        value = value.where(kept | open_, 0)
        counting.proposed = sum(ranks.counts(of_kept + of_open))
        narrowed_by = "signs of the advantages and a draft"

    possible, count = kept | open_, of_kept + of_open
    # Several processes decide before any of them differentiates: all skip the passes, or none.
    undivided = ranks.size == 1 and options.packing.holds(inputs, count)
    quota = None if rule is None else rule.quota(total)
    dense, reason = _cheapest(of_kept, of_open, inputs.total, quota, undivided, kept_fraction, r, narrowed_by)
    counting.reason = reason
    if draft is None:
        counting.plan = "signs" if of_open == 0 else "dense" if dense else "screen"
    any_open = any(ranks.counts(of_open))
    counting.lap("screen")
    log_probs = None
    if dense:
        log_probs = passes.forward(_indices(possible, count))
    elif any_open:
        log_probs = passes.screen(_indices(open_, of_open))
    if log_probs is not None:
        found = row_scores(score, inputs, log_probs)
        value = torch.where(possible if dense else open_, found, value.to(found.dtype))
    return value, True, priced or dense


def _drafted(source: Any, score: ScoreFunction, passes: Passes, open_: Tensor, of_open: int, ranks: Ranks) -> Tensor:
    """(B,) scores of the open rows by the draft, 0 elsewhere."""
    inputs = passes.inputs
    log_probs = inputs.log_probs
    if source is not None:
        # A draft may run a sharded policy, whose passes are meetings: where one process asks it, all do.
        log_probs = passes.screen(_indices(open_, of_open), source) if any(ranks.counts(of_open)) else None
    if log_probs is None:
        return torch.zeros_like(worth(inputs.advantages))
    return row_scores(score, inputs, log_probs).where(open_, 0)


def _cheapest(
    kept: int,
    open_: int,
    total: int,
    quota: int | None,
    undivided: bool,
    kept_fraction: float | None,
    r: float,
    narrowed_by: str,
) -> tuple[bool, str]:
    """Whether one dense pass over all that may be kept is cheapest, and why.

    Args:
        kept: rows that are kept whatever their log-probs.
        open_: rows whose log-probs decide.
        total: B.
        quota: rows that the gate keeps at most; None: no rate.
        undivided: what may be kept is one micro-batch; a dense pass over several would hold all their graphs until the
            decision.
        kept_fraction: kept in the last steps, for gates without a rate; None: not known yet.
        r: what a backward pass costs in forward passes.
        narrowed_by: what has decided about the others, in words.
    """
    decided = f"{narrowed_by} keep {kept} and skip {total - kept - open_} of {total} rows"
    if open_ == 0:
        return False, f"The {decided}."
    expected = open_ if quota is None else min(open_, quota - kept)
    if quota is None and kept_fraction is not None:
        expected = min(open_, max(0, round(kept_fraction * total) - kept))
    screen, dense = open_ + (kept + expected) * (1 + r), (kept + open_) * (1 + r)
    known = quota is not None or kept_fraction is not None
    divided = "" if undivided else ", which several micro-batches rule out"
    return undivided and known and dense < screen, (
        f"The {decided}; of the other {open_} about {expected} are kept. At r = {r:.3g} screening costs "
        f"{screen:.4g} forward passes of a row, a dense pass {dense:.4g}{divided}."
    )


def _indices(rows: Tensor, count: int) -> Tensor | None:
    """Where `rows` (B,) is true, on the host; None where it is everywhere."""
    return None if count == len(rows) else rows.cpu().nonzero().squeeze(1)


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


def to_decide_on(
    gate: Gate, rule: Rule | None, score: Tensor, inputs: Inputs
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Scores (B,), what each row costs, and which rows teach something; None where the score says so.

    Args:
        gate: that is to decide; one with a rule that says it has no weights keeps no row of score 0.
        rule: the gate's.
        score: (B,).
        inputs: of the rows.
    """
    plain = rule is not None and getattr(gate, "weighted", None) is False
    cost = None if inputs.row_tokens is None else torch.from_numpy(inputs.row_tokens).to(score.device)
    return score, cost, None if plain else inputs.teaches()


def decide(
    gate: Gate, score: Tensor, cost: Tensor | None, teaches: Tensor | None, inputs: Inputs, sized: bool
) -> tuple[Decision, Tensor]:
    """The gate's decision, about rows that teach something, and the rows it keeps.

    Args:
        gate: decides.
        score: (N,) of the rows of all processes.
        cost: (N,), or None.
        teaches: (N,) bool, or None where the gate keeps no others.
        inputs: of this process, to say which was not finite.
        sized: whether a score is 0 only where the gradient is.

    Returns:
        The decision, and (K,) indices on the host, in order.
    """
    try:
        decision: Any = gate(score, cost)  # whatever a gate of the user's own returns
    except ValueError:
        inputs.check_finite()  # says which input it was, where it was one
        raise
    if not isinstance(decision, Decision):
        raise ValueError(f"the gate returned a {type(decision).__name__}; expected a sparkjoy Decision.")
    if not _is_one_each(decision, score):
        _explain(decision, score)
    if teaches is None:
        return decision, decision.keep.cpu().nonzero().squeeze(1)
    weighs = getattr(gate, "weighted", None)
    never = teaches & (score == 0) & (decision.probability == 0) if weighs and not sized else None
    if weighs is None or never is not None:
        unknown = decision.weight.isfinite().logical_not().sum()
        infinite, count = checks.read(unknown, unknown if never is None else never.sum())
        if infinite:
            raise ValueError("the gate's weight is not finite; expected finite numbers (B,).")
        if never is not None and count > 1:  # one may be chance, of a score that is drawn
            raise ValueError(
                f"the score is 0 for {int(count)} rows that have an advantage, so that {gate!r} would never keep them "
                "and its expected gradient would not be the dense one; give it a floor, such as 0.02, or a score that "
                "is 0 only where the gradient is."
            )
    keep = decision.keep & teaches
    rows = keep.cpu().nonzero().squeeze(1)
    return (
        replace(
            decision,
            keep=keep,
            price=decision.price if len(rows) else None,
            probability=decision.probability.where(teaches, 0),
            weight=checks.without_graph(decision.weight),
        ),
        rows,
    )


def _is_one_each(decision: Decision, score: Tensor) -> bool:
    parts: tuple[Any, ...] = decision.keep, decision.probability, decision.weight
    if not all(isinstance(part, Tensor) and part.shape == score.shape for part in parts):
        return False
    price = decision.price is None or (isinstance(decision.price, Tensor) and decision.price.dim() == 0)
    return price and decision.keep.dtype == torch.bool and decision.keep.device == score.device


def _explain(decision: Decision, score: Tensor) -> None:
    """Raise a ValueError that says which part of a decision is not one number for each score."""
    for name in ("keep", "probability", "weight"):
        part = checks.tensor(f"the gate's {name}", getattr(decision, name), shape="(B,)", beside=score)
        if part.shape != score.shape or (name == "keep" and part.dtype != torch.bool):
            raise ValueError(
                f"the gate's {name} is {part.dtype} {tuple(part.shape)}; expected "
                f"{'bool ' if name == 'keep' else ''}({len(score)},)."
            )
    if decision.price is not None:
        checks.tensor("the gate's price", decision.price, (0,), shape="one number, (), or None")


def added_noise(
    size: ScoreFunction,
    inputs: Inputs,
    score: Tensor,
    teaches: Tensor | None,
    decision: Decision,
    exact: bool,
    differentiated: Tensor | None,
    ranks: Ranks,
) -> tuple[float, list[float] | None]:
    """The second moment that skipping added, over the batch's own, about the rows of all processes.

    Where the sizes decided on are exact it is a sum over all rows. Else the exact sizes of the kept rows, by the
    log-probs they were differentiated with, correct it; their `noise_sums` are for the gate to learn from.

    Args:
        size: of a row's gradient in the loss.
        inputs: this process's rows.
        score: (N,) what the gate decided on.
        teaches: (N,) bool, which rows have a gradient; None: all of a score.
        decision: the gate's, about all rows.
        exact: whether those were exact sizes.
        differentiated: (B,) or (B, T) log-probs of the kept rows; None: there were none.
        ranks: the processes.
    """
    used = score if teaches is None else score.where(teaches.bool(), 0)
    noise = expected_noise(used, decision.probability)
    if exact:
        return noise, None
    used, keep, weight = (ranks.own(part) for part in (score, decision.keep, decision.weight))
    own = torch.zeros(4, dtype=torch.float64, device="cpu")
    if differentiated is not None:
        of_kept = row_scores(size, inputs, differentiated)
        own = noise_sums(of_kept[keep], used[keep], weight[keep]).cpu()
    sums: list[float] = ranks.add(own).tolist()
    return noise * noise_ratio(*sums), sums
