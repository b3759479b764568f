"""What a gate decides on: what is known, what signs settle, what a draft proposes, and what the policy then says."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparkjoy.drafts.draft import Draft
from sparkjoy.engine.deciding import row_scores
from sparkjoy.engine.inputs import Inputs
from sparkjoy.engine.passes import Graph, HowToRun, Passes
from sparkjoy.engine.plan import BACKWARD_OVER_FORWARD, KNOWN, Choice, choose
from sparkjoy.engine.processes.ranks import Ranks, Scored
from sparkjoy.gates import Gate
from sparkjoy.gates.decision import rule_of
from sparkjoy.scores import ScoreFunction, reads_log_probs, sign_of_advantage
from sparkjoy.signs import Rule, Undecided, mixed, undecided, worth


class Asked(NamedTuple):
    """Who decides, on what, and what is known from earlier steps.

    Args:
        gate: decides.
        score: on what.
        draft: proposes, or decides; None: there is none, or it was given up.
        kept_fraction: kept of late, for gates without a rate; None: not known yet.
        backward_over_forward: r; None: not known.
    """

    gate: Gate
    score: ScoreFunction
    draft: Draft | None
    kept_fraction: float | None
    backward_over_forward: float | None


class Sight(NamedTuple):
    """What is seen of a batch before the gate decides.

    Args:
        choice: the plan by which it was seen.
        score: (B,); where signs or a draft have settled a row, any number of the sign that says so.
        graph: differentiable log-probs of all rows that may be kept, where that was the cheapest way to see them.
        exact: whether scores are of the policy as it is now.
        priced: whether the row at the margin has a score of its own.
        proposed: rows that a draft let through; None: no draft was asked.
    """

    choice: Choice
    score: Tensor
    graph: Graph | None = None
    exact: bool = False
    priced: bool = True
    proposed: int | None = None


def seen(asked: Asked, inputs: Inputs, passes: Passes, how: HowToRun) -> Sight:
    """By log-probs that need no pass, or else by the cheapest passes that tell enough."""
    draft, log_probs = asked.draft, inputs.log_probs
    if log_probs is None and not reads_log_probs(asked.score):
        log_probs = inputs.blank_log_probs()
    if log_probs is not None and draft is None:
        return Sight(KNOWN, row_scores(asked.score, inputs, log_probs))
    if draft is not None and draft.source is None and draft.verify is None:
        assert log_probs is not None  # the call saw to it
        return Sight(KNOWN, row_scores(draft.score or asked.score, inputs, log_probs))
    return _looked(asked, inputs, passes, how)


def _looked(asked: Asked, inputs: Inputs, passes: Passes, how: HowToRun) -> Sight:
    """Signs first, then the draft, then the policy about what they leave open."""
    score, draft = asked.score, asked.draft
    ranks, rule = how.ranks, rule_of(asked.gate)
    signs_tell = all(map(sign_of_advantage, (score, (draft and draft.score) or score)))
    signs_tell = signs_tell and not ranks.sum(int(mixed(inputs.advantages)))
    value = worth(inputs.advantages)
    rows = undecided(rule if signs_tell else None, value, ranks.sum)
    narrowed_by, proposed = "signs of the advantages", None
    if draft is not None:
        drafted = _drafted(draft, score, inputs, passes, rows.open, ranks)
        if draft.verify is None:
            reason = f"A draft decides about {int(rows.open.count_nonzero())} of {inputs.total} rows."
            value = torch.where(rows.open, drafted, value.to(drafted.dtype))
            return Sight(Choice("draft", reason), value, priced=_priced(rule, rows, ranks))
        rows = Undecided(rows.kept, rows.open & _proposed(draft, drafted, draft.rule(asked.gate), rows.kept, ranks))
        value = value.where(rows.kept | rows.open, 0)
        narrowed_by, proposed = "signs of the advantages and a draft", ranks.sum(int(_either(rows).count_nonzero()))

    possible = _either(rows)
    # Several processes decide before any of them differentiates: all skip the passes, or none.
    undivided = ranks.size == 1 and how.packing.holds(inputs, int(possible.count_nonzero()))
    quota = None if rule is None else rule.quota(ranks.total(inputs.total))
    ratio = asked.backward_over_forward or BACKWARD_OVER_FORWARD
    choice = choose(rows, inputs.total, quota, undivided, asked.kept_fraction, ratio, narrowed_by)
    any_open = ranks.most(int(rows.open.any()))
    passes.ledger.lap("screen")
    graph = passes.forward(_indices(possible)) if choice.plan == "dense" else None
    log_probs = None if graph is None else graph.seen
    if any_open and graph is None:
        log_probs = passes.screen(_indices(rows.open))
    if log_probs is not None:
        found = row_scores(score, inputs, log_probs)
        value = torch.where(rows.open if graph is None else possible, found, value.to(found.dtype))
    priced = graph is not None or _priced(rule, rows, ranks)
    choice = choice if draft is None else Choice("draft", choice.reason)
    return Sight(choice, value, graph, True, priced, proposed)


def _drafted(draft: Draft, score: ScoreFunction, inputs: Inputs, passes: Passes, open_: Tensor, ranks: Ranks) -> Tensor:
    """(B,) scores of the open rows by the draft, 0 elsewhere."""
    log_probs = inputs.log_probs
    if draft.source is not None:
        # A draft may run a sharded policy, whose passes are meetings: where one process asks it, all do.
        log_probs = passes.screen(_indices(open_), draft.source) if ranks.most(int(open_.any())) else None
    if log_probs is None:
        return torch.zeros_like(worth(inputs.advantages))
    return row_scores(draft.score or score, inputs, log_probs).where(open_, 0)


def _proposed(draft: Draft, drafted: Tensor, rule: Rule, kept: Tensor, ranks: Ranks) -> Tensor:
    """(B,) bool, this process's part of what is proposed of all processes' rows."""
    everywhere = ranks.gather(Scored(drafted, None, None)).score
    proposed = draft.propose(everywhere, rule, ranks.sum(int(kept.count_nonzero())), ranks.total(len(drafted)))
    return ranks.own(proposed)


def _priced(rule: Rule | None, rows: Undecided, ranks: Ranks) -> bool:
    """Whether the row at the margin has a score: a rate may draw the line among rows that signs keep."""
    return rule is None or rule.rate is None or not ranks.most(int(rows.kept.any()))


def _either(rows: Undecided) -> Tensor:
    return rows.kept | rows.open


def _indices(rows: Tensor) -> Tensor | None:
    """Where `rows` (B,) is true; None where it is everywhere."""
    return None if bool(rows.all()) else rows.nonzero().squeeze(1)
