"""The settings that take turns: the plain dense loop, and what the gates do through the engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sparkjoy import checks
from sparkjoy.frontier.result import Kind, Setting
from sparkjoy.gates import Gate, KondoGate, UnbiasedGate
from sparkjoy.gates.decision import GATE
from sparkjoy.losses import Loss
from sparkjoy.scores import ScoreFunction, at_least_float32, says
from sparkjoy.signs import worth
from sparkjoy.step.inputs import Inputs, LogProbFunction

Progress = Callable[[float, str], None]
"""Called with the fraction done and what comes next."""
Outcome = tuple[float, float, float | None]
"""Rows kept, their tokens, and the noise that a weighted gate added."""
FEWEST_TURNS, MOST_TURNS = 3, 50


@dataclass(frozen=True)
class Arm:
    """A setting, and what came of its turns.

    Args:
        name: of the setting.
        kind: of the setting.
        gate: None for the dense step.
        step: adds one step's gradient to `.grad`.
        shared: by the function that shares tokens.
        seconds: of each turn.
        outcomes: likewise.
        compared: error and cosine, likewise.
        peaks: bytes of the turns that were watched.
    """

    name: str
    kind: Kind
    gate: Gate | None
    step: Callable[[], Outcome]
    shared: bool = False
    seconds: list[float] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    compared: list[tuple[float, float]] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)

    def measured(self) -> Setting:
        """Medians and means over the turns."""
        rows, tokens, noises = zip(*self.outcomes, strict=True)
        errors, cosines = zip(*self.compared, strict=True)
        return Setting(
            name=self.name,
            gate=None if self.gate is None else repr(self.gate),
            kind=self.kind,
            rows=float(np.mean(rows)),
            tokens=float(np.mean(tokens)),
            seconds=float(np.median(self.seconds)),
            peak_bytes=max(self.peaks),
            error=float(np.sqrt(np.mean(np.square(errors)))),
            cosine=float(np.mean(cosines)),
            noise=None if None in noises else float(np.mean(noises)),
            turns=len(self.seconds),
            shared=self.shared,
        )


class PlainLoop:
    """What one writes without a gate: adds the gradient of some rows to `.grad`, in one pass.

    Args:
        log_prob_fn: `rows -> log-probs`, differentiable.
        inputs: the checked batch.
        loss: as `GatedBackward`'s.
        divisor: what the sum of the terms is divided by.
    """

    def __init__(self, log_prob_fn: LogProbFunction, inputs: Inputs, loss: Loss, divisor: float = 1.0) -> None:
        self.log_prob_fn = log_prob_fn
        self.inputs = inputs
        self.loss = loss
        self.divisor = divisor

    def __call__(self, rows: slice) -> None:
        """Forward and backward over these rows, copies of them: the function may write into what it gets."""
        part = self.inputs.take(rows)
        log_probs = self.log_prob_fn(part.batch)
        if part.mask is not None:
            log_probs = log_probs.where(part.mask, 0)
        log_probs = at_least_float32(log_probs)
        known = part.log_probs if part.behavior_log_probs is None else part.behavior_log_probs
        terms = self.loss(log_probs, part.advantages, log_probs.detach() if known is None else known, part.mask)
        if part.mask is not None:
            terms = terms.where(part.mask, 0)
        (terms.sum() / self.divisor).backward()


def default_gates(rate: float, seed: int) -> Iterator[tuple[str, Kind, Gate, ScoreFunction | None]]:
    """Name, kind, gate and what it decides on (None: its own default); `rate` is what a noise of 0.3 keeps."""

    def generator() -> torch.Generator:
        return torch.Generator("cpu").manual_seed(seed)

    for noise in (0.1, 0.3, 1.0, 3.0):
        yield f"noise {noise:g}", "unbiased", UnbiasedGate(noise=noise, generator=generator()), None
    for fraction in (0.25, 0.1, 0.03):
        yield f"hard {fraction:.0%}", "biased", KondoGate(rate=fraction), None
    yield f"uniform {rate:.0%}", "baseline", UnbiasedGate(rate=min(rate, 1.0), generator=generator()), all_alike
    yield "price 0", "biased", KondoGate(price=0.0), None


@says(reads_log_probs=False)
def all_alike(advantages: Tensor, log_probs: Tensor) -> Tensor:
    """(B,) scores by which all rows that teach something are kept with the same probability.

    >>> all_alike(torch.tensor([3.0, -0.5, 0.0]), torch.zeros(3))
    tensor([ 1., -1.,  0.])
    """
    return worth(advantages).sign()


def check_gates(gates: Mapping[str, Gate]) -> None:
    """Raise a ValueError where these are not gates by name."""
    if not isinstance(gates, Mapping) or not gates:
        raise ValueError(f"gates is {checks.described(gates)}; expected a dict of at least one gate by name, or None.")
    for name, gate in gates.items():
        if not isinstance(name, str) or name == "dense":
            raise ValueError(
                f"gates has the name {checks.described(name)}; expected a string other than 'dense', which is measured "
                "anyway."
            )
        checks.function(f"gates[{name!r}]", gate, GATE, ..., ...)


def turns(arms: list[Arm], rounds: int | None, seconds: float, say: Progress) -> Iterator[Arm]:
    """Each arm in turn, again and again.

    Args:
        arms: all of them.
        rounds: turns of each; None: as many as fit `seconds`.
        seconds: how long to go on.
        say: told before each turn.
    """
    start, turn, planned = time.perf_counter(), 0, rounds or FEWEST_TURNS
    while turn < planned:
        for index, arm in enumerate(arms):
            say(0.1 + 0.9 * (turn + index / len(arms)) / planned, f"turn {turn + 1} of {planned}: {arm.name}")
            yield arm
        turn += 1
        if rounds is None:
            each = (time.perf_counter() - start) / turn
            planned = min(max(FEWEST_TURNS, int(seconds / each)), MOST_TURNS)
    say(1.0, "done")
