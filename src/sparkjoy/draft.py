"""A cheap draft proposes the samples worth a backward pass, and the policy itself decides among them.

As speculative decoding drafts tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparkjoy import checks
from sparkjoy.gates.decision import Gate, rule_of
from sparkjoy.scores import SCORE, ScoreFunction, reads_log_probs
from sparkjoy.signs import Rule, rate_count


class Draft:
    """Log-probs from a cheaper source than the policy, to decide on, or to propose what the policy decides about.

    With `verify=m` the ⌈m ρ N⌉ rows of highest drafted score are proposed, and the gate decides on the exact scores of
    these alone: all others are skipped. Their exact log-probs come from one forward pass over the proposed rows, with a
    graph where that is cheaper. Without `verify` the gate decides on the drafted scores: right for an unbiased gate,
    whose expected gradient does not depend on them. Rows that the signs of the advantages settle are not drafted.

    >>> import torch, sparkjoy as sj
    >>> from sparkjoy.testing import TinyPolicy
    >>> policy, small = TinyPolicy(4, 3), TinyPolicy(4, 3, seed=1)
    >>> batch = {"state": torch.randn(100, 4), "action": torch.randint(3, (100,))}
    >>> step = sj.GatedBackward(sj.KondoGate(rate=0.02), draft=sj.Draft(small.log_probs, verify=4))
    >>> report = step(policy.log_probs, batch, torch.ones(100))
    >>> report.plan, report.proposed, report.kept, report.backward_rows
    ('draft', 8, 2, 2)

    Args:
        source: `rows -> log-probs`, cheaper than the policy's. None: the `log_probs=` of the call are the draft, such
            as an older sampler's.
        verify: how many times the rate to propose, at least 1; with a price alone, rows whose drafted score is above it
            are proposed. For a hard gate without negative share. None: the draft decides.
        score: `(advantages, log_probs) -> (B,)` or (B, T), of drafted log-probs; None: that of the step.

    Raises:
        ValueError: an option outside its range.
    """

    def __init__(
        self,
        source: Callable[[Any], Tensor] | None,
        *,
        verify: float | None = None,
        score: ScoreFunction | None = None,
    ) -> None:
        if source is not None:
            checks.function("source", source, "a function from rows to log-probs, or None", ...)
        if verify is not None:
            expected = "how many times the rate to propose, at least 1"
            verify = checks.number("verify", verify, expected, lambda verify: verify >= 1)
        if score is not None:
            checks.function("score", score, SCORE, ..., ...)
        self.source = source
        self.verify = verify
        self.score = score

    def check(self, gate: Gate | None, score: ScoreFunction | None) -> None:
        """Raise a ValueError where there is nothing to draft, or proposals cannot be verified: the gate is not hard."""
        if gate is None:
            raise ValueError("draft is given with the gate None, which keeps every row; expected a gate, or no draft.")
        if score is not None and not reads_log_probs(score):
            raise ValueError(
                f"draft is given with a score that reads no log-probs, {checks.described(score)}: there are none to "
                "draft; leave the draft out."
            )
        rule = rule_of(gate)
        if self.verify is not None and (rule is None or rule.negative_share > 0):
            raise ValueError(
                f"verify is given with the gate {checks.described(gate)}; expected a hard KondoGate of no negative "
                "share: proposed are the rows of highest drafted score, and nothing is drawn. With other gates leave "
                "verify out: the draft then decides alone."
            )

    def check_call(self, log_probs: Tensor | None) -> None:
        """Raise a ValueError where log-probs are given beside a source, or neither is."""
        if log_probs is None and self.source is None:
            raise ValueError("the draft has no source and log_probs is None; expected one of them: give log_probs.")
        if log_probs is not None and self.source is not None:
            raise ValueError(
                "both the draft's source and log_probs are given; expected one of them. Current log-probs need no "
                "draft; Draft(None, ...) drafts by log_probs; for a ratio give behavior_log_probs."
            )

    def propose(self, score: Tensor, rule: Rule, kept: int, total: int) -> Tensor:
        """(N,) bool, which rows the policy is to decide about.

        >>> Draft(None, verify=2).propose(torch.tensor([3.0, 0.0, 1.0, 2.0]), Rule(rate=0.25), kept=0, total=4)
        tensor([ True, False, False,  True])

        Args:
            score: (N,) drafted ones; 0 for rows that are decided.
            rule: the gate's.
            kept: rows that are kept whatever their scores.
            total: all rows.
        """
        if rule.rate is None:
            return score > (rule.floor or 0.0)
        count = rate_count(min(1.0, rule.rate * (self.verify or 1.0)), total) - kept
        count = min(max(0, count), int(score.count_nonzero()))
        best = score.masked_fill(score == 0, -math.inf).sort(descending=True, stable=True).indices[:count]
        return torch.zeros_like(score, dtype=torch.bool).index_fill_(0, best, True)
