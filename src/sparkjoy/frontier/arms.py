"""The settings while they are measured: which gates, and what their turns come to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparkjoy import checks
from sparkjoy.frontier.result import Kind, Setting
from sparkjoy.gates import Gate, KondoGate, UnbiasedGate
from sparkjoy.gates.decision import GATE, weighs
from sparkjoy.scores import ScoreFunction, says
from sparkjoy.signs import worth
from sparkjoy.step.report import BackwardReport

NamedGate = tuple[str, Kind, Gate, ScoreFunction | None]
"""Name, kind, gate, and what it decides on; None: its own default."""


class Turn(NamedTuple):
    """One step of a setting, beside the dense one: see `Setting`."""

    seconds: float
    rows: int
    tokens: int
    noise: float | None
    error: float
    cosine: float


@dataclass
class Arm:
    """A setting that takes turns.

    Args:
        name: as `Setting`'s, as are kind, gate, shared and peak_bytes.
        step: adds one step's gradient to `.grad`; returns the engine's report, None for the dense step.
        turns: taken so far.
    """

    name: str
    kind: Kind
    gate: Gate | None
    shared: bool
    step: Callable[[], BackwardReport | None]
    turns: list[Turn] = field(default_factory=list)
    peak_bytes: int = 0

    def setting(self) -> Setting:
        """Medians and means over the turns."""
        seconds, rows, tokens, noises, errors, cosines = zip(*self.turns, strict=True)
        return Setting(
            name=self.name,
            gate=None if self.gate is None else repr(self.gate),
            kind=self.kind,
            rows=float(np.mean(rows)),
            tokens=float(np.mean(tokens)),
            seconds=float(np.median(seconds)),
            peak_bytes=self.peak_bytes,
            error=float(np.sqrt(np.mean(np.square(errors)))),
            cosine=float(np.mean(cosines)),
            noise=None if None in noises else float(np.mean(noises)),
            turns=len(self.turns),
            shared=self.shared,
        )


def given_gates(gates: Mapping[str, Gate]) -> Iterator[NamedGate]:
    """The user's gates, or a ValueError where these are not gates by name."""
    if not isinstance(gates, Mapping) or not gates:
        raise ValueError(f"gates is {checks.described(gates)}; expected a dict of at least one gate by name, or None.")
    for name, gate in gates.items():
        if not isinstance(name, str) or name == "dense":
            raise ValueError(
                f"gates has the name {checks.described(name)}; expected a string other than 'dense', which is measured "
                "anyway."
            )
        checks.function(f"gates[{name!r}]", gate, GATE, ..., ...)
        yield name, "unbiased" if weighs(gate) else "biased", gate, None


def default_gates(rate: float, seed: int) -> list[NamedGate]:
    """Noise budgets, hard gates, and a uniform gate of this rate."""

    def unbiased(**budget: float) -> UnbiasedGate:
        return UnbiasedGate(**budget, generator=torch.Generator("cpu").manual_seed(seed))

    return [
        *((f"noise {noise:g}", "unbiased", unbiased(noise=noise), None) for noise in (0.1, 0.3, 1.0, 3.0)),
        *((f"hard {fraction:.0%}", "biased", KondoGate(rate=fraction), None) for fraction in (0.25, 0.1, 0.03)),
        (f"uniform {rate:.0%}", "baseline", unbiased(rate=rate), all_alike),
        ("price 0", "biased", KondoGate(price=0.0), None),
    ]


@says(reads_log_probs=False)
def all_alike(advantages: Tensor, log_probs: Tensor) -> Tensor:
    """(B,) scores by which all rows that teach something are kept with the same probability.

    >>> all_alike(torch.tensor([3.0, -0.5, 0.0]), torch.zeros(3))
    tensor([ 1., -1.,  0.])
    """
    return worth(advantages).sign()
