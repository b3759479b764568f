"""Does gating pay for me, and at which setting: each gate's step on one batch, beside the dense one."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparkjoy import checks
from sparkjoy.frontier.arms import (
    PEAK_BYTES,
    Arm,
    Outcome,
    Progress,
    check_gates,
    default_gates,
    plain_pass,
    timed,
    turns,
    with_peak,
)
from sparkjoy.frontier.result import Frontier, Kind, checked_seconds
from sparkjoy.gates import Gate, UnbiasedGate
from sparkjoy.gradients import Gradients, Snapshot, figures, same_random_state, sums
from sparkjoy.losses import Loss, reinforce
from sparkjoy.scores import ScoreFunction
from sparkjoy.selecting import select
from sparkjoy.step.backward import GatedBackward, check_unbiased, checked_normalizer
from sparkjoy.step.inputs import Inputs, LogProbFunction, check_inputs
from sparkjoy.step.passes import Normalizer
from sparkjoy.step.report import BackwardReport

SHARED = ", shared"
"""What ends the names of settings with shared tokens."""

LARGER, FASTER = 4, 0.9
"""Micro-batches are tried so many times as large as the last, while a row takes less than this part of its seconds."""

NamedGate = tuple[str, Kind, Gate, ScoreFunction | None]
"""Name, kind, gate, and what it decides on; None: its own default."""

STEPS_IN_HOOK = "measuring takes many backward passes: the hook would run in each. Remove it while measuring."


def frontier(
    log_prob_fn: LogProbFunction,
    batch: Any,
    advantages: Tensor,
    *,
    gates: Mapping[str, Gate] | None = None,
    log_probs: Tensor | None = None,
    behavior_log_probs: Tensor | None = None,
    mask: Tensor | None = None,
    loss: Loss = reinforce,
    normalizer: Normalizer = "batch",
    micro_batch_size: int | None = None,
    parameters: Iterable[Tensor] | None = None,
    rounds: int | None = None,
    seconds: float = 20.0,
    seed: int = 0,
    progress: Progress | None = None,
    shared: LogProbFunction | None = None,
    group_by: str | None = None,
    sampling_seconds: float | tuple[float, float] | None = None,
) -> Frontier:
    """What each gate would save of a step on this batch, and what it would do to its gradient.

    All settings take turns, so that what else the machine does falls on all alike: the dense step as a plain loop, the
    gates through `GatedBackward`. Nothing is trained: gradients are put back as they were, no optimizer is stepped, and
    torch's random state is put back, so no thread of yours may draw from it meanwhile: it would draw the same numbers
    again. What `log_prob_fn` itself changes, such as a batch norm's statistics, stays changed. While measuring, two
    more sets of gradients are in memory.

    >>> import torch, sparkjoy as sj
    >>> _ = torch.manual_seed(0)
    >>> policy = torch.nn.Linear(8, 4)
    >>> batch = {"states": torch.randn(100, 8), "actions": torch.randint(4, (100,))}
    >>> def log_prob_fn(rows):
    ...     return policy(rows["states"]).log_softmax(-1).gather(1, rows["actions"][:, None]).squeeze(1)
    >>> found = sj.frontier(log_prob_fn, batch, torch.randn(100), rounds=3)
    >>> {setting.name: setting.rows for setting in found.settings if setting.kind in ("dense", "biased")}
    {'dense': 100.0, 'hard 25%': 25.0, 'hard 10%': 10.0, 'hard 3%': 3.0, 'price 0': 49.0}
    >>> best, why = found.recommend()  # on a policy this small most likely the dense step

    Args:
        log_prob_fn: `rows -> (n,)` or `(n, T)` differentiable log-probs of the actions taken in `rows`.
        batch: a tensor, or a TensorDict, Mapping, namedtuple or dataclass of tensors, with leading dimension B.
        advantages: (B,), or (B, T) with log-probs of (B, T).
        gates: by name, beside the dense step; copies of them decide. None: a noise of 0.1, 0.3, 1 and 3, the hard gate
            at 25, 10 and 3%, as many rows as a noise of 0.3 keeps but at random, and a price of 0.
        log_probs: known ones to decide on, such as the sampler's; None: the gates look at the rows first, as they would
            in training.
        behavior_log_probs: as `GatedBackward`'s.
        mask: (B, T), 1 for tokens that count.
        loss: as `GatedBackward`'s.
        normalizer: as `GatedBackward`'s.
        micro_batch_size: rows per forward and backward pass, for all settings; None: the fastest of 1, 4, 16, ... for
            the dense step, up to the first that is slower or does not fit; and likewise for `shared`.
        parameters: some whose gradients are put back too, whether or not they are found; None: those that are, in the
            graph of the log-probs and inside of reentrant checkpoints.
        rounds: turns of each setting; None: as many as fit `seconds`, from 3 to 50.
        seconds: how long to go on.
        seed: of the default gates' draws.
        progress: called with the fraction done and what comes next.
        shared: a `log_prob_fn` that computes what rows have in common once, such as one of `SharedTokens`: the dense
            step and the unbiased gates are measured with it too.
        group_by: as `GatedBackward`'s, for the settings with `shared`.
        sampling_seconds: what sampling the batch took, to compare whole steps; two numbers where it is quicker with
            shared tokens: without, with.

    Returns:
        A `Frontier`: `.settings`, `.table()`, `.plot(path)`, `.recommend()`.

    Raises:
        ValueError: as `GatedBackward`; a batch without an advantage other than 0, or whose gradient is 0; a parameter
            whose gradient runs a hook.
    """
    checks.function("log_prob_fn", log_prob_fn, "a function from rows to log-probs", ...)
    inputs = check_inputs(batch, advantages, log_probs, behavior_log_probs, mask)
    if not bool(inputs.teaches().any()):
        raise ValueError("advantages are all 0, so there is no gradient; give a batch that has something to teach.")
    normalizer = checked_normalizer(normalizer)
    if micro_batch_size is not None:
        expected = "a whole number of at least 1, or None to look for the best"
        micro_batch_size = checks.whole("micro_batch_size", micro_batch_size, expected)
    if rounds is not None:
        rounds = checks.whole("rounds", rounds, "a whole number of at least 1, or None for as many as fit")
    seconds = checks.number("seconds", seconds, "a number of at least 0", lambda seconds: seconds >= 0)
    seed = checks.whole("seed", seed, "a whole number of at least 0", least=0)
    if progress is not None:
        checks.function("progress", progress, "a function (fraction, what) -> None, or None", ..., ...)
    if gates is not None:
        check_gates(gates)
    for gate in [UnbiasedGate()] if gates is None else gates.values():
        check_unbiased(normalizer, gate)
    if shared is not None:
        checks.function("shared", shared, "a function from rows to log-probs, or None", ...)
    sampled = checked_seconds(sampling_seconds)
    say = progress or (lambda fraction, what: None)
    with Gradients(STEPS_IN_HOOK, _checked(parameters)) as gradients:
        measuring = _Measuring(inputs, loss, normalizer, gradients, say)
        with same_random_state(measuring.device), gradients.apart(), torch.enable_grad():
            watched = gradients.watched(log_prob_fn)
            measuring.refuse(watched)
            size = min(micro_batch_size or measuring.best_size(watched), inputs.total)
            say(0.05, "the gradient to compare with")
            known = measuring.refer(watched, size)
            arms = measuring.arms(measuring.gates(gates, known, seed), log_prob_fn, size)
            if shared is not None:
                of_shared = min(micro_batch_size or measuring.best_size(shared), inputs.total)
                unbiased = [gate for gate in measuring.gates(gates, known, seed) if gate[1] == "unbiased"]
                arms += measuring.arms(unbiased, shared, of_shared, SHARED, group_by)
            for arm in turns(arms, rounds, seconds, say):
                measuring.take(arm)
    settings = tuple(arm.measured() for arm in arms)
    bytes_are = PEAK_BYTES[measuring.device.type == "cuda"]
    return Frontier(settings, inputs.total, measuring.tokens, size, log_probs is not None, bytes_are, sampled)


class _Measuring:
    """What all settings have in common: the batch, the gradients they add, the dense one to compare with."""

    def __init__(
        self,
        inputs: Inputs,
        loss: Loss,
        normalizer: Normalizer,
        gradients: Gradients,
        say: Progress,
    ) -> None:
        self.inputs, self.loss, self.normalizer, self.gradients, self.say = inputs, loss, normalizer, gradients, say
        self.device = inputs.advantages.device
        self.tokens, self.reference = 0, Snapshot()

    def refuse(self, log_prob_fn: LogProbFunction) -> None:
        """What is wrong with the function, at once."""
        self._run(GatedBackward(None, loss=self.loss, normalizer=self.normalizer), log_prob_fn, slice(0, 1))

    def best_size(self, log_prob_fn: LogProbFunction) -> int:
        """The fastest micro-batch size, by seconds a row: 1, 4, 16, ... while the larger one is clearly faster."""
        total = self.inputs.total
        best, best_seconds, size = 0, math.inf, 1
        while True:
            self.say(0.0, f"{size:,} rows in a micro-batch")
            step = partial(plain_pass, log_prob_fn, self.inputs, self.loss, slice(0, size))
            try:
                seconds = min(timed(step, self.device)[0] for _ in range(2)) / size
            except torch.OutOfMemoryError:
                if not best:
                    raise
                return best
            if seconds > FASTER * best_seconds:
                return best
            best, best_seconds = size, seconds
            if size == total:
                return best
            size = min(LARGER * size, total)

    def refer(self, log_prob_fn: LogProbFunction, size: int) -> Tensor:
        """Take the dense gradient to compare with; the log-probs of the batch."""
        seen: list[Tensor] = []

        def seeing(rows: Any) -> Tensor:
            log_probs = log_prob_fn(rows)
            seen.append(log_probs.detach())
            return log_probs

        self.gradients.clear()
        engine = GatedBackward(None, loss=self.loss, normalizer=self.normalizer, micro_batch_size=size)
        self._run(engine, seeing, slice(0, self.inputs.total))
        self.reference = self.gradients.snapshot()
        length = math.sqrt(sums(self.gradients.beside(self.reference))[0])
        if not 0 < length < math.inf:
            raise ValueError(f"the gradient of the batch has a length of {length:g}; expected one to compare with.")
        found = torch.cat(seen)
        self.tokens = self.inputs.tokens(found)
        return found if self.inputs.log_probs is None else self.inputs.log_probs

    def gates(self, given: Mapping[str, Gate] | None, known: Tensor, seed: int) -> Iterable[NamedGate]:
        """Copies of the gates given, or the default ones."""
        if given is not None:
            return [
                (name, "unbiased" if getattr(gate, "weighted", None) else "biased", gate, None)
                for name, gate in copy.deepcopy(dict(given)).items()
            ]
        kept = select(UnbiasedGate(noise=0.3), self.inputs.advantages, known, self.inputs.mask, loss=self.loss)
        return default_gates(float(kept.decision.probability.mean()), seed)

    def arms(
        self,
        gates: Iterable[NamedGate],
        log_prob_fn: LogProbFunction,
        size: int,
        suffix: str = "",
        group_by: str | None = None,
    ) -> list[Arm]:
        """The dense step and the gates by this function, in micro-batches of that size."""
        shared = bool(suffix)
        arms = [
            Arm(
                f"dense{suffix}",
                "unbiased" if shared else "dense",
                None,
                partial(self.dense, log_prob_fn, size),
                shared,
            )
        ]
        for name, kind, gate, score in gates:
            engine = GatedBackward(
                gate,
                loss=self.loss,
                score=score,
                normalizer=self.normalizer,
                micro_batch_size=size,
                group_by=group_by,
            )
            arms.append(Arm(f"{name}{suffix}", kind, gate, partial(self.gated, engine, log_prob_fn), shared))
        return arms

    def dense(self, log_prob_fn: LogProbFunction, size: int) -> Outcome:
        """The plain loop over all rows."""
        total, divisor = self.inputs.total, self.normalizer
        if isinstance(divisor, str):
            divisor = total if divisor == "samples" else self.tokens
        for start in range(0, total, size):
            plain_pass(log_prob_fn, self.inputs, self.loss, slice(start, min(start + size, total)), divisor)
        return total, self.tokens, 0.0

    def gated(self, engine: GatedBackward, log_prob_fn: LogProbFunction) -> Outcome:
        """A step of the engine."""
        report, total = self._run(engine, log_prob_fn, slice(0, self.inputs.total)), self.inputs.total
        row_tokens = self.inputs.row_tokens
        if row_tokens is None:
            row_tokens = np.full(total, self.tokens // total)
        return report.kept, int(row_tokens[report.decision.keep.cpu().numpy()].sum()), report.noise

    def take(self, arm: Arm) -> None:
        """A turn of a setting: its seconds, what came of it, its gradient beside the dense one, once its bytes."""
        self.gradients.clear()
        if arm.peaks:
            taken, outcome = timed(arm.step, self.device)
        else:
            watched = partial(with_peak, arm.step, self.device, self.gradients.parameters)
            taken, (outcome, peak) = timed(watched, self.device)
            arm.peaks.append(peak)
        arm.seconds.append(taken)
        arm.outcomes.append(outcome)
        cosine, error, _ = figures(sums((here, dense) for dense, here in self.gradients.beside(self.reference)))
        arm.compared.append((math.nan if error is None else error, cosine or 0.0))

    def _run(self, engine: GatedBackward, log_prob_fn: LogProbFunction, rows: slice) -> BackwardReport:
        part = self.inputs.take(rows)
        return engine(
            log_prob_fn,
            part.batch,
            part.advantages,
            log_probs=part.log_probs,
            behavior_log_probs=part.behavior_log_probs,
            mask=part.mask,
        )


def _checked(parameters: Iterable[Tensor] | None) -> list[Tensor]:
    if parameters is None:
        return []
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    found = list(checks.instance("parameters", parameters, Iterable, "tensors, such as model.parameters(), or None"))
    for index, parameter in enumerate(found):
        checks.instance(f"parameters[{index}]", parameter, Tensor, "a tensor")
    if not any(parameter.requires_grad for parameter in found):
        raise ValueError("parameters has none that requires a gradient; leave it out for them to be found.")
    return found
