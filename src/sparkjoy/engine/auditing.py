"""A step's audit: draft and policy on the same rows, counted like all other passes."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sparkjoy.drafts.audit import AuditResult, recall, spearman
from sparkjoy.drafts.draft import Draft
from sparkjoy.engine.deciding import row_scores
from sparkjoy.engine.flops import FlopCount
from sparkjoy.engine.inputs import Inputs
from sparkjoy.engine.ledger import Ledger
from sparkjoy.engine.passes import HowToRun, Passes, Seen
from sparkjoy.engine.screening import LogProbFunction
from sparkjoy.scores import ScoreFunction


def audited(
    draft: Draft,
    log_prob_fn: LogProbFunction,
    inputs: Inputs,
    ledger: Ledger,
    how: HowToRun,
    score: ScoreFunction,
    rate: float,
    lessons: list[Seen] | None,
) -> AuditResult | None:
    """Compare the draft with the policy, if it is due; the draft is given up if its recall has been too low.

    Args:
        draft: under audit.
        log_prob_fn: the policy's.
        inputs: the rows of this process.
        ledger: counts the passes.
        how: the options they run by.
        score: of exact log-probs.
        rate: what the gate keeps.
        lessons: where to put the rows and their exact log-probs; None: nowhere.
    """
    rows = draft.rows_to_audit(inputs.total)
    if rows is None:
        return None
    assert draft.audit is not None  # else none is due
    part = inputs if len(rows) == inputs.total else inputs.take(rows.to(inputs.advantages.device))
    passes = Passes(log_prob_fn, part, ledger, how, lessons=lessons)
    work = partial(_given, part) if draft.source is None else partial(_screened, passes, draft)
    counts = ledger.counts_flops and draft.counts_flops
    drafted, draft_seconds, draft_flops = _measured(work, counts)
    exact, exact_seconds, exact_flops = _measured(partial(_screened, passes, None), counts)
    true, guessed = row_scores(score, part, exact), row_scores(draft.score or score, part, drafted)
    found = recall(true, guessed, rate, min(draft.verify or 1.0, 1 / rate))
    if how.ranks.size > 1:  # one verdict for all processes
        found = how.ranks.add(torch.tensor([found], dtype=torch.float64, device="cpu")).item() / how.ranks.size
    draft.judge(found)
    alone = recall(true, guessed, rate)
    return AuditResult(found, alone, spearman(true, guessed), draft_seconds, exact_seconds, draft_flops, exact_flops)


def _given(part: Inputs) -> Tensor:
    assert part.log_probs is not None  # the call saw to it
    return part.log_probs


def _screened(passes: Passes, draft: Draft | None) -> Tensor:
    seen = passes.screen(None, None if draft is None else draft.source)
    assert seen is not None  # there are rows
    return seen


def _measured(work: Callable[[], Tensor], flops: bool) -> tuple[Tensor, float | None, int | None]:
    """What `work` returns, and either its FLOPs or its seconds: counting takes time, and a cache forgets nothing."""
    if flops:
        with FlopCount() as count:
            result = work()
        return result, None, count.flops
    began = time.perf_counter()
    result = work()
    return result, time.perf_counter() - began, None
