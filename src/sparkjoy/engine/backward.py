"""One policy-gradient step that differentiates only the samples a gate keeps. Read this first.

    rollout -> log-probs without a graph -> score -> gate -> gather the kept rows -> loss -> backward

Skipped rows are left out of the batch before the differentiable forward pass, so they never enter the autograd graph.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparkjoy import checks, states
from sparkjoy.engine.added_noise import added_noise
from sparkjoy.engine.comparing import Beside, Comparison, Comparisons
from sparkjoy.engine.deciding import decide, row_scores, scored_rows
from sparkjoy.engine.flops import KnownFlops
from sparkjoy.engine.inputs import Inputs, check_inputs
from sparkjoy.engine.ledger import Ledger
from sparkjoy.engine.options import in_words
from sparkjoy.engine.packing import Packing, Trim
from sparkjoy.engine.passes import Normalizer, Passes, checked_normalizer
from sparkjoy.engine.plan import BACKWARD_OVER_FORWARD, EVERYTHING, KNOWN, Choice, choose
from sparkjoy.engine.processes.distributed import ranks_of
from sparkjoy.engine.processes.ranks import Scored
from sparkjoy.engine.report import BackwardReport
from sparkjoy.engine.screening import LogProbFunction
from sparkjoy.gates import Decision, Gate
from sparkjoy.gates.decision import GATE, load_state, rule_of, state_of, weighted
from sparkjoy.losses import LOSS, Loss, reinforce, size_of
from sparkjoy.scores import SCORE, ScoreFunction, delight, reads_log_probs, sign_of_advantage
from sparkjoy.signs import mixed, undecided, worth

STATE = {
    "gate": states.is_state,
    "kept_fraction": lambda value: value is None or (checks.is_number(value) and 0 <= value <= 1),
    "backward_over_forward": lambda value: value is None or (checks.is_number(value) and value > 0),
    "known_flops": KnownFlops.fits,
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
        screen: `rows -> log-probs` to decide on, from another source than `log_prob_fn` (a draft, stale weights);
            None: a pass of `log_prob_fn` without a graph, exact.
        normalizer: what the sum of the kept terms is divided by. "batch": all valid tokens of the call, kept or not
            (all samples for (B,)); "samples": B; "kept": valid tokens (samples) of the kept rows; or a number.
        micro_batch_size: rows per forward and backward pass; None: all at once.
        micro_batch_tokens: columns of the mask per forward and backward pass, padding included; None: no limit.
        trim: `(batch, mask) -> (batch, columns)`, which cuts padding off a micro-batch and says which columns of the
            mask are left, such as `sj.TrimRight("tokens")`; rows then go by length, the longest first.
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
            `report.comparison`: forward and backward passes over all rows more. `.grad`, gate and random state are what
            they would be without. Warns, once, if the last 20 comparisons say that the gate hurts. None: never.

    Raises:
        ValueError: an option outside its range.
    """

    def __init__(
        self,
        gate: Gate | None,
        *,
        loss: Loss = reinforce,
        score: ScoreFunction | None = None,
        screen: LogProbFunction | None = None,
        normalizer: Normalizer = "batch",
        micro_batch_size: int | None = None,
        micro_batch_tokens: int | None = None,
        trim: Trim | None = None,
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
        if screen is not None:
            checks.function("screen", screen, "a function from rows to log-probs, or None", ...)
        checks.function("backward", backward, "a function of a loss, such as accelerator.backward", ...)
        normalizer = checked_normalizer(normalizer)
        expected = "a whole number of at least 1, or None for all at once"
        micro_batch_size, micro_batch_tokens = (
            None if limit is None else checks.whole(name, limit, expected)
            for name, limit in (("micro_batch_size", micro_batch_size), ("micro_batch_tokens", micro_batch_tokens))
        )
        if trim is not None:
            checks.function("trim", trim, "a function (batch, mask) -> (batch, columns), or None", ..., ...)
        count_flops = checks.flag("count_flops", count_flops)
        if backward_over_forward is not None:
            backward_over_forward = checks.number(
                "backward_over_forward", backward_over_forward, "a number above 0, or None", lambda ratio: ratio > 0
            )
        if compare_every is not None:
            compare_every = checks.whole("compare_every", compare_every, "a whole number of steps, or None for never")
        self.gate = gate
        self.loss = loss
        self._size = size_of(loss) if weighted(gate) else None
        self.score = score or self._size or delight
        self.screen = screen
        self.normalizer = normalizer
        self.backward = backward
        self._ranks = ranks_of(module)
        self._known_flops = KnownFlops() if count_flops else None
        self._packing = Packing(micro_batch_size, micro_batch_tokens, trim)
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

        Returns:
            A `BackwardReport`, counted from what ran.

        Raises:
            ValueError: NaN, infinite or misshapen input, before any `.grad` is touched; a log-prob that turns NaN or
                infinite while differentiating, with the number of its micro-batch.
        """
        ranks, ledger = self._ranks, Ledger(self._known_flops)
        with ranks.together():
            checks.function("log_prob_fn", log_prob_fn, "a function from rows to log-probs")
            self._check_call(log_probs, mask)
            score_tells = self.score is delight and not self._keeps_everything and log_probs is not None
            score_tells = score_tells and rule_of(self.gate) is not None and behavior_log_probs is None
            score_tells = score_tells and ranks.size == 1  # else it is not known whose value it was
            inputs = check_inputs(batch, advantages, log_probs, behavior_log_probs, mask, score_tells)
            ranks.open(inputs, self._in_words)
            watches = self._size is not None  # exact sizes of the kept rows, to compare with those decided on
            # Given log-probs are looked at to decide; others may not be, where signs decide, or nobody does.
            discrete = self.score is delight and self.gate is not None and (log_probs is None or self._keeps_everything)
            beside = self._beside()
            passes = Passes(
                log_prob_fn if beside is None else beside.watched(log_prob_fn),
                inputs,
                ledger,
                self.loss,
                self.normalizer,
                self._packing,
                self.backward,
                ranks,
                watches,
                discrete,
            )
            choice, decision, noise = self._run(passes, inputs)
            kept, total = int(decision.keep.count_nonzero()), ranks.total(inputs.total)
            loss = passes.close()
            comparison = None if beside is None else self._compared(beside, passes, inputs)
        recent = kept / total
        self._kept_fraction = recent if self._kept_fraction is None else 0.8 * self._kept_fraction + 0.2 * recent
        if self._measures_ratio:
            self._backward_over_forward = ledger.backward_over_forward or self._backward_over_forward
        counted = self._known_flops is not None
        return BackwardReport(
            decision=decision,
            kept=kept,
            total=total,
            loss=loss,
            noise=noise,
            comparison=comparison,
            screened_rows=ledger.screened_rows,
            forward_rows=ledger.forward_rows,
            backward_rows=ledger.backward_rows,
            screened_tokens=ledger.screened_tokens,
            forward_tokens=ledger.forward_tokens,
            backward_tokens=ledger.backward_tokens,
            forward_flops=ledger.forward_flops if counted else None,
            backward_flops=ledger.backward_flops if counted else None,
            seconds=ledger.seconds,
            choice=choice,
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to decide and plan as an unbroken one would."""
        return {
            "gate": state_of(self.gate),
            "kept_fraction": self._kept_fraction,
            "backward_over_forward": self._backward_over_forward,
            "known_flops": {} if self._known_flops is None else self._known_flops.state_dict(),
            "comparisons": {} if self._comparisons is None else self._comparisons.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        states.check("GatedBackward", state, **STATE)
        load_state(self.gate, state["gate"])
        self._kept_fraction = state["kept_fraction"]
        self._backward_over_forward = state["backward_over_forward"]
        if self._known_flops is not None and state["known_flops"]:
            self._known_flops.load_state_dict(state["known_flops"])
        if self._comparisons is not None and state["comparisons"]:
            self._comparisons.load_state_dict(state["comparisons"])

    def _check_call(self, log_probs: Tensor | None, mask: Tensor | None) -> None:
        if log_probs is not None and self.screen is not None:
            raise ValueError(
                "log_probs and a screen are both given to decide on; give one. For a ratio: behavior_log_probs."
            )
        if self._packing.tokens is not None and mask is None:
            raise ValueError("micro_batch_tokens is given and mask is not; expected a mask (B, T), whose tokens count.")

    def _in_words(self) -> str:
        """The options that have to be the same on all processes."""
        packing = self._packing
        return in_words(
            {
                "gate": self.gate,
                "loss": self.loss,
                "score": self.score,
                "screen": self.screen,
                "normalizer": self.normalizer,
                "micro_batch_size": packing.rows,
                "micro_batch_tokens": packing.tokens,
                "trim": packing.trim,
                "compare_every": None if self._comparisons is None else self._comparisons.every,
            }
        )

    @property
    def _keeps_everything(self) -> bool:
        rule = rule_of(self.gate)
        return self.gate is None or (rule is not None and rule.keeps_everything)

    def _run(self, passes: Passes, inputs: Inputs) -> tuple[Choice, Decision, float | None]:
        """Decide, differentiate what is kept, and say how, and how much noise that added."""
        if self.gate is None or self._keeps_everything:
            total = self._ranks.total(inputs.total)
            ones = torch.ones(total, dtype=inputs.advantages.dtype, device=inputs.advantages.device)
            decision = Decision(ones.bool(), None, ones, ones)
            passes.differentiate(inputs, None, None, decision.keep[: inputs.total], total)
            return EVERYTHING, decision, None
        gate, log_probs = self.gate, inputs.log_probs
        if log_probs is None and not reads_log_probs(self.score):
            log_probs = inputs.blank_log_probs()
        if log_probs is None:
            return self._run_unknown(gate, passes, inputs)
        scored = self._ranks.gather(scored_rows(gate, row_scores(self.score, inputs, log_probs), inputs))
        decision = self._ranks.same(decide(gate, scored, inputs))
        passes.ledger.lap("screen")
        self._differentiate_kept(passes, inputs, decision)
        return KNOWN, decision, self._noise(passes, inputs, scored, decision, False)

    def _run_unknown(self, gate: Gate, passes: Passes, inputs: Inputs) -> tuple[Choice, Decision, float | None]:
        """As `_run`, where log-probs have to be computed to decide."""
        ranks, rule = self._ranks, rule_of(gate)
        signs_tell = sign_of_advantage(self.score) and not ranks.sum(int(mixed(inputs.advantages)))
        value = worth(inputs.advantages)
        rows = undecided(rule if signs_tell else None, value, ranks.sum)
        possible = rows.kept | rows.open
        # Several processes decide before any of them differentiates: all skip the passes, or none.
        undivided = ranks.size == 1 and self.screen is None
        undivided = undivided and self._packing.holds(inputs, int(possible.count_nonzero()))
        measured = self._backward_over_forward
        ratio = BACKWARD_OVER_FORWARD if measured is None else measured
        quota = None if rule is None else rule.quota(ranks.total(inputs.total))
        choice = choose(rows, inputs.total, quota, undivided, self._kept_fraction, ratio)
        any_open = ranks.most(int(rows.open.any()))
        passes.ledger.lap("screen")
        graph = passes.forward(_indices(possible)) if choice.plan == "dense" else None

        if any_open and graph is None:
            passes.screen(_indices(rows.open), self.screen)
        score = value
        if passes.seen is not None:
            score = row_scores(self.score, inputs, passes.seen)
            seen = possible if graph is not None else rows.open
            score = torch.where(seen, score, value.to(score.dtype))  # else signs suffice
        known = ranks.gather(scored_rows(gate, score, inputs))
        decision = ranks.same(decide(gate, known, inputs))
        passes.ledger.lap("screen")
        if graph is None:
            self._differentiate_kept(passes, inputs, decision)
            if rule is not None and rule.rate is not None and ranks.most(int(rows.kept.any())):
                decision = replace(decision, price=None)  # the row at the margin may be one without a score
        elif bool(decision.keep.any()):
            passes.differentiate_graph(graph, decision.weight * decision.keep, decision.keep)
        exact = self.screen is None and self.score is self._size
        return choice, decision, self._noise(passes, inputs, known, decision, exact)

    def _noise(self, passes: Passes, inputs: Inputs, scored: Scored, decision: Decision, exact: bool) -> float | None:
        """What a weighted gate's draws added; the gate is told of it where the sizes it decided on were approximate."""
        if self._size is None:
            return None
        noise, sums = added_noise(self._size, passes, inputs, scored, decision, exact)
        learn = getattr(self.gate, "learn", None)
        if sums is not None and learn is not None:
            learn(sums)
        return noise

    def _beside(self) -> Beside | None:
        """What compares the gradients of this step, if it is one to be compared."""
        if self._comparisons is None or not self._comparisons.due() or self._keeps_everything:
            return None
        return Beside(self._ranks.parameters())

    def _compared(self, beside: Beside, gated: Passes, inputs: Inputs) -> Comparison:
        """The gradient of the passes that have run beside that of all rows at weight 1, which is taken away again."""
        assert self._comparisons is not None
        began, ranks, ledger, device = time.perf_counter(), self._ranks, Ledger(None), inputs.advantages.device
        options = (self.loss, self.normalizer, self._packing, self.backward, ranks)
        passes = Passes(gated.log_prob_fn, inputs, ledger, *options)
        everything = torch.ones(inputs.total, dtype=torch.bool, device=device)
        with beside.dense(device):
            passes.differentiate(inputs, None, None, everything, ranks.total(inputs.total))
            passes.close()
        found = torch.cat([beside.sums(), beside.sketches(ranks.shard or 0).flatten()])
        found = found if ranks.shard is None else ranks.add(found)
        seconds = time.perf_counter() - began
        counts = (ledger.forward_rows, ledger.backward_rows, seconds)
        return self._comparisons.compared(found[:4], found[4:].unflatten(0, (2, -1)), *counts)

    def _differentiate_kept(self, passes: Passes, inputs: Inputs, decision: Decision) -> None:
        """Differentiate what is kept of all processes' rows, this process its share."""
        keep = self._ranks.own(decision.keep)
        kept_rows = keep.nonzero().squeeze(1)
        weight = None if weighted(self.gate) is False else self._ranks.own(decision.weight)
        everything = None if len(kept_rows) == inputs.total > 0 else kept_rows
        kept_everywhere = len(kept_rows) if self._ranks.size == 1 else int(decision.keep.count_nonzero())
        passes.differentiate(inputs, everything, weight, keep, kept_everywhere)


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
    """`GatedBackward` in one call: differentiate only the samples the gate keeps, adding to `.grad`.

    It remembers nothing from call to call, so that counting FLOPs measures at every call; in a loop, a `GatedBackward`
    made once measures once.

    >>> import torch, sparkjoy as sj
    >>> logits = torch.zeros(4, 2, requires_grad=True)
    >>> def log_prob_fn(rows):
    ...     return logits.log_softmax(1)[rows, 0]
    >>> advantages = torch.tensor([1.0, -1.0, 3.0, 0.0])
    >>> report = sj.gated_backward(log_prob_fn, torch.arange(4), advantages, sj.KondoGate(rate=0.25))
    >>> report.kept, report.backward_rows, logits.grad.abs().sum(dim=1)
    (1, 1, tensor([0.0000, 0.0000, 0.7500, 0.0000]))

    Args:
        log_prob_fn: `rows -> (n,)` or `(n, T)` differentiable log-probs of the actions taken in `rows`.
        batch: a tensor, or a TensorDict, Mapping, namedtuple or dataclass of tensors, with leading dimension B.
        advantages: (B,), or (B, T) with log-probs of (B, T).
        gate: decides which samples to keep; None: all of them.
        log_probs: known ones to decide on, such as the sampler's; then deciding is free. As in `GatedBackward`'s call.
        behavior_log_probs: the denominator of a loss's ratio; default `log_probs`, else the current ones, detached.
        mask: (B, T), 1 for tokens that count; anything may stand where it is 0, NaN too.
        options: the options of `GatedBackward`.

    Returns:
        A `BackwardReport`, counted from what ran.

    Raises:
        ValueError: as `GatedBackward`.
    """
    return GatedBackward(gate, **options)(
        log_prob_fn, batch, advantages, log_probs=log_probs, behavior_log_probs=behavior_log_probs, mask=mask
    )


def _indices(rows: Tensor) -> Tensor | None:
    """Where `rows` (B,) is true; None where it is everywhere."""
    return None if bool(rows.all()) else rows.nonzero().squeeze(1)
