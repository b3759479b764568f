"""A cheap draft proposes the samples worth a backward pass, and the policy itself decides among them.

    draft the rows in doubt -> propose the best of them -> exact log-probs of those -> gate -> backward on the survivors

As speculative decoding drafts tokens. Now and then an audit compares draft and policy on the same rows; a draft that
has gone bad is given up for exact screening.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from sparkjoy import checks, states
from sparkjoy.engine.audit import Audit, AuditResult, measured, recall, spearman
from sparkjoy.engine.backward import GatedBackward
from sparkjoy.engine.deciding import row_scores
from sparkjoy.engine.flops import KnownFlops
from sparkjoy.engine.inputs import Inputs, check_inputs
from sparkjoy.engine.ledger import Ledger
from sparkjoy.engine.packing import Packing
from sparkjoy.engine.passes import Normalizer, Passes
from sparkjoy.engine.report import BackwardReport
from sparkjoy.engine.screening import LogProbFunction
from sparkjoy.gates import Decision, Gate
from sparkjoy.gates.decision import GATE, load_state, rule_of, state_of
from sparkjoy.scores import SCORE, ScoreFunction, sign_of_advantage
from sparkjoy.signs import mixed, rate_count, undecided, worth

Seen = tuple[Any, Tensor]
"""Rows, and their exact log-probs without a graph."""


def _takes(generator: torch.Generator, state: Any) -> bool:
    try:
        generator.set_state(state)
    except Exception:  # torch has many kinds for what is wrong with a state
        return False
    return True


STATE = {
    "step": states.is_state,
    "gate": states.is_state,
    "screen": states.is_state,
    "known_flops": KnownFlops.fits,
    "generator": lambda value: _takes(torch.Generator(), value),
    "steps": states.is_count,
    "kept_fraction": lambda value: checks.is_number(value) and 0 <= value <= 1,
    "recalls": lambda value: isinstance(value, list) and all(map(checks.is_number, value)),
    "exact": lambda value: isinstance(value, bool),
}
"""What it remembers, and what each may be."""


@runtime_checkable
class LearningScreener(Protocol):
    """A screener that is told, after every step, the exact log-probs that were computed in it anyway."""

    def __call__(self, rows: Any) -> Tensor: ...

    def learn(self, seen: Sequence[Seen]) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Screening:
    """How one step's rows were screened.

    Args:
        proposed: rows that the draft let through to the gate; without verification these are the kept ones.
        exact: whether the draft has been given up for exact screening.
        learn_seconds: what teaching the screener took.
        audit: of this step, if it was one to be audited.
    """

    proposed: int
    exact: bool
    learn_seconds: float
    audit: AuditResult | None


@dataclass(frozen=True)
class SpeculativeReport(BackwardReport):
    """A `BackwardReport`, and how the rows were screened.

    Its `screened_rows` are those drafted, and those verified without a graph; its seconds of "screen" are those of
    drafting, learning and auditing.
    """

    screening: Screening


class SpeculativeBackward:
    """`GatedBackward` with a draft that is verified, taught and audited.

    With `verify=m` the draft proposes the ⌈m ρ N⌉ rows of highest drafted score, and the gate decides on the exact
    scores of these alone: all others count as skipped. Their exact log-probs come from one forward pass over the
    proposed rows, with a graph where that is cheaper. Without `verify` the gate decides on the drafted scores. Rows
    that the signs of the advantages already rule out are not drafted, where score and draft score are delight.

    >>> import torch, sparkjoy as sj
    >>> from sparkjoy.testing import TinyPolicy
    >>> policy, draft = TinyPolicy(4, 3), TinyPolicy(4, 3, seed=1)
    >>> batch = {"state": torch.randn(100, 4), "action": torch.randint(3, (100,))}
    >>> step = sj.SpeculativeBackward(sj.KondoGate(rate=0.03), draft.log_probs, verify=4)
    >>> report = step(policy.log_probs, batch, advantages=torch.randn(100))
    >>> report.screening.proposed, report.kept, report.backward_rows
    (12, 3, 3)

    Args:
        gate: as `GatedBackward`'s; with `verify` a hard `KondoGate`.
        screen: `rows -> log-probs`, cheaper than the policy's; what has `learn` and a state is taught and saved.
        verify: how many times the rate to propose, at least 1; with a price alone, rows whose drafted score is above it
            are proposed. None: the draft decides.
        audit: when to compare, and under what recall to give the draft up; None: never.
        draft_score: the score of drafted log-probs; None: `score`.
        score: of exact log-probs, as `GatedBackward`'s.
        normalizer: likewise; "batch" and "samples" count the whole batch.
        count_flops: likewise. Those of a screener whose cost varies, such as a cache, are those of its first pass.
        options: the other options of `GatedBackward`.

    Raises:
        ValueError: an option outside its range.
    """

    def __init__(
        self,
        gate: Gate,
        screen: LogProbFunction | None,
        *,
        verify: float | None = None,
        audit: Audit | None = None,
        draft_score: ScoreFunction | None = None,
        score: ScoreFunction | None = None,
        normalizer: Normalizer = "batch",
        count_flops: bool = False,
        **options: Any,
    ) -> None:
        if options.get("compare_every") is not None:
            raise ValueError(
                "compare_every compares whole batches, and a draft leaves the step part of one; give it to "
                "GatedBackward(gate, screen=...)."
            )
        checks.function("gate", gate, GATE, ..., ...)
        if screen is not None:
            checks.function("screen", screen, "a function from rows to log-probs, or None", ...)
        if audit is not None:
            checks.instance("audit", audit, Audit, "an Audit(...), or None for never")
        if draft_score is not None:
            checks.function("draft_score", draft_score, SCORE, ..., ...)
        if verify is not None:
            expected = "how many times the rate to propose, at least 1"
            verify = checks.number("verify", verify, expected, lambda verify: verify >= 1)
            rule = rule_of(gate)
            if rule is None or rule.negative_share > 0:
                raise ValueError(
                    f"verify is given with the gate {checks.described(gate)}; expected a hard KondoGate of no negative "
                    "share: proposed are the rows of highest drafted score, and nothing is drawn."
                )
        self.gate = gate
        self.screen = screen
        self.verify = verify
        self.audit = audit
        self.exact = False
        self._step = GatedBackward(gate, score=score, normalizer=normalizer, count_flops=count_flops, **options)
        self.normalizer = self._step.normalizer
        self.score = self._step.score
        self.draft_score = draft_score or self.score
        self._micro_batch_size: int | None = options.get("micro_batch_size")
        self._known_flops = KnownFlops() if count_flops else None
        self._generator = torch.Generator().manual_seed(0)
        self._steps = 0
        self._kept_fraction = 1.0
        self._recalls: list[float] = []

    def __call__(
        self,
        log_prob_fn: LogProbFunction,
        batch: Any,
        advantages: Tensor,
        *,
        log_probs: Tensor | None = None,
        behavior_log_probs: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> SpeculativeReport:
        """Add the gradient of the kept samples to `.grad`.

        Args:
            log_prob_fn: as `GatedBackward`'s, and so are the others.
            batch: likewise.
            advantages: likewise.
            log_probs: drafted ones that are there already, such as an older sampler's; where there is no screen.
            behavior_log_probs: the denominator of a loss's ratio; default `log_probs`, else the current ones, detached.
            mask: likewise.

        Raises:
            ValueError: as `GatedBackward`, and where there is no draft, or two.
        """
        if (log_probs is None) == (self.screen is None):
            raise ValueError("expected either a screen or log_probs to draft with, and not both.")
        checks.function("log_prob_fn", log_prob_fn, "a function from rows to log-probs", ...)
        inputs = check_inputs(batch, advantages, log_probs, behavior_log_probs, mask)
        seen: list[Seen] = []
        screened = False

        def watched(rows: Any) -> Tensor:
            nonlocal screened
            current, with_graph = log_prob_fn(rows), torch.is_grad_enabled()
            again = with_graph and screened  # survivors of rows that were seen without a graph
            if isinstance(current, Tensor) and not again:
                seen.append((rows, current.detach()))
            screened = screened or not with_graph
            return current

        began = time.perf_counter()
        self._steps += 1
        audited = None
        if self.audit is not None and not self.exact and self._steps % self.audit.every == 0:
            audited = self._audited(watched, inputs, self.audit)
        audit_seconds = time.perf_counter() - began
        verifies = self.verify is not None and not self.exact
        report, proposed = self._verified(watched, inputs) if verifies else self._unverified(watched, inputs)
        self._kept_fraction = report.kept / report.total
        began = time.perf_counter()
        if isinstance(self.screen, LearningScreener) and not self.exact:
            self.screen.learn(seen)
        learn_seconds = time.perf_counter() - began
        seconds = {**report.seconds, "screen": report.seconds["screen"] + audit_seconds + learn_seconds}
        screening = Screening(proposed, self.exact, learn_seconds, audited)
        return SpeculativeReport(**{**vars(report), "seconds": seconds}, screening=screening)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to draft, audit and decide as an unbroken one would."""
        return {
            "step": {**self._step.state_dict(), "gate": {}},
            "gate": state_of(self.gate),
            "screen": self.screen.state_dict() if isinstance(self.screen, LearningScreener) else {},
            "known_flops": {} if self._known_flops is None else self._known_flops.state_dict(),
            "generator": self._generator.get_state(),
            "steps": self._steps,
            "kept_fraction": self._kept_fraction,
            "recalls": list(self._recalls),
            "exact": self.exact,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        states.check("SpeculativeBackward", state, **STATE)
        self._step.gate = self.gate
        self._step.load_state_dict({**state["step"], "gate": state["gate"]})
        if isinstance(self.screen, LearningScreener):
            self.screen.load_state_dict(state["screen"])
        if self._known_flops is not None and state["known_flops"]:
            self._known_flops.load_state_dict(state["known_flops"])
        self._generator.set_state(state["generator"])
        self._steps = state["steps"]
        self._kept_fraction = state["kept_fraction"]
        self._recalls = list(state["recalls"])
        self.exact = state["exact"]

    def _unverified(self, log_prob_fn: LogProbFunction, inputs: Inputs) -> tuple[BackwardReport, int]:
        """The step decided by the draft, or, where that is given up, by the policy."""
        step = self._step
        step.gate, step.normalizer = self.gate, self.normalizer
        step.screen = None if self.exact else self.screen
        step.score = self.score if self.exact else self.draft_score
        behavior = inputs.log_probs if inputs.behavior_log_probs is None else inputs.behavior_log_probs
        report = step(
            log_prob_fn,
            inputs.batch,
            inputs.advantages,
            log_probs=None if self.exact else inputs.log_probs,
            behavior_log_probs=behavior,
            mask=inputs.mask,
        )
        return report, report.kept

    def _verified(self, log_prob_fn: LogProbFunction, inputs: Inputs) -> tuple[BackwardReport, int]:
        """The step on the proposed rows alone, reported as of the whole batch, and how many were proposed."""
        step, ledger = self._step, Ledger(self._known_flops)
        in_doubt = self._in_doubt(inputs)
        drafted = self._drafted(inputs, ledger, in_doubt)
        score = row_scores(self.draft_score, inputs, drafted)
        if in_doubt is not None:
            score = torch.zeros_like(score).index_copy(0, in_doubt, score[in_doubt])
        among = _Among(self.gate, self._proposed(score), score, inputs.row_tokens)
        step.gate, step.screen, step.score = among, None, self.score
        step.normalizer = self.normalizer
        if self.normalizer in ("batch", "samples"):
            step.normalizer = max(1, inputs.tokens(drafted)) if self.normalizer == "batch" else inputs.total
        ledger.lap("screen")
        part = inputs.take(among.rows)
        behavior = part.log_probs if part.behavior_log_probs is None else part.behavior_log_probs
        report = step(log_prob_fn, part.batch, part.advantages, behavior_log_probs=behavior, mask=part.mask)
        assert among.decision is not None  # every path of the engine asks its gate
        forward_flops = None if report.forward_flops is None else report.forward_flops + ledger.forward_flops
        seconds = {phase: report.seconds[phase] + ledger.seconds[phase] for phase in report.seconds}
        report = replace(
            report,
            decision=among.decision,
            total=inputs.total,
            screened_rows=report.screened_rows + ledger.screened_rows,
            screened_tokens=report.screened_tokens + ledger.screened_tokens,
            forward_flops=forward_flops,
            seconds=seconds,
        )
        return report, len(among.rows)

    def _in_doubt(self, inputs: Inputs) -> Tensor | None:
        """(n,) the rows that the signs of the advantages leave in the running, None for all: only those are drafted."""
        signs_tell = all(map(sign_of_advantage, (self.score, self.draft_score))) and not mixed(inputs.advantages)
        kept, open_ = undecided(rule_of(self.gate) if signs_tell else None, worth(inputs.advantages))
        rows = kept | open_
        return None if bool(rows.all() | ~rows.any()) else rows.nonzero().squeeze(1)

    def _drafted(self, inputs: Inputs, ledger: Ledger, rows: Tensor | None = None) -> Tensor:
        if self.screen is None:
            assert inputs.log_probs is not None  # the call saw to it
            return inputs.log_probs
        return self._seen(inputs, ledger, self.screen, rows)

    def _seen(self, inputs: Inputs, ledger: Ledger, source: LogProbFunction, rows: Tensor | None = None) -> Tensor:
        """Log-probs of `rows` (None: all) from `source`, without a graph; 0 for the others."""
        passes = Passes(source, inputs, ledger, packing=Packing(rows=self._micro_batch_size))
        passes.screen(rows, source)
        assert passes.seen is not None  # some rows were
        return passes.seen

    def _proposed(self, score: Tensor) -> Tensor:
        """(n,) the rows to verify, in the batch's order: at least one, so that there is something to decide on."""
        rule, verify = rule_of(self.gate), self.verify or 1.0
        if rule is None or rule.rate is None:
            before = state_of(self.gate)
            count = int(self.gate(score).keep.count_nonzero())
            load_state(self.gate, before)  # the exact scores are the ones to remember
        else:
            count = min(rate_count(min(1.0, rule.rate * verify), len(score)), int(score.count_nonzero()))
        ranked = score.masked_fill(score == 0, -math.inf).sort(descending=True, stable=True).indices
        return ranked[: max(1, count)].sort().values

    def _audited(self, log_prob_fn: LogProbFunction, inputs: Inputs, audit: Audit) -> AuditResult:
        """Compare the draft with the policy; gives the draft up, with a warning, if its recall has been too low."""
        if audit.rows is not None and audit.rows < inputs.total:
            drawn = torch.randperm(inputs.total, generator=self._generator)[: audit.rows].sort().values
            inputs = inputs.take(drawn.to(inputs.advantages.device))
        counts = self._known_flops is not None and self._steps // audit.every % 2 == 0
        drafted, draft_seconds, draft_flops = measured(lambda: self._drafted(inputs, Ledger(None)), counts)
        exact, exact_seconds, exact_flops = measured(lambda: self._seen(inputs, Ledger(None), log_prob_fn), counts)
        true, guessed = row_scores(self.score, inputs, exact), row_scores(self.draft_score, inputs, drafted)
        rate = getattr(self.gate, "rate", None)
        rate = max(1 / inputs.total, self._kept_fraction) if rate is None else rate
        found = recall(true, guessed, rate, min(self.verify or 1.0, 1 / rate))
        self._recalls = [*self._recalls, found][-audit.window :]
        mean = sum(self._recalls) / len(self._recalls)
        if len(self._recalls) == audit.window and mean < audit.floor:
            self.exact = True
            warnings.warn(
                f"the draft found {100 * mean:.0f}% of the rows to keep in the last {audit.window} audits, less than "
                f"the {100 * audit.floor:g}% asked for: screening is exact from here on.",
                stacklevel=3,
            )
        alone = recall(true, guessed, rate)
        return AuditResult(
            found, alone, spearman(true, guessed), draft_seconds, exact_seconds, draft_flops, exact_flops
        )


class _Among:
    """A gate on the proposed rows that decides on the whole batch: no other row is kept.

    Where the gate counts, the others stand aside with a score of 0; a price that looks at the batch's scores sees their
    drafted ones.
    """

    def __init__(self, gate: Gate, rows: Tensor, drafted: Tensor, cost: Tensor | None) -> None:
        rule = rule_of(gate)
        counts = rule is not None and rule.rate is not None
        self.rows = rows
        self.decision: Decision | None = None
        self._gate = gate
        self._others = torch.zeros_like(drafted) if counts else drafted
        self._cost = None if cost is None else cost.to(drafted.device)

    def __call__(self, score: Tensor, cost: Tensor | None = None) -> Decision:
        rows = self.rows
        proposed = torch.zeros_like(self._others, dtype=torch.bool).index_fill_(0, rows, True)
        decision = self._gate(self._others.index_copy(0, rows, score.to(self._others.dtype)), self._cost)
        keep = decision.keep & proposed
        price = decision.price if bool(keep.any()) else None
        self.decision = replace(decision, keep=keep, price=price, probability=decision.probability.where(proposed, 0))
        return Decision(keep[rows], price, self.decision.probability[rows], decision.weight[rows])
