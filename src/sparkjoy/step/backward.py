"""One policy-gradient step that differentiates only the samples a gate keeps. Read this first.

    rollout -> log-probs without a graph -> score -> gate -> gather the kept rows -> loss -> backward

Skipped rows are left out of the batch before the differentiable forward pass, so they never enter the autograd graph.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparkjoy import checks, states
from sparkjoy.draft import Draft
from sparkjoy.gates import Decision, Gate, KondoGate
from sparkjoy.gates.decision import GATE, load_state, state_of, weighs
from sparkjoy.gradients import Comparison, Comparisons, Gradients, inner_products, sketches
from sparkjoy.losses import LOSS, Loss, reinforce, size_of
from sparkjoy.processes.meeting import in_words
from sparkjoy.processes.ranks import ranks_of
from sparkjoy.scores import SCORE, ScoreFunction, delight, is_size
from sparkjoy.step.counts import Counting, Counts
from sparkjoy.step.deciding import added_noise, decide, scores_of_rows, to_decide_on
from sparkjoy.step.inputs import Inputs, LogProbFunction, check_inputs
from sparkjoy.step.packing import Packing, Trim
from sparkjoy.step.passes import Normalizer, Options, Passes
from sparkjoy.step.report import BackwardReport

STATE = {
    "gate": states.is_state,
    "kept_fraction": lambda value: value is None or (checks.is_number(value) and 0 <= value <= 1),
    "backward_over_forward": lambda value: value is None or (checks.is_number(value) and value > 0),
    "comparisons": states.is_state,
}


class GatedBackward:
    """The gradient of the samples worth a backward pass: what stays the same from step to step.

    The gradient equals that of the full batch with skipped terms multiplied by zero, normalised the same way; only the
    work differs. With `gate=None` every row is kept, so a plain policy gradient, DG and the Kondo gate all run through
    one engine and are counted alike.

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
        backward_over_forward: r, what a backward pass costs in forward passes, for the choice of a plan; None: 2, that
            of training all weights. An attribute too, for whoever measures it while training.
        compare_every: at every n-th step the dense gradient of the same batch is computed too, for
            `report.comparison`: forward and backward passes over all rows more. `.grad` and gate are what they would be
            without. Warns, once, if the last 20 comparisons say that the gate hurts. None: never.

    Raises:
        ValueError: an option outside its range.
    """

    # A name that is none of these is no option: setting it would change nothing, without a word.
    __slots__ = ("__weakref__", "_comparisons", "_gate", "_kept_fraction", "_options", "backward_over_forward")

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
        normalizer = _checked_normalizer(normalizer, gate)
        packing = Packing(micro_batch_size, micro_batch_tokens, trim, group_by)
        if backward_over_forward is not None:
            backward_over_forward = checks.number(
                "backward_over_forward", backward_over_forward, "a number above 0, or None", lambda ratio: ratio > 0
            )
        if compare_every is not None:
            compare_every = checks.whole("compare_every", compare_every, "a whole number of steps, at least 1, or None")
        size = size_of(loss) if weighs(gate) else None
        self._gate = gate
        self._options = Options(
            gate, None, score or size or delight, size, draft, loss, normalizer, packing, backward, ranks_of(module)
        )
        self._kept_fraction: float | None = None
        self.backward_over_forward: float | None = backward_over_forward
        self._comparisons = None if compare_every is None else Comparisons(compare_every)

    @property
    def gate(self) -> Gate | None:
        """The gate, with what it remembers. Another one is another step: score, size and normalizer follow from it."""
        return self._gate

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
        options, counting = self._options, Counting()
        draft, ranks = options.draft, options.ranks
        with ranks.together(counting):
            checks.function("log_prob_fn", log_prob_fn, "a function from rows to log-probs")
            if draft is not None:
                draft.check_call(log_probs)
            if options.packing.tokens is not None and mask is None:
                raise ValueError(
                    "micro_batch_tokens is given and mask is not; expected a mask (B, T), whose tokens count."
                )
            rule = getattr(self._gate, "rule", None)
            keeps_all = rule is not None and rule.keeps_everything
            options = options._replace(gate=None if keeps_all else self._gate, rule=rule)
            # The hard gate finds a NaN or infinite value in such a score; of several processes it cannot say whose.
            known = log_probs is not None and draft is None
            finds = isinstance(options.gate, KondoGate) and rule is not None
            tells = known and options.score is delight and finds
            inputs = check_inputs(
                batch,
                advantages,
                log_probs,
                behavior_log_probs,
                mask,
                looks=not (tells and behavior_log_probs is None and ranks.size == 1),
                counts_signs=options.gate is not None and not known,
            )
            if step_number is not None:
                step_number = checks.whole("step_number", step_number, "a whole number of at least 0, or None", 0)
            ranks.open(inputs, partial(self._in_words, inputs, step_number))
            gradients = self._gradients(options.gate)
            with gradients or nullcontext():
                return self._step(options, log_prob_fn, inputs, counting, gradients)

    def _step(
        self,
        options: Options,
        log_prob_fn: LogProbFunction,
        inputs: Inputs,
        counting: Counting,
        gradients: Gradients | None,
    ) -> BackwardReport:
        """Decide, differentiate what is kept, and report, on checked inputs; no gate keeps everything."""
        draft, ranks = options.draft, options.ranks
        if gradients is not None and ranks.size == 1:  # several know their parameters
            log_prob_fn = gradients.watched(log_prob_fn)
        verifies = draft is not None and draft.verify is not None
        score = options.score if draft is None or verifies else draft.score or options.score
        # Log-probs given to decide on are looked at; others may not be, where signs decide, or nobody does.
        unseen = inputs.log_probs is None or options.gate is None or verifies
        discrete = score is delight and self._gate is not None and unseen
        passes = Passes(log_prob_fn, inputs, counting, options, discrete)
        if options.gate is None:
            decision, kept, noise = everything(passes), ranks.total(inputs.total), None
        else:
            decision, kept, noise = self._gated(options.gate, options, passes)
        loss = passes.close()
        comparison = None
        if gradients is not None and self._comparisons is not None:
            comparison = _compared(self._comparisons, gradients, passes)
        total = ranks.total(inputs.total)
        before, now = self._kept_fraction, kept / total
        self._kept_fraction = now if before is None else 0.8 * before + 0.2 * now
        proposed = counting.proposed
        return BackwardReport(
            **counting.counts,
            decision=decision,
            kept=kept,
            total=total,
            loss=loss,
            noise=noise,
            proposed=kept if proposed is None and draft is not None else proposed,
            comparison=comparison,
            seconds=counting.seconds,
            plan=counting.plan,
            reason=counting.reason,
        )

    def _gated(self, gate: Gate, options: Options, passes: Passes) -> tuple[Decision, int, float | None]:
        """What a gate decides about the rows of all processes, how many it keeps, and the noise that adds."""
        ranks, size, inputs = options.ranks, options.size, passes.inputs
        own, exact, priced = scores_of_rows(options, passes, self._kept_fraction, self.backward_over_forward)
        score, cost, teaches = ranks.gather(*to_decide_on(gate, options.rule, own, inputs))
        decision, rows = decide(gate, score, cost, teaches, inputs, sized=is_size(options.score))
        if ranks.size > 1:
            decision = ranks.same(decision)
            rows = ranks.own(decision.keep).cpu().nonzero().squeeze(1)
        kept = len(rows) if ranks.size == 1 else int(decision.keep.count_nonzero())
        passes.counting.lap("screen")
        exact, differentiated = exact and options.score is size, None
        if not passes.holds_graph:
            weight = None if getattr(gate, "weighted", None) is False else ranks.own(decision.weight)
            differentiated = passes.differentiate(rows, weight, kept, watches=size is not None and not exact)
        elif kept:
            passes.differentiate_graph(decision.weight * decision.keep, rows)
        noise = None
        if size is not None:
            noise, found = added_noise(size, inputs, score, teaches, decision, exact, differentiated, ranks)
            if found is not None and hasattr(gate, "learn"):
                gate.learn(*found)
        return decision if priced else replace(decision, price=None), kept, noise

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to decide and plan as an unbroken one would."""
        return {
            "gate": state_of(self._gate),
            "kept_fraction": self._kept_fraction,
            "backward_over_forward": self.backward_over_forward,
            "comparisons": {} if self._comparisons is None else self._comparisons.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        states.check("GatedBackward", state, **STATE)
        load_state(self._gate, state["gate"])
        self._kept_fraction = state["kept_fraction"]
        self.backward_over_forward = state["backward_over_forward"]
        if self._comparisons is not None and state["comparisons"]:
            self._comparisons.load_state_dict(state["comparisons"])

    def _in_words(self, inputs: Inputs, step_number: int | None = None) -> dict[str, str]:
        """What has to be the same on all processes: options, and what a call is given."""
        options = self._options
        draft, packing = options.draft, options.packing
        return in_words(
            {
                "step_number": step_number,
                "log_probs": inputs.log_probs is not None and "given",
                "behavior_log_probs": inputs.behavior_log_probs is not None and "given",
                "mask": inputs.mask is not None and "given",
                "gate": self._gate,
                "loss": options.loss,
                "score": options.score,
                "draft": draft and draft.source,
                "draft score": draft and draft.score,
                "verify": draft and draft.verify,
                "normalizer": options.normalizer,
                "micro_batch_size": packing.rows,
                "micro_batch_tokens": packing.tokens,
                "trim": packing.trim,
                "group_by": packing.group_by,
                "compare_every": None if self._comparisons is None else self._comparisons.every,
            }
        )

    def _gradients(self, gate: Gate | None) -> Gradients | None:
        """Those of this step, if it is one to be compared. Counts a step, whatever it keeps."""
        if self._comparisons is None or not self._comparisons.due() or gate is None:
            return None
        why = (
            "compare_every takes a backward pass more: the hook would run on the dense gradient too. Leave out "
            "compare_every, or step after the call instead of in a hook."
        )
        return Gradients(why, self._options.ranks.parameters())


def everything(passes: Passes) -> Decision:
    """The plain, dense step."""
    ranks, inputs = passes.options.ranks, passes.inputs
    ones = inputs.advantages.new_ones(ranks.total(inputs.total))
    passes.differentiate(None, None, len(ones))
    return Decision(ones.bool(), None, ones, ones)


def _compared(comparisons: Comparisons, gradients: Gradients, of_step: Passes) -> Comparison:
    """The gradient of the passes that have run beside that of all rows at weight 1, which is taken away again."""
    began, ranks, counting = time.perf_counter(), of_step.options.ranks, Counting()
    passes = Passes(of_step.log_prob_fn, of_step.inputs, counting, of_step.options)
    gated = gradients.snapshot()
    with gradients.set_aside():
        everything(passes)
        passes.close()
        own = sketches(gradients.pairs_with(gated), ranks.shard or 0)
        found = torch.cat([inner_products(gradients.pairs_with(gated)), own.flatten()])
    found = found if ranks.shard is None else ranks.add(found)
    ran, seconds = Counts(**counting.counts), time.perf_counter() - began
    return comparisons.compared(found[:4], found[4:].view_as(own), ran.forward_rows, ran.backward_rows, seconds)


def _checked_normalizer(normalizer: Any, gate: Gate | None) -> Normalizer:
    """One of the words, or a number above 0; none that follows the draws of a gate whose mean is the dense gradient."""
    if not (isinstance(normalizer, str) and normalizer in ("batch", "samples", "kept")):
        expected = "'batch', 'samples', 'kept' or a number above 0"
        return checks.number("normalizer", normalizer, expected, lambda divisor: divisor > 0)
    if normalizer == "kept" and weighs(gate):
        raise ValueError(
            f"normalizer is 'kept' and the gate {gate!r}: weights stand in for the skipped rows already, so that the "
            "gradient over the kept ones alone would be several times the dense one. Take 'batch', which is the same "
            "for all gates, 'samples' or a number."
        )
    return normalizer  # type: ignore[return-value]  # one of the words


def gated_backward(
    log_prob_fn: LogProbFunction,
    batch: Any,
    advantages: Tensor,
    gate: Gate | None,
    *,
    log_probs: Tensor | None = None,
    behavior_log_probs: Tensor | None = None,
    mask: Tensor | None = None,
    **options: Any,
) -> BackwardReport:
    """`GatedBackward(gate, **options)` in one call, which remembers nothing: for one step; in a loop make it once.

    >>> import torch, sparkjoy as sj
    >>> logits = torch.zeros(4, 2, requires_grad=True)
    >>> def log_prob_fn(rows):
    ...     return logits.log_softmax(1)[rows, 0]
    >>> advantages = torch.tensor([1.0, -1.0, 3.0, 0.0])
    >>> report = sj.gated_backward(log_prob_fn, torch.arange(4), advantages, sj.KondoGate(rate=0.25))
    >>> report.kept, report.backward_rows, logits.grad.abs().sum(dim=1)
    (1, 1, tensor([0.0000, 0.0000, 0.7500, 0.0000]))
    """
    return GatedBackward(gate, **options)(
        log_prob_fn, batch, advantages, log_probs=log_probs, behavior_log_probs=behavior_log_probs, mask=mask
    )
