"""One policy-gradient step that differentiates only the samples a gate keeps. Read this first.

    rollout -> log-probs without a graph -> score -> gate -> gather the kept rows -> loss -> backward

Skipped rows are left out of the batch before the differentiable forward pass, so they never enter the autograd graph.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparkjoy import checks, states
from sparkjoy.drafts.audit import AuditResult
from sparkjoy.drafts.draft import STATE as STATE_OF_DRAFT
from sparkjoy.drafts.draft import Draft, Drafting
from sparkjoy.engine.auditing import audited
from sparkjoy.engine.flops import KnownFlops
from sparkjoy.engine.inputs import Inputs, check_inputs
from sparkjoy.engine.ledger import Ledger
from sparkjoy.engine.looking import Asked
from sparkjoy.engine.normalizer import Normalizer, check_unbiased, checked_normalizer
from sparkjoy.engine.options import in_words
from sparkjoy.engine.packing import Trim, checked_packing
from sparkjoy.engine.passes import HowToRun, Passes, Seen
from sparkjoy.engine.processes.distributed import ranks_of
from sparkjoy.engine.report import BackwardReport
from sparkjoy.engine.screening import LogProbFunction
from sparkjoy.engine.step import decided, everything
from sparkjoy.gates import BudgetGate, Gate, KondoGate, SoftGate, UnbiasedGate
from sparkjoy.gates.decision import GATE, load_state, rule_of, state_of, weighted
from sparkjoy.gradients import Comparison, Comparisons, Gradients, sketches, sums
from sparkjoy.losses import LOSS, Loss, reinforce, size_of
from sparkjoy.scores import SCORE, ScoreFunction, delight

STATE = {
    "gate": states.is_state,
    "kept_fraction": lambda value: value is None or (checks.is_number(value) and 0 <= value <= 1),
    "backward_over_forward": lambda value: value is None or (checks.is_number(value) and value > 0),
    "known_flops": KnownFlops.fits,
    "draft": states.is_state,
    "comparisons": states.is_state,
}


class GatedBackward:
    """The gradient of the samples worth a backward pass: what stays the same from step to step.

    The gradient equals that of the full batch with skipped terms multiplied by zero, normalised the same way; only the
    work differs. With `gate=None` every row is kept, so a plain policy gradient, DG and the Kondo gate all run through
    one engine and one ledger.

    >>> import torch, sparkjoy as sj
    >>> policy = torch.nn.Linear(4, 3)
    >>> states, actions = torch.randn(100, 4), torch.randint(3, (100,))
    >>> def log_prob_fn(rows):
    ...     return policy(rows["states"]).log_softmax(1).gather(1, rows["actions"].unsqueeze(1)).squeeze(1)
    >>> step = sj.GatedBackward(sj.KondoGate(rate=0.03))
    >>> advantages = torch.tensor([1.0, -1.0]).repeat(50)
    >>> report = step(log_prob_fn, {"states": states, "actions": actions}, advantages)
    >>> report.kept, report.screened_rows, report.backward_rows  # of negative advantage none can be among the best 3
    (3, 50, 3)
    >>> print(report.plan, "-", report.reason.split(";")[0])
    screen - The signs of the advantages keep 0 and skip 50 of 100 rows

    Args:
        gate: decides which samples to keep; None: all of them. A `KondoGate` of rate 1 without a price is None. What a
            weighted gate keeps (`UnbiasedGate`) is weighted so that the expected gradient is that of the full batch.
        loss: `(log_probs, advantages, behavior_log_probs, mask) -> terms` to minimise, proportional to the advantage.
        score: `(advantages, log_probs) -> (B,)` or (B, T), which is summed over valid tokens; what the gate decides on.
            None: delight, or for a weighted gate the size of a row's gradient in the loss, `sparkjoy.losses.size_of`.
        draft: a `Draft`: log-probs to decide on, or to propose rows by, from a cheaper source than `log_prob_fn`; None:
            the policy's own, exact.
        normalizer: what the sum of the kept terms is divided by. "batch": all valid tokens of the call, kept or not
            (all samples for (B,)); "samples": B; "kept": valid tokens (samples) of the kept rows, for a gate
            that is not weighted; or a number.
        micro_batch_size: rows per forward and backward pass; None: all at once.
        micro_batch_tokens: columns of the mask per forward and backward pass, padding included; None: no limit.
        trim: `(batch, mask) -> (batch, columns)`, which cuts padding off a micro-batch and says which columns of the
            mask are left, such as `sj.TrimRight("tokens")`; rows then go by length, the longest first.
        group_by: entry of the batch, such as the prompts' tokens: rows of equal values go into one micro-batch where it
            holds them, so that a `log_prob_fn` that shares tokens finds them together.
        module: under several processes, the `DistributedDataParallel` or `fully_shard` module that `log_prob_fn` calls:
            then one decision is made about the rows of all processes; kept rows stay where they are, and a process with
            fewer runs rows of weight 0. "local": this process decides for itself.
        backward: called on each micro-batch's loss, for instance `accelerator.backward`, whose division by accelerate's
            gradient_accumulation_steps is undone: a call is normalised as `normalizer` says, and calls add up.
        count_flops: measure FLOPs, on the first passes over rows of a new shape and now and then again; these take
            longer, and run compiled functions uncompiled. Off, the report has None.
        backward_over_forward: r, what a backward pass costs in forward passes, for the choice of a plan; None: 2, or
            where FLOPs are counted that of the last call with a backward pass.
        compare_every: every so many steps the dense gradient of the same batch is computed too, for
            `report.comparison`: forward and backward passes over all rows more. `.grad` and gate are what they would be
            without. Warns, once, if the last 20 comparisons say that the gate hurts. None: never.

    Raises:
        ValueError: an option outside its range.
    """

    def __init__(
        self,
        gate: Gate | None,
        *,
        loss: Loss = reinforce,
        score: ScoreFunction | None = None,
        draft: Draft | None = None,
        normalizer: Normalizer = "batch",
        micro_batch_size: int | None = None,
        micro_batch_tokens: int | None = None,
        trim: Trim | None = None,
        group_by: str | None = None,
        module: nn.Module | Literal["local"] | None = None,
        backward: Callable[[Tensor], Any] = torch.Tensor.backward,
        count_flops: bool = False,
        backward_over_forward: float | None = None,
        compare_every: int | None = None,
    ) -> None:
        if gate is not None:
            checks.function("gate", gate, f"{GATE}, or None", ..., ...)
        checks.function("loss", loss, LOSS, ..., ..., ..., ...)
        if score is not None:
            checks.function("score", score, SCORE, ..., ...)
        if draft is not None:
            checks.instance("draft", draft, Draft, "a Draft(source, ...), or None").check(gate, score)
        checks.function("backward", backward, "a function of a loss, such as accelerator.backward", ...)
        normalizer = checked_normalizer(normalizer)
        check_unbiased(normalizer, gate)
        packing = checked_packing(micro_batch_size, micro_batch_tokens, trim, group_by)
        count_flops = checks.flag("count_flops", count_flops)
        if backward_over_forward is not None:
            backward_over_forward = checks.number(
                "backward_over_forward", backward_over_forward, "a number above 0, or None", lambda ratio: ratio > 0
            )
        if compare_every is not None:
            compare_every = checks.whole("compare_every", compare_every, "a whole number of steps, at least 1, or None")
        self.gate = gate
        self.loss = loss
        self._size = size_of(loss) if weighted(gate) else None
        self.score = score or self._size or delight
        self.draft = draft
        self.normalizer = normalizer
        self.backward = backward
        self._ranks = ranks_of(module)
        self._known_flops = KnownFlops() if count_flops else None
        self._packing = packing
        self._kept_fraction: float | None = None
        self._backward_over_forward = backward_over_forward
        self._comparisons = None if compare_every is None else Comparisons(compare_every)
        self._measures_ratio = count_flops and backward_over_forward is None

    def __call__(
        self,
        log_prob_fn: LogProbFunction,
        batch: Any,
        advantages: Tensor,
        *,
        log_probs: Tensor | None = None,
        behavior_log_probs: Tensor | None = None,
        mask: Tensor | None = None,
        step_number: int | None = None,
    ) -> BackwardReport:
        """Add the gradient of the kept samples to `.grad`; never steps an optimizer.

        With no sample kept there is no backward pass and `.grad` stays as it was: skip the optimizer step then, since
        Adam's momentum would still move the weights.

        Args:
            log_prob_fn: `rows -> (n,)` or `(n, T)` differentiable log-probs of the actions taken in `rows`.
            batch: a tensor, or a TensorDict, Mapping, namedtuple or dataclass of tensors, with leading dimension B.
            advantages: (B,), or (B, T) with log-probs of (B, T).
            log_probs: known ones to decide on, such as the sampler's; then deciding is free. Delight is the policy's as
                it is now: what stale or foreign actors recorded belongs into `behavior_log_probs`, or beside an
                `UnbiasedGate` with a floor; a token that was injected and recorded at log-prob 0 has no delight.
            behavior_log_probs: the denominator of a loss's ratio; default `log_probs`, else the current ones, detached.
            mask: (B, T), 1 for tokens that count; anything may stand where it is 0, NaN too.
            step_number: of your loop; under several processes all raise where it differs. Without it a process that
                leaves out a call, and goes on, is taken to be in step with the others' next one.

        Returns:
            A `BackwardReport`, counted from what ran.

        Raises:
            ValueError: NaN, infinite or misshapen input, before any `.grad` is touched; a log-prob that turns NaN or
                infinite while differentiating, with the number of its micro-batch. Any error says whether `.grad` has
                changed.
        """
        how = HowToRun(self.loss, self.normalizer, self._packing, self.backward, self._ranks)
        ledger = Ledger(self._known_flops)
        with self._ranks.together(ledger):
            checks.function("log_prob_fn", log_prob_fn, "a function from rows to log-probs")
            self._check_call(log_probs, mask)
            rule = rule_of(self.gate)
            keeps_all = self.gate is None or (rule is not None and rule.keeps_everything)
            # A NaN or infinite value would show in such a score; of several processes it is not known whose it was.
            score_tells = self.score is delight and rule is not None and not keeps_all and self._ranks.size == 1
            score_tells = score_tells and self.draft is None and behavior_log_probs is None and log_probs is not None
            inputs = check_inputs(batch, advantages, log_probs, behavior_log_probs, mask, score_tells)
            if step_number is not None:
                step_number = checks.whole("step_number", step_number, "a whole number of at least 0, or None", 0)
            self._ranks.open(inputs, partial(self._in_words, inputs, step_number))
            gate = None if keeps_all else self.gate
            gradients = self._gradients(gate)
            with gradients or nullcontext():
                return self._step(gate, log_prob_fn, inputs, how, ledger, gradients)

    def _step(
        self,
        gate: Gate | None,
        log_prob_fn: LogProbFunction,
        inputs: Inputs,
        how: HowToRun,
        ledger: Ledger,
        gradients: Gradients | None,
    ) -> BackwardReport:
        """Audit, decide, differentiate what is kept, and report, on checked inputs; no gate keeps everything."""
        draft = self.draft if self.draft is None or not self.draft.exact else None
        audit = None
        lessons: list[Seen] | None = [] if draft is not None and draft.learns else None
        alone = how.ranks.size == 1  # several know their parameters
        watched = gradients.watched(log_prob_fn) if gradients is not None and alone else log_prob_fn
        if draft is not None:
            audit = audited(draft, log_prob_fn, inputs, ledger, how, self.score, self._rate, lessons)
            draft = None if draft.exact else draft
        if draft is None and self.draft is not None:
            inputs = inputs.without_log_probs()  # the given ones are no better than the draft they were
        verifies = draft is not None and draft.verify is not None
        score = self.score if draft is None or verifies else draft.score or self.score
        # Log-probs given to decide on are looked at; others may not be, where signs decide, or nobody does.
        unseen = inputs.log_probs is None or gate is None or verifies
        discrete = score is delight and self.gate is not None and unseen
        passes = Passes(watched, inputs, ledger, how, discrete, lessons)
        if gate is None:
            done = everything(inputs, passes, how)
        else:
            asked = Asked(gate, self.score, draft, self._kept_fraction, self._backward_over_forward)
            done = decided(asked, self._size, inputs, passes, how)
        kept, total = done.kept, how.ranks.total(inputs.total)
        # Before the processes meet for the last time: what fails here, all hear of.
        drafting = self._taught(ledger, lessons, kept if done.proposed is None else done.proposed, audit)
        loss = passes.close()
        comparison = None
        if gradients is not None and self._comparisons is not None:
            comparison = _compared(self._comparisons, gradients, watched, inputs, how)
        self._remember(kept / total, ledger)
        return BackwardReport(
            **ledger.counted,
            decision=done.decision,
            kept=kept,
            total=total,
            loss=loss,
            noise=done.noise,
            drafting=drafting,
            comparison=comparison,
            seconds=ledger.seconds,
            choice=done.choice,
        )

    def _taught(
        self, ledger: Ledger, lessons: list[Seen] | None, proposed: int, audit: AuditResult | None
    ) -> Drafting | None:
        """What the draft did; it is taught what was seen on the way."""
        if self.draft is None:
            return None
        began = time.perf_counter()
        if lessons is not None:
            self.draft.learn(lessons)
        ledger.lap("screen")
        return Drafting(proposed, self.draft.exact, time.perf_counter() - began, audit)

    def _remember(self, kept: float, ledger: Ledger) -> None:
        """What the next step's plan goes by."""
        before = self._kept_fraction
        self._kept_fraction = kept if before is None else 0.8 * before + 0.2 * kept
        if self._measures_ratio:
            self._backward_over_forward = ledger.backward_over_forward or self._backward_over_forward

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to decide and plan as an unbroken one would."""
        return {
            "gate": state_of(self.gate),
            "kept_fraction": self._kept_fraction,
            "backward_over_forward": self._backward_over_forward,
            "known_flops": {} if self._known_flops is None else self._known_flops.state_dict(),
            "draft": {} if self.draft is None else self.draft.state_dict(),
            "comparisons": {} if self._comparisons is None else self._comparisons.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        states.check("GatedBackward", state, **STATE)
        if self.draft is not None and state["draft"]:
            states.check("Draft", state["draft"], **STATE_OF_DRAFT)
        load_state(self.gate, state["gate"])
        self._kept_fraction = state["kept_fraction"]
        self._backward_over_forward = state["backward_over_forward"]
        if self._known_flops is not None and state["known_flops"]:
            self._known_flops.load_state_dict(state["known_flops"])
        if self.draft is not None and state["draft"]:
            self.draft.load_state_dict(state["draft"])
        if self._comparisons is not None and state["comparisons"]:
            self._comparisons.load_state_dict(state["comparisons"])

    def _check_call(self, log_probs: Tensor | None, mask: Tensor | None) -> None:
        if self.draft is not None and (log_probs is None) == (self.draft.source is None):
            if log_probs is None:
                raise ValueError("the draft has no source and log_probs is None; expected one of them: give log_probs.")
            raise ValueError(
                "both the draft's source and log_probs are given; expected one of them. Current log-probs need no "
                "draft; Draft(None, ...) drafts by log_probs; for a ratio give behavior_log_probs."
            )
        if self._packing.tokens is not None and mask is None:
            raise ValueError("micro_batch_tokens is given and mask is not; expected a mask (B, T), whose tokens count.")

    def _in_words(self, inputs: Inputs, step_number: int | None = None) -> str:
        """What has to be the same on all processes: options, and what a call is given."""
        packing = self._packing
        return in_words(
            {
                "step_number": step_number,
                "log_probs": inputs.log_probs is not None and "given",
                "behavior_log_probs": inputs.behavior_log_probs is not None and "given",
                "mask": inputs.mask is not None and "given",
                "gate": self.gate,
                "loss": self.loss,
                "score": self.score,
                "draft": self.draft and self.draft.source,
                "draft score": self.draft and self.draft.score,
                "verify": self.draft and self.draft.verify,
                "audit": self.draft and self.draft.audit,
                "normalizer": self.normalizer,
                "micro_batch_size": packing.rows,
                "micro_batch_tokens": packing.tokens,
                "trim": packing.trim,
                "group_by": packing.group_by,
                "compare_every": None if self._comparisons is None else self._comparisons.every,
            }
        )

    @property
    def _rate(self) -> float:
        """What the gate keeps: its rate, or what it has kept of late."""
        if isinstance(self.gate, BudgetGate | KondoGate | SoftGate | UnbiasedGate):
            rate = self.gate.rate
        else:
            rule = rule_of(self.gate)
            rate = None if rule is None else rule.rate
        return (1.0 if self._kept_fraction is None else max(1e-9, self._kept_fraction)) if rate is None else rate

    def _gradients(self, gate: Gate | None) -> Gradients | None:
        """Those of this step, if it is one to be compared. Counts a step, whatever it keeps."""
        if self._comparisons is None or not self._comparisons.due() or gate is None:
            return None
        why = (
            "compare_every takes a backward pass more: the hook would run on the dense gradient too. Leave out "
            "compare_every, or step after the call instead of in a hook."
        )
        return Gradients(why, self._ranks.parameters())


def _compared(
    comparisons: Comparisons, gradients: Gradients, log_prob_fn: LogProbFunction, inputs: Inputs, how: HowToRun
) -> Comparison:
    """The gradient of the passes that have run beside that of all rows at weight 1, which is taken away again."""
    began, ranks, ledger = time.perf_counter(), how.ranks, Ledger(None)
    passes = Passes(log_prob_fn, inputs, ledger, how)
    gated = gradients.snapshot()
    with gradients.apart():
        everything(inputs, passes, how)
        passes.close()
        own = sketches(gradients.beside(gated), ranks.shard or 0)
        found = torch.cat([sums(gradients.beside(gated)), own.flatten()])
    found = found if ranks.shard is None else ranks.add(found)
    ran, seconds = ledger.counts, time.perf_counter() - began
    return comparisons.compared(found[:4], found[4:].view_as(own), ran.forward_rows, ran.backward_rows, seconds)
