"""A cheap draft proposes the samples worth a backward pass, and the policy itself decides among them.

As speculative decoding drafts tokens. Now and then an audit compares draft and policy on the same rows; a draft that
has gone bad is given up for exact screening.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from sparkjoy import checks, states
from sparkjoy.drafts.audit import Audit, AuditResult
from sparkjoy.gates.decision import Gate, rule_of
from sparkjoy.scores import SCORE, ScoreFunction, reads_log_probs
from sparkjoy.signs import Rule, rate_count


@runtime_checkable
class LearningSource(Protocol):
    """A source that is told, after every step, the exact log-probs that were computed in it anyway."""

    def __call__(self, rows: Any) -> Tensor: ...

    def learn(self, seen: Sequence[tuple[Any, Tensor]]) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Drafting:
    """What a draft did in one step.

    Args:
        proposed: rows that went on to the gate: by the draft, or by their sign; without verification, the kept ones.
        exact: whether the draft has been given up for exact screening.
        learn_seconds: what teaching the source took.
        audit: of this step, if it was one to be audited.
    """

    proposed: int
    exact: bool
    learn_seconds: float
    audit: AuditResult | None


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
    >>> report.plan, report.drafting.proposed, report.kept, report.backward_rows
    ('draft', 8, 2, 2)

    Args:
        source: `rows -> log-probs`, cheaper than the policy's; what has `learn` and a state is taught and saved. None:
            the `log_probs=` of the call are the draft, such as an older sampler's.
        verify: how many times the rate to propose, at least 1; with a price alone, rows whose drafted score is above it
            are proposed. For a hard gate without negative share. None: the draft decides.
        audit: when to compare, and under what recall to give the draft up; None: never.
        score: `(advantages, log_probs) -> (B,)` or (B, T), of drafted log-probs; None: that of the step.

    Raises:
        ValueError: an option outside its range.
    """

    def __init__(
        self,
        source: Callable[[Any], Tensor] | None,
        *,
        verify: float | None = None,
        audit: Audit | None = None,
        score: ScoreFunction | None = None,
    ) -> None:
        if source is not None:
            checks.function("source", source, "a function from rows to log-probs, or None", ...)
        if verify is not None:
            expected = "how many times the rate to propose, at least 1"
            verify = checks.number("verify", verify, expected, lambda verify: verify >= 1)
        if audit is not None:
            checks.instance("audit", audit, Audit, "an Audit(...), or None for never")
        if score is not None:
            checks.function("score", score, SCORE, ..., ...)
        self.source = source
        self.verify = verify
        self.audit = audit
        self.score = score
        self.exact = False
        """Whether it has been given up for exact screening."""
        self._generator = torch.Generator("cpu").manual_seed(0)
        self._steps = 0
        self._recalls: list[float] = []

    @property
    def learns(self) -> bool:
        """Whether the source is to be taught."""
        return isinstance(self.source, LearningSource) and not self.exact

    def check(self, gate: Gate | None, score: ScoreFunction | None) -> None:
        """Raise a ValueError where there is nothing to draft, or proposals cannot be verified: the gate is not hard."""
        if gate is None:
            raise ValueError("draft is given with the gate None, which keeps every row; expected a gate, or no draft.")
        if score is not None and not reads_log_probs(score):
            raise ValueError(
                f"draft is given with a score that reads no log-probs, {checks.described(score)}: there are none to "
                "draft; leave the draft out."
            )
        if self.verify is not None:
            self.rule(gate)

    def rule(self, gate: Gate) -> Rule:
        """The rule of a hard gate, by which rows are proposed.

        Raises:
            ValueError: it has none, or keeps a share of negative scores.
        """
        rule = rule_of(gate)
        if rule is None or rule.negative_share > 0:
            raise ValueError(
                f"verify is given with the gate {checks.described(gate)}; expected a hard KondoGate of no negative "
                "share: proposed are the rows of highest drafted score, and nothing is drawn. With other gates leave "
                "verify out: the draft then decides alone."
            )
        return rule

    def propose(self, score: Tensor, rule: Rule, kept: int, total: int) -> Tensor:
        """(N,) bool, which rows the policy is to decide about.

        >>> Draft(None, verify=2).propose(torch.tensor([3.0, 0.0, 1.0, 2.0]), Rule(rate=0.25), kept=0, total=4)
        tensor([ True, False, False,  True])

        Args:
            score: (N,) drafted ones; 0 for rows that are settled.
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

    def rows_to_audit(self, total: int) -> Tensor | None:
        """(n,) which of `total` rows to compare in this step, None where it is none to be audited. Counts a step."""
        self._steps += 1
        audit = self.audit
        if audit is None or self.exact or self._steps % audit.every:
            return None
        if audit.rows is None or audit.rows >= total:
            return torch.arange(total, device="cpu")
        return torch.randperm(total, generator=self._generator, device="cpu")[: audit.rows].sort().values

    @property
    def counts_flops(self) -> bool:
        """Whether this step's audit, if any, is one that counts FLOPs instead of seconds: every other one."""
        return self.audit is not None and self._steps // self.audit.every % 2 == 1

    def judge(self, recall: float) -> None:
        """Take the recall of an audit in; gives the draft up, with a warning, if it has been too low."""
        assert self.audit is not None
        audit = self.audit
        self._recalls = [*self._recalls, recall][-audit.window :]
        mean = sum(self._recalls) / len(self._recalls)
        if len(self._recalls) == audit.window and mean < audit.floor:
            self.exact = True
            warnings.warn(
                f"the draft found {100 * mean:.0f}% of the rows to keep in the last {audit.window} audits, less than "
                f"the {100 * audit.floor:g}% asked for: screening is exact from here on.",
                stacklevel=5,
            )

    def learn(self, seen: Sequence[tuple[Any, Tensor]]) -> None:
        """Teach the source, if it learns, the exact log-probs of the rows seen."""
        if isinstance(self.source, LearningSource) and not self.exact:
            self.source.learn(seen)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to draft and audit as an unbroken one would."""
        return {
            "source": self.source.state_dict() if isinstance(self.source, LearningSource) else {},
            "generator": self._generator.get_state(),
            "steps": self._steps,
            "recalls": list(self._recalls),
            "exact": self.exact,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        states.check("Draft", state, **STATE)
        if isinstance(self.source, LearningSource):
            self.source.load_state_dict(state["source"])
        self._generator.set_state(state["generator"])
        self._steps = state["steps"]
        self._recalls = list(state["recalls"])
        self.exact = state["exact"]


def _takes(generator: torch.Generator, state: Any) -> bool:
    try:
        generator.set_state(state)
    except Exception:  # torch has many kinds for what is wrong with a state
        return False
    return True


STATE = {
    "source": states.is_state,
    "generator": lambda value: _takes(torch.Generator("cpu"), value),
    "steps": states.is_count,
    "recalls": lambda value: isinstance(value, list) and all(map(checks.is_number, value)),
    "exact": lambda value: isinstance(value, bool),
}
"""What it remembers, and what each may be."""
