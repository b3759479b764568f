"""One policy-gradient step that differentiates only the samples a gate keeps. Read this first.

    rollout -> log-probs without a graph -> score -> gate -> gather the kept rows -> loss -> backward

Skipped rows are left out of the batch before the differentiable forward pass, so they never enter the autograd graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparkjoy.engine.distributed import ranks_of
from sparkjoy.engine.inputs import Inputs, check_inputs, finite_where_valid, micro_batches
from sparkjoy.engine.ledger import KnownFlops, Ledger
from sparkjoy.engine.plan import Plan, cheapest_plan
from sparkjoy.engine.ranks import Scored
from sparkjoy.engine.screening import LogProbFunction, screen_without_graph
from sparkjoy.gates import Decision, Gate, KondoGate, StatefulGate
from sparkjoy.losses import Loss, reinforce
from sparkjoy.scores import ScoreFunction, at_least_float32, delight, without_graph

Normalizer = Literal["batch", "samples", "kept"] | float


@dataclass(frozen=True)
class BackwardReport:
    """What one call did, counted from what ran.

    Under several processes decision, kept, total and loss are about the rows of all of them, in the order of the ranks,
    and the same everywhere; the counts of what ran, FLOPs and seconds are this process's.

    Args:
        decision: the gate's, about all rows; rows of zero advantage are never kept below rate 1.
        kept: rows kept.
        total: rows given.
        loss: 0-dim, detached, normalised as asked; 0 when nothing is kept.
        screened_rows: rows whose log-probs were computed to decide, without a graph.
        forward_rows: rows that went through `log_prob_fn`, screening included.
        backward_rows: rows whose gradient arrived at what `log_prob_fn` returned.
        screened_tokens: as the rows, in tokens that the mask counts; equal to the rows for (B,) log-probs.
        forward_tokens: likewise.
        backward_tokens: likewise.
        forward_flops: FLOPs of all forward passes; None when not counted.
        backward_flops: FLOPs of all backward passes; None when not counted.
        seconds: host seconds by phase: screen (deciding included), gather, forward, backward.
        plan: "known" log-probs, "screen" then recompute, or "dense".
    """

    decision: Decision
    kept: int
    total: int
    loss: Tensor
    screened_rows: int
    forward_rows: int
    backward_rows: int
    screened_tokens: int
    forward_tokens: int
    backward_tokens: int
    forward_flops: int | None
    backward_flops: int | None
    seconds: dict[str, float]
    plan: Plan

    @property
    def flops(self) -> int | None:
        """FLOPs of all passes; None when not counted."""
        if self.forward_flops is None or self.backward_flops is None:
            return None
        return self.forward_flops + self.backward_flops


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
    >>> report = step(log_prob_fn, {"states": states, "actions": actions}, advantages=torch.randn(100))
    >>> report.kept, report.screened_rows, report.backward_rows
    (3, 100, 3)

    Args:
        gate: decides which samples to keep; None: all of them. A `KondoGate` of rate 1 without a price is None.
        loss: `(log_probs, advantages, behavior_log_probs, mask) -> terms` to minimise, proportional to the advantage.
        score: `(advantages, log_probs) -> (B,)` or (B, T), which is summed over valid tokens; what the gate decides on.
        screen: `rows -> log-probs` to decide on, from another source than `log_prob_fn` (a draft, stale weights);
            None: a pass of `log_prob_fn` without a graph, exact.
        normalizer: what the sum of the kept terms is divided by. "batch": all valid tokens of the call, kept or not
            (all samples for (B,)); "samples": B; "kept": valid tokens (samples) of the kept rows; or a number.
        micro_batch_size: rows per forward and backward pass; None: all at once.
        module: under several processes, the `DistributedDataParallel` or `fully_shard` module that `log_prob_fn` calls:
            then one decision is made about the rows of all processes. "local": this process decides for itself.
        deal_survivors: let kept rows move to another process, so that each differentiates as many; for batches that
            mean the same in every process. Off, they stay, and processes with fewer run rows of weight 0.
        backward: called on each micro-batch's loss, for instance `accelerator.backward`.
        count_flops: measure FLOPs on the first pass over rows of a new shape. Off, the report has None; turn it off for
            a compiled `log_prob_fn`, which a counting pass would run uncompiled.

    Raises:
        ValueError: an option outside its range.
    """

    def __init__(
        self,
        gate: Gate | None,
        *,
        loss: Loss = reinforce,
        score: ScoreFunction = delight,
        screen: LogProbFunction | None = None,
        normalizer: Normalizer = "batch",
        micro_batch_size: int | None = None,
        module: nn.Module | Literal["local"] | None = None,
        deal_survivors: bool = False,
        backward: Callable[[Tensor], Any] = torch.Tensor.backward,
        count_flops: bool = True,
    ) -> None:
        if gate is not None and not callable(gate):
            raise ValueError(f"gate is {gate!r}; expected a callable such as KondoGate(rate=0.03), or None.")
        if isinstance(normalizer, str):
            if normalizer not in ("batch", "samples", "kept"):
                raise ValueError(f"normalizer is {normalizer!r}; expected 'batch', 'samples', 'kept' or a number.")
        elif not isinstance(normalizer, int | float) or not 0 < normalizer < math.inf:
            raise ValueError(f"normalizer is {normalizer!r}; expected a number above 0.")
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(f"micro_batch_size is {micro_batch_size}; expected at least 1, or None for all at once.")
        self.gate = gate
        self.loss = loss
        self.score = score
        self.screen = screen
        self.normalizer = normalizer
        self.micro_batch_size = micro_batch_size
        self.backward = backward
        self._ranks = ranks_of(module, deal_survivors)
        self._known_flops: KnownFlops | None = {} if count_flops else None
        self._kept_fraction: float | None = None

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
            log_probs: known ones to decide on, such as the sampler's; then deciding is free.
            behavior_log_probs: the denominator of a loss's ratio; default `log_probs`, else the current ones, detached.
            mask: (B, T), 1 for tokens that count; anything may stand where it is 0, NaN too.

        Returns:
            A `BackwardReport`, counted from what ran.

        Raises:
            ValueError: NaN, infinite or misshapen input, before any `.grad` is touched; a log-prob that turns NaN or
                infinite while differentiating, with the number of its micro-batch.
        """
        if log_probs is not None and self.screen is not None:
            raise ValueError(
                "log_probs and a screen are both given to decide on; give one. For a ratio: behavior_log_probs."
            )
        ranks, ledger = self._ranks, Ledger(self._known_flops)
        score_tells = self.score is delight and not self._keeps_everything and log_probs is not None
        score_tells = score_tells and type(self.gate) is KondoGate and behavior_log_probs is None
        inputs = ranks.open(lambda: check_inputs(batch, advantages, log_probs, behavior_log_probs, mask, score_tells))
        plan, decision, dense_log_probs = self._decide(log_prob_fn, inputs, ledger)
        own, local = ranks.share(inputs, decision, plan == "dense")
        kept_rows = local.keep.nonzero().squeeze(1)
        kept_here = kept_rows.shape[0]
        kept = kept_here if ranks.size == 1 else int(decision.keep.count_nonzero())
        dense = plan == "dense" or kept_here == own.total
        weight = self._weight(local, None if dense else kept_rows)
        losses = []
        parts = micro_batches(own.total if dense else kept_here, self.micro_batch_size) if kept_here else []
        rounds = ranks.rounds(len(parts), kept)
        divisor: float | None = None
        for number in range(1, rounds + 1):
            with ranks.micro_batch(last=number == rounds):
                if number > len(parts):  # other ranks have more, and wait for this one
                    part = inputs.take(slice(0, 1))
                    part_weight: Tensor | None = inputs.advantages.new_zeros(1)
                else:
                    rows = parts[number - 1]
                    if len(parts) > 1:
                        part = own.take(rows if dense else kept_rows[rows])
                    else:
                        part = own if dense else own.take(kept_rows)
                    part_weight = None if weight is None else weight[rows]
                ledger.lap("gather")
                if dense_log_probs is None:
                    current = ranks.forward(partial(ledger.forward, log_prob_fn, part))
                else:
                    current = dense_log_probs
                if divisor is None:
                    divisor = self._normalizer(inputs, own, kept_rows, current) / ranks.size  # gradients are averaged
                terms = self._terms(current, part, part_weight)
                loss = terms.sum() / divisor
                _check_graph(loss, current)
                ranks.hold(partial(_check_finite_loss, loss, current, f"micro-batch {number} of {rounds}"))
                ledger.lap("forward")
                ledger.backward(self.backward, loss, part)
                ledger.lap("backward")
            losses.append(loss.detach())
        loss = losses[0] if len(losses) == 1 else sum(losses, start=inputs.advantages.new_zeros(()))
        total = ranks.total(inputs.total)
        self._kept_fraction = kept / total
        return BackwardReport(
            decision=decision,
            kept=kept,
            total=total,
            loss=ranks.close(loss, rounds),
            screened_rows=ledger.screened_rows,
            forward_rows=ledger.forward_rows,
            backward_rows=ledger.backward_rows,
            screened_tokens=ledger.screened_tokens,
            forward_tokens=ledger.forward_tokens,
            backward_tokens=ledger.backward_tokens,
            forward_flops=ledger.forward_flops if self._known_flops is not None else None,
            backward_flops=ledger.backward_flops if self._known_flops is not None else None,
            seconds=ledger.seconds,
            plan=plan,
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to decide and plan as an unbroken one would."""
        gate: dict[str, Any] = self.gate.state_dict() if isinstance(self.gate, StatefulGate) else {}
        return {"gate": gate, "kept_fraction": self._kept_fraction, "known_flops": dict(self._known_flops or {})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        gate: Any = self.gate
        if isinstance(gate, StatefulGate):
            gate.load_state_dict(state["gate"])
        self._kept_fraction = state["kept_fraction"]
        if self._known_flops is not None:
            self._known_flops = dict(state["known_flops"])

    @property
    def _keeps_everything(self) -> bool:
        return self.gate is None or (type(self.gate) is KondoGate and self.gate.keeps_everything)

    def _decide(
        self, log_prob_fn: LogProbFunction, inputs: Inputs, ledger: Ledger
    ) -> tuple[Plan, Decision, Tensor | None]:
        """The plan, the gate's decision, and the log-probs with a graph where a dense pass came first."""
        if self.gate is None or self._keeps_everything:
            ones = torch.ones(
                self._ranks.total(inputs.total), dtype=inputs.advantages.dtype, device=inputs.advantages.device
            )
            return "dense", Decision(ones.bool(), None, ones, ones), None
        hard_rate = self.gate.rate if type(self.gate) is KondoGate and self.gate.temperature == 0 else None
        plan = cheapest_plan(
            known=inputs.log_probs is not None,
            drafted=self.screen is not None,
            # Several processes decide first: all of them skip the pass, or none.
            undivided=self._ranks.size == 1
            and (self.micro_batch_size is None or self.micro_batch_size >= inputs.total),
            kept_fraction=self._kept_fraction if hard_rate is None else hard_rate,
        )
        graph = None
        if plan == "dense":
            graph = ledger.forward(log_prob_fn, inputs)
            ledger.lap("forward")

        def score() -> Scored:
            if inputs.log_probs is not None:
                log_probs = inputs.log_probs
            elif graph is not None:
                log_probs = finite_where_valid("the dense forward pass: log_probs", graph.detach(), inputs.mask)
            else:
                own = self.screen is None
                source = log_prob_fn if self.screen is None else self.screen
                log_probs = screen_without_graph(source, inputs, self.micro_batch_size, ledger, own, self._ranks)
            return self._score_rows(inputs, log_probs)

        decision = self._ranks.same(self._gate_rows(self.gate, inputs, self._ranks.gather(score)))
        ledger.lap("screen")
        return plan, decision, graph

    def _score_rows(self, inputs: Inputs, log_probs: Tensor) -> Scored:
        score = self.score(at_least_float32(inputs.advantages), at_least_float32(log_probs))
        if score.dim() == 2:
            score = (score if inputs.mask is None else score.where(inputs.mask, 0)).sum(dim=1)
        if score.shape != (inputs.total,):
            raise ValueError(f"the score has shape {tuple(score.shape)}; expected ({inputs.total},), one per row.")
        if self.score is not delight:  # delight is 0 already where the advantage is
            score = score.where(inputs.teaches(), 0)
        cost = None if inputs.row_tokens is None else inputs.row_tokens.to(score.device)
        hard = type(self.gate) is KondoGate and self.gate.temperature == 0  # keeps no score of 0
        return Scored(score, cost, None if hard else inputs.teaches())

    def _gate_rows(self, gate: Gate, inputs: Inputs, scored: Scored) -> Decision:
        score, cost, teaches = scored
        try:
            decision: Any = gate(score, cost)  # whatever a gate of the user's own returns
        except ValueError:
            inputs.check_finite()  # says which input it was, where it was one
            raise
        if not isinstance(decision, Decision):
            raise ValueError(f"the gate returned a {type(decision).__name__}; expected a sparkjoy Decision.")
        if decision.keep.shape != score.shape or decision.keep.dtype != torch.bool:
            raise ValueError(
                f"the gate's keep is {decision.keep.dtype} {tuple(decision.keep.shape)}; expected bool (B,)."
            )
        if teaches is None:
            return decision
        if decision.weight.shape != score.shape or not bool(decision.weight.isfinite().all()):
            raise ValueError(
                f"the gate's weight is {tuple(decision.weight.shape)} or not finite; expected finite (B,)."
            )
        keep = decision.keep & teaches
        return replace(
            decision,
            keep=keep,
            price=decision.price if bool(keep.any()) else None,
            probability=decision.probability.where(teaches, 0),
            weight=without_graph(decision.weight),
        )

    def _weight(self, decision: Decision, kept_rows: Tensor | None) -> Tensor | None:
        """What terms are multiplied by, None for 1: those of `kept_rows`, or of all rows with 0 for the skipped."""
        if kept_rows is not None:
            return None if type(self.gate) is KondoGate else decision.weight[kept_rows]
        return None if self._keeps_everything else decision.weight * decision.keep

    def _terms(self, log_probs: Tensor, rows: Inputs, weight: Tensor | None) -> Tensor:
        """Weighted terms of the loss, 0 where the mask is 0."""
        if rows.mask is not None:
            log_probs = log_probs.where(rows.mask, 0)
        known = rows.log_probs if rows.behavior_log_probs is None else rows.behavior_log_probs
        terms = self.loss(log_probs, rows.advantages, log_probs.detach() if known is None else known, rows.mask)
        if terms.shape != log_probs.shape:
            raise ValueError(
                f"the loss has shape {tuple(terms.shape)}; expected that of log_probs, {tuple(log_probs.shape)}."
            )
        if rows.mask is not None:
            terms = terms.where(rows.mask, 0)
        if weight is None:
            return terms
        weight = weight.to(terms.dtype)
        weight = weight if terms.dim() == 1 else weight.unsqueeze(1)
        return terms.where(weight != 0, 0) * weight

    def _normalizer(self, inputs: Inputs, own: Inputs, kept_rows: Tensor, log_probs: Tensor) -> float:
        """What the sum of the terms is divided by; a count of 0, with nothing but masked tokens, divides by 1."""
        if self.normalizer == "batch":
            return max(1, self._ranks.sum(inputs.tokens(log_probs)))
        if self.normalizer == "samples":
            return self._ranks.total(inputs.total)
        if self.normalizer == "kept":
            if own.row_tokens is not None:
                return max(1, self._ranks.sum(int(own.row_tokens[kept_rows.cpu()].sum())))
            return max(1, self._ranks.sum(kept_rows.shape[0] * (log_probs.shape[1] if log_probs.dim() == 2 else 1)))
        return self.normalizer


def gated_backward(
    log_prob_fn: LogProbFunction,
    batch: Any,
    advantages: Tensor,
    gate: Gate | None,
    *,
    log_probs: Tensor | None = None,
    behavior_log_probs: Tensor | None = None,
    mask: Tensor | None = None,
    count_flops: bool = False,
    **options: Any,
) -> BackwardReport:
    """`GatedBackward` in one call: differentiate only the samples the gate keeps, adding to `.grad`.

    It remembers nothing from call to call, so it counts FLOPs only when asked to (it would have to measure at every
    call, for about a millisecond); in a loop, a `GatedBackward` made once measures once.

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
        log_probs: known ones to decide on, such as the sampler's; then deciding is free.
        behavior_log_probs: the denominator of a loss's ratio; default `log_probs`, else the current ones, detached.
        mask: (B, T), 1 for tokens that count; anything may stand where it is 0, NaN too.
        count_flops: measure FLOPs, at every call.
        options: the other options of `GatedBackward`.

    Returns:
        A `BackwardReport`, counted from what ran.

    Raises:
        ValueError: as `GatedBackward`.
    """
    return GatedBackward(gate, count_flops=count_flops, **options)(
        log_prob_fn, batch, advantages, log_probs=log_probs, behavior_log_probs=behavior_log_probs, mask=mask
    )


def _check_graph(loss: Tensor, log_probs: Tensor) -> None:
    if not log_probs.requires_grad:
        raise ValueError(
            "the log-prob function returned log-probs without a graph, so there is nothing to differentiate; compute "
            "them with gradients enabled, from parameters that require them."
        )
    if not loss.requires_grad:
        raise ValueError("the loss has no graph; expected terms computed from the log-probs it was given.")


def _check_finite_loss(loss: Tensor, log_probs: Tensor, where: str) -> None:
    if not math.isfinite(loss.item()):
        raise ValueError(
            f"{where}: the loss is {loss.item()}, from log-probs between {log_probs.min().item():g} and "
            f"{log_probs.max().item():g}; expected finite numbers. Earlier micro-batches have added to .grad: zero it."
        )
