"""A step whose draft is compared with the policy now and then, is taught, and is given up where it has gone bad."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from sparkjoy import checks, states
from sparkjoy.draft import Draft
from sparkjoy.gates import Gate
from sparkjoy.scores import ScoreFunction, delight
from sparkjoy.step.backward import GatedBackward
from sparkjoy.step.batches import take
from sparkjoy.step.counts import COUNTED, Counting
from sparkjoy.step.deciding import row_scores
from sparkjoy.step.inputs import LogProbFunction, check_inputs
from sparkjoy.step.passes import Passes
from sparkjoy.step.report import BackwardReport
from sparkjoy_lab.drafts.audit import Audit, AuditResult, recall, spearman
from sparkjoy_lab.flops import CountedFlops, FlopCount


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


class DraftedBackward:
    """`GatedBackward` with a `Draft`, whose source is taught what the step computes anyway, and audited.

    >>> import sparkjoy as sj
    >>> from sparkjoy.testing import TinyPolicy
    >>> policy, small = TinyPolicy(4, 3), TinyPolicy(4, 3, seed=1)
    >>> batch = {"state": torch.randn(100, 4), "action": torch.randint(3, (100,))}
    >>> step = DraftedBackward(sj.KondoGate(rate=0.02), small.log_probs, verify=4, audit=Audit(every=1, floor=0))
    >>> report = step(policy.log_probs, batch, torch.ones(100))
    >>> report.proposed, report.kept, step.drafting.audit is None
    (8, 2, False)

    Args:
        gate: as `GatedBackward`'s.
        source: as `Draft`'s; one that has `learn` and a state is taught and saved.
        verify: as `Draft`'s.
        score: of exact log-probs, as `GatedBackward`'s.
        drafted_score: as `Draft`'s score.
        audit: when to compare draft and policy on the same rows, and under what recall to give the draft up.
        rate: what the gate keeps, for the audits; None: what it has kept in the last steps.
        flops: counts the source's; None: nobody does.
        options: of `GatedBackward`, but for `trim` and `group_by`.

    Raises:
        ValueError: an option outside its range, or one of these two.
    """

    def __init__(
        self,
        gate: Gate,
        source: Callable[[Any], Tensor] | None,
        *,
        verify: float | None = None,
        score: ScoreFunction | None = None,
        drafted_score: ScoreFunction | None = None,
        audit: Audit,
        rate: float | None = None,
        flops: CountedFlops | None = None,
        **options: Any,
    ) -> None:
        for name in ("trim", "group_by"):
            if options.get(name) is not None:
                raise ValueError(f"{name} is given, which reads the batch; a step that numbers its rows takes none.")
        self.source, self.audit, self.verify, self._rate = source, audit, verify, rate
        self._ask = source if source is None or flops is None else flops.of(source, draft=True)
        self._score = score or delight
        self._drafted_score = drafted_score or self._score
        draft = Draft(None if source is None else self._drafted_log_probs, verify=verify, score=drafted_score)
        self._drafted = GatedBackward(gate, draft=draft, score=score, **options)
        self._exact = GatedBackward(gate, score=score, **options)
        self.exact = False
        """Whether the draft has been given up for exact screening."""
        self.drafting: Drafting | None = None
        """What it did in the last step."""
        self._generator = torch.Generator("cpu").manual_seed(0)
        self._steps = 0
        self._recalls: list[float] = []

    @property
    def backward_over_forward(self) -> float | None:
        """As `GatedBackward`'s."""
        return self._drafted.backward_over_forward

    @backward_over_forward.setter
    def backward_over_forward(self, ratio: float | None) -> None:
        self._drafted.backward_over_forward = self._exact.backward_over_forward = ratio

    def __call__(
        self,
        log_prob_fn: LogProbFunction,
        batch: Any,
        advantages: Tensor,
        *,
        log_probs: Tensor | None = None,
        behavior_log_probs: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> BackwardReport:
        """As `GatedBackward`'s; an audit's rows count as screened."""
        total = len(advantages)
        numbered = {"rows": batch, "number": torch.arange(total, device=advantages.device)}
        taught, lessons = torch.zeros(total, dtype=torch.bool, device=advantages.device), []

        def watched(part: dict[str, Any]) -> Tensor:
            """Each row's log-prob is a lesson once: of the kept rows some were screened, and others kept by sign."""
            found = log_prob_fn(part["rows"])
            new = (~taught[part["number"]]).nonzero().squeeze(1)
            if len(new):
                taught[part["number"]] = True
                every = len(new) == len(found)
                lessons.append((part["rows"] if every else take(part["rows"], new), found.detach()[new]))
            return found

        audit, counting = None, Counting()
        self._steps += 1
        if not self.exact and self._steps % self.audit.every == 0:
            rows = torch.arange(total, device="cpu")
            if self.audit.rows is not None and self.audit.rows < total:
                rows = torch.randperm(total, generator=self._generator, device="cpu")[: self.audit.rows].sort().values
            known = None if self.source is not None or log_probs is None else log_probs[rows]
            of_rows = None if mask is None else mask[rows]
            inputs = check_inputs(take(numbered, rows), advantages[rows], known, None, of_rows)
            audit = self._audited(Passes(watched, inputs, counting, self._drafted._options))
        if self.exact:  # given log-probs are no better than the draft they were
            behavior_log_probs = log_probs if behavior_log_probs is None else behavior_log_probs
            log_probs = None
        step = self._exact if self.exact else self._drafted
        report = step(
            watched, numbered, advantages, log_probs=log_probs, behavior_log_probs=behavior_log_probs, mask=mask
        )
        start = time.perf_counter()
        if isinstance(self.source, LearningSource) and not self.exact:
            self.source.learn(lessons)
        proposed = report.kept if report.proposed is None else report.proposed
        self.drafting = Drafting(proposed, self.exact, time.perf_counter() - start, audit)
        return replace(report, **{name: getattr(report, name) + counting.counts[name] for name in COUNTED})

    def _drafted_log_probs(self, part: dict[str, Any]) -> Tensor:
        assert self._ask is not None  # else the draft has none
        return self._ask(part["rows"])

    def _audited(self, passes: Passes) -> AuditResult:
        """Compare the draft with the policy; it is given up, with a warning, if its recall has been too low."""
        counts = self._steps // self.audit.every % 2 == 1  # seconds at every other audit: counting takes time
        inputs = passes.inputs
        draft = None if self.source is None else self._drafted_log_probs
        work = (lambda: inputs.log_probs) if draft is None else (lambda: passes.screen(None, draft))
        drafted, draft_seconds, draft_flops = _measured(work, counts)
        exact, exact_seconds, exact_flops = _measured(lambda: passes.screen(None), counts)
        true, guessed = row_scores(self._score, inputs, exact), row_scores(self._drafted_score, inputs, drafted)
        kept = self._drafted.state_dict()["kept_fraction"]
        rate = self._rate or max(1e-9, 1.0 if kept is None else kept)
        found = recall(true, guessed, rate, min(self.verify or 1.0, 1 / rate))
        self._judge(found)
        alone = recall(true, guessed, rate)
        return AuditResult(
            found, alone, spearman(true, guessed), draft_seconds, exact_seconds, draft_flops, exact_flops
        )

    def _judge(self, found: float) -> None:
        audit = self.audit
        self._recalls = [*self._recalls, found][-audit.window :]
        mean = sum(self._recalls) / len(self._recalls)
        if len(self._recalls) == audit.window and mean < audit.floor:
            self.exact = True
            self._exact.load_state_dict(self._drafted.state_dict())
            warnings.warn(
                f"the draft found {100 * mean:.0f}% of the rows to keep in the last {audit.window} audits, less than "
                f"the {100 * audit.floor:g}% asked for: screening is exact from here on.",
                stacklevel=4,
            )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to decide, draft and audit as an unbroken one would."""
        return {
            "drafted": self._drafted.state_dict(),
            "exact_step": self._exact.state_dict(),
            "source": self.source.state_dict() if isinstance(self.source, LearningSource) else {},
            "generator": self._generator.get_state(),
            "steps": self._steps,
            "recalls": list(self._recalls),
            "exact": self.exact,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        states.check("DraftedBackward", state, **STATE)
        self._drafted.load_state_dict(state["drafted"])
        self._exact.load_state_dict(state["exact_step"])
        if isinstance(self.source, LearningSource):
            self.source.load_state_dict(state["source"])
        self._generator.set_state(state["generator"])
        self._steps, self.exact = state["steps"], state["exact"]
        self._recalls = list(state["recalls"])


def _measured(work: Callable[[], Any], flops: bool) -> tuple[Tensor, float | None, int | None]:
    """What `work` returns, and either its FLOPs or its seconds: counting takes time, and a cache forgets nothing."""
    if flops:
        with FlopCount() as count:
            result = work()
        return result, None, count.flops
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start, None


def _takes(generator: torch.Generator, state: Any) -> bool:
    try:
        generator.set_state(state)
    except Exception:  # torch has many kinds for what is wrong with a state
        return False
    return True


STATE = {
    "drafted": states.is_state,
    "exact_step": states.is_state,
    "source": states.is_state,
    "generator": lambda value: _takes(torch.Generator("cpu"), value),
    "steps": states.is_count,
    "recalls": lambda value: isinstance(value, list) and all(map(checks.is_number, value)),
    "exact": lambda value: isinstance(value, bool),
}
"""What it remembers, and what each may be."""
