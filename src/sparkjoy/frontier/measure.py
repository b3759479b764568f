"""Does gating pay for me, and at which setting: each gate's step on one batch, beside the dense one."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import count, takewhile
from typing import Any

import torch
from torch import Tensor

from sparkjoy import checks
from sparkjoy.frontier.arms import Arm, NamedGate, Turn, default_gates, given_gates
from sparkjoy.frontier.cost import PEAK_IS, timed, with_peak
from sparkjoy.frontier.result import Frontier
from sparkjoy.gates import Gate, UnbiasedGate
from sparkjoy.gradients import Gradients, Snapshot, figures, inner_products, same_random_state
from sparkjoy.losses import Loss, reinforce
from sparkjoy.step.backward import GatedBackward
from sparkjoy.step.inputs import Inputs, LogProbFunction, check_inputs
from sparkjoy.step.passes import Normalizer, loss_terms
from sparkjoy.step.report import BackwardReport

Progress = Callable[[float, str], None]
"""Called with the fraction done and what comes next."""
FEWEST_TURNS, MOST_TURNS = 3, 50
LARGER, FASTER = 4, 0.9
"""Micro-batches are tried so many times as large as the last, while a row takes less than this part of its seconds."""
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
    if micro_batch_size is not None:
        expected = "a whole number of at least 1, or None to look for the best"
        micro_batch_size = checks.whole("micro_batch_size", micro_batch_size, expected)
    if rounds is not None:
        rounds = checks.whole("rounds", rounds, "a whole number of at least 1, or None for as many as fit")
    seconds = checks.number("seconds", seconds, "a number of at least 0", lambda seconds: seconds >= 0)
    seed = checks.whole("seed", seed, "a whole number of at least 0", least=0)
    if progress is not None:
        checks.function("progress", progress, "a function (fraction, what) -> None, or None", ..., ...)
    if shared is not None:
        checks.function("shared", shared, "a function from rows to log-probs, or None", ...)
    elif group_by is not None:
        raise ValueError(f"group_by is {checks.described(group_by)}, for the settings with `shared`; give that too.")
    sampled, given = _checked_seconds(sampling_seconds), None if gates is None else list(given_gates(gates))
    gradients, device = Gradients(STEPS_IN_HOOK, _checked_parameters(parameters)), inputs.advantages.device
    measuring = _Measuring(inputs, loss, normalizer, gradients, progress)
    for gate in [UnbiasedGate()] if gates is None else gates.values():
        measuring.engine(gate)  # refuses what does not go together
    with gradients, same_random_state(device), gradients.set_aside(), torch.enable_grad():
        size = measuring.fastest_size(log_prob_fn, micro_batch_size)
        measuring.measure_dense(log_prob_fn, size)
        if given is None:  # a noise of 0.3 keeps no row where rounding leaves none a size
            rate = measuring.rate(UnbiasedGate(noise=0.3), log_prob_fn, size) or 1 / inputs.total
            given = default_gates(rate, seed)
        arms = measuring.arms(given, log_prob_fn, size, shared=False)
        if shared is not None:
            size_shared = measuring.fastest_size(shared, micro_batch_size)
            arms += measuring.arms(given, shared, size_shared, shared=True, group_by=group_by)
        measuring.take_turns(arms, rounds, seconds)
    settings, peak_is = tuple(arm.setting() for arm in arms), PEAK_IS[device.type == "cuda"]
    return Frontier(settings, inputs.total, measuring.tokens, size, log_probs is not None, peak_is, sampled)


class _Measuring:
    """What all settings have in common: the batch, and the dense gradient that theirs are compared with."""

    def __init__(
        self, inputs: Inputs, loss: Loss, normalizer: Normalizer, gradients: Gradients, progress: Progress | None
    ) -> None:
        self.inputs, self.loss, self.normalizer, self.gradients = inputs, loss, normalizer, gradients
        self.device, self.engine = inputs.advantages.device, partial(GatedBackward, loss=loss, normalizer=normalizer)
        self.progress, self.done = progress or (lambda fraction, what: None), 0.0
        self.dense_gradient, self.tokens = Snapshot(), 0

    def tell(self, done: float, what: str) -> None:
        """Call `progress`, with a fraction that never falls, though more turns may be planned later."""
        self.done = max(self.done, done)
        self.progress(self.done, what)

    def fastest_size(self, log_prob_fn: LogProbFunction, given: int | None) -> int:
        """The micro-batch size given, or the fastest by seconds a row: 1, 4, 16, ... while that clearly falls.

        The engine runs one row first, to say at once what is wrong with the function.
        """
        watched, total = self.gradients.watched(log_prob_fn), self.inputs.total
        _run(self.engine(None), watched, self.inputs.take(slice(0, 1)))
        if given is not None:
            return min(given, total)
        best, best_seconds = 0, math.inf
        for size in [*takewhile(total.__gt__, (LARGER**power for power in count())), total]:
            self.tell(0.0, f"{size:,} rows in a micro-batch")
            step = partial(self.plain_pass, watched, slice(0, size), 1.0)
            try:
                seconds = min(timed(step, self.device)[0] for _ in range(2)) / size
            except torch.OutOfMemoryError:
                if not best:
                    raise
                break
            if seconds > FASTER * best_seconds:
                break
            best, best_seconds = size, seconds
        return best

    def measure_dense(self, log_prob_fn: LogProbFunction, size: int) -> None:
        """Keep the dense gradient to compare with, and the number of tokens of the batch."""
        self.tell(0.05, "the gradient to compare with")
        self.gradients.clear()
        engine = self.engine(None, micro_batch_size=size)
        self.tokens = _run(engine, self.gradients.watched(log_prob_fn), self.inputs).backward_tokens
        self.dense_gradient = self.gradients.snapshot()
        length = math.sqrt(inner_products(self.gradients.pairs_with(self.dense_gradient))[0])
        if not 0 < length < math.inf:
            raise ValueError(f"the gradient of the batch has a length of {length:g}; expected one to compare with.")

    def rate(self, gate: Gate, log_prob_fn: LogProbFunction, size: int) -> float:
        """The fraction of the rows that a gate keeps, on average over its draws."""
        probability = _run(self.engine(gate, micro_batch_size=size), log_prob_fn, self.inputs).decision.probability
        return min(float(probability.mean()), 1.0)

    def arms(
        self, gates: list[NamedGate], log_prob_fn: LogProbFunction, size: int, shared: bool, group_by: str | None = None
    ) -> list[Arm]:
        """The dense step and copies of the gates (with shared tokens of the unbiased ones alone) by this function."""
        suffix = ", shared" if shared else ""
        dense = partial(self.plain_step, log_prob_fn, size)
        arms = [Arm(f"dense{suffix}", "unbiased" if shared else "dense", None, shared, dense)]
        for name, kind, gate, score in copy.deepcopy(gates):
            if kind == "unbiased" or not shared:
                engine = self.engine(gate, score=score, micro_batch_size=size, group_by=group_by)
                step = partial(_run, engine, log_prob_fn, self.inputs)
                arms.append(Arm(f"{name}{suffix}", kind, gate, shared, step))
        return arms

    def plain_step(self, log_prob_fn: LogProbFunction, size: int) -> None:
        """The dense step as one writes it without a gate: a loop over micro-batches."""
        total, divisor = self.inputs.total, self.normalizer
        if isinstance(divisor, str):
            divisor = total if divisor == "samples" else self.tokens
        for start in range(0, total, size):
            self.plain_pass(log_prob_fn, slice(start, start + size), divisor)

    def plain_pass(self, log_prob_fn: LogProbFunction, rows: slice, divisor: float) -> None:
        """Forward and backward over some rows, copies of them: the function may write into what it gets."""
        part = self.inputs.take(rows)
        (loss_terms(self.loss, log_prob_fn(part.batch), part).sum() / divisor).backward()

    def take_turns(self, arms: list[Arm], rounds: int | None, seconds: float) -> None:
        """Each arm in turn, `rounds` times; None: as often as fits the seconds."""
        start, turn, planned = time.perf_counter(), 0, rounds or MOST_TURNS
        while turn < planned:
            of = f" of {planned}" if rounds or turn else ""
            for index, arm in enumerate(arms):
                self.tell(0.1 + 0.9 * (turn + index / len(arms)) / planned, f"turn {turn + 1}{of}: {arm.name}")
                self.take_turn(arm)
            turn += 1
            if rounds is None:
                fitting = int(seconds * turn / (time.perf_counter() - start))
                planned = min(max(FEWEST_TURNS, fitting), MOST_TURNS)
        self.tell(1.0, "done")

    def take_turn(self, arm: Arm) -> None:
        """Measure one step of an arm: seconds, what it kept, its gradient beside the dense one, at first its bytes."""
        self.gradients.clear()
        if arm.turns:
            seconds, report = timed(arm.step, self.device)
        else:
            watched = partial(with_peak, arm.step, self.device, self.gradients.parameters)
            seconds, (report, arm.peak_bytes) = timed(watched, self.device)
        rows, tokens, noise = self.inputs.total, self.tokens, 0.0
        if report is not None:
            rows, tokens, noise = report.kept, self.tokens // rows * report.kept, report.noise
            if self.inputs.row_tokens is not None:
                tokens = int(self.inputs.row_tokens[report.decision.keep.cpu().numpy()].sum())
        pairs = ((here, dense) for dense, here in self.gradients.pairs_with(self.dense_gradient))
        cosine, error, _ = figures(inner_products(pairs))
        if error is None:
            cosine = error = math.nan  # the gradient is not finite
        arm.turns.append(Turn(seconds, rows, tokens, noise, error, cosine or 0.0))


def _run(engine: GatedBackward, log_prob_fn: LogProbFunction, inputs: Inputs) -> BackwardReport:
    known = {name: getattr(inputs, name) for name in ("log_probs", "behavior_log_probs", "mask")}
    return engine(log_prob_fn, inputs.batch, inputs.advantages, **known)


def _checked_parameters(parameters: Iterable[Tensor] | None) -> list[Tensor]:
    if parameters is None:
        return []
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    found = list(checks.instance("parameters", parameters, Iterable, "tensors, such as model.parameters(), or None"))
    for index, parameter in enumerate(found):
        checks.instance(f"parameters[{index}]", parameter, Tensor, "a tensor")
    if not any(parameter.requires_grad for parameter in found):
        raise ValueError("parameters has none that requires a gradient; leave it out for them to be found.")
    return found


def _checked_seconds(sampling: Any) -> tuple[float, float] | None:
    """Seconds of sampling without shared tokens and with them, from one number or two."""
    if sampling is None:
        return None
    both = sampling if isinstance(sampling, tuple | list) else (sampling, sampling)
    if len(both) != 2:
        raise ValueError(
            f"sampling_seconds has {len(both)} numbers; expected one, or two: without shared tokens, with."
        )
    plain, shared = (
        checks.number("sampling_seconds", one, "a number of at least 0", lambda value: value >= 0) for one in both
    )
    return plain, shared
