"""What one training run is asked to do, and the step that does it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sparkjoy.baselines import good_and_bad_advantage, group_standardised_advantage
from sparkjoy.engine.backward import GatedBackward
from sparkjoy.engine.token_gate import TokenGatedBackward
from sparkjoy.gates import KondoGate
from sparkjoy.losses import Loss, clipped, delightful, reinforce
from sparkjoy.scores import (
    ScoreFunction,
    absolute_advantage_score,
    additive_score,
    advantage_score,
    delight,
    surprisal_score,
    uniform_score,
)

Method = Literal["pg", "dg", "kondo", "uniform", "ppo", "grpo", "pmpo"]
Score = Literal["delight", "advantage", "absolute-advantage", "surprisal", "additive", "uniform"]

DEFAULT_RATE = 0.03


@dataclass(frozen=True)
class Settings:
    """One run: everything that its records depend on, but for the task."""

    method: Method = "kondo"
    """pg: plain policy gradient; dg: delightful one; kondo: the gate; uniform: rows at random; ppo, grpo, pmpo."""
    rate: float | None = None
    """Fraction of samples kept by kondo and uniform. Default 0.03 where no price is given."""
    price: float | None = None
    """Keep only samples whose score is above this; 0 is the papers' zero price."""
    temperature: float = 0.0
    """Softness of the gate; 0 is the hard gate."""
    negative_share: float = 0.0
    """Fraction of the kept samples reserved for the most negative scores; kondo only."""
    score: Score = "delight"
    """What the gate ranks samples by."""
    alpha: float = 0.5
    """Weight of the advantage in the additive score."""
    steps: int = 10_000
    """Optimizer steps."""
    seed: int = 0
    """Seed of the initial weights and of every draw."""
    learning_rate: float = 1e-3
    """Adam's learning rate."""
    evaluate_every: int = 100
    """Steps between evaluations; each writes a record."""
    until_error: float | None = None
    """Stop at the first evaluation with an error at or below this fraction."""
    target_error: float | None = None
    """Report when the error first was at or below this fraction; the run goes on."""
    clip: float = 0.2
    """Range of the ratio in ppo and grpo."""
    epochs: int | None = None
    """Updates on each batch. Default 4 for ppo, else 1."""
    dg_unit: Literal["token", "sample"] = "token"
    """Whose delight weights a term in dg: its own token's, or the whole answer's."""
    unit: Literal["sample", "token"] = "sample"
    """What kondo keeps or skips: whole answers, or, as an experiment, single tokens."""
    micro_batch_size: int | None = None
    """Rows per forward and backward pass; all at once by default."""
    threads: int = 1
    """Threads of torch."""

    def __post_init__(self) -> None:
        for name in ("steps", "evaluate_every", "threads", "epochs"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least 1.")
        for name in ("until_error", "target_error"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: expected a fraction, such as 0.05 for 5%.")
        if not self.learning_rate > 0:
            raise ValueError(f"--learning-rate {self.learning_rate}: expected a number above 0.")
        if not self.gated and (self.rate is not None or self.price is not None):
            raise ValueError(
                f"--method {self.method} keeps every sample; --rate and --price go with kondo and uniform."
            )
        if self.negative_share and self.method != "kondo":
            raise ValueError(f"--negative-share goes with --method kondo; --method {self.method} was given.")
        if self.unit == "token" and (self.method != "kondo" or self.score != "delight" or self.micro_batch_size):
            raise ValueError("--unit token goes with --method kondo, by delight, in one micro-batch.")
        self.step(torch.Generator(), trim=None)  # raises on a rate, price, temperature or alpha outside its range

    @property
    def gated(self) -> bool:
        """Whether samples are skipped at all."""
        return self.method in ("kondo", "uniform")

    @property
    def updates(self) -> int:
        """Updates on each batch."""
        return self.epochs or (4 if self.method == "ppo" else 1)

    @property
    def gate_rate(self) -> float | None:
        """The rate in force."""
        return DEFAULT_RATE if self.gated and self.rate is None and self.price is None else self.rate

    @property
    def label(self) -> str:
        """A short name of the arm, without the seed: `kondo 3%`."""
        parts: list[str] = [self.method]
        if self.gate_rate is not None:
            parts.append(f"{100 * self.gate_rate:g}%")
        if self.price is not None:
            parts.append(f"price {self.price:g}")
        if self.unit == "token":
            parts.append("of tokens")
        if self.negative_share:
            parts.append(f"negative {100 * self.negative_share:g}%")
        if self.method == "kondo" and self.score != "delight":
            parts.append(f"by {self.score}" + (f" {self.alpha:g}" if self.score == "additive" else ""))
        return " ".join(parts)

    def step(
        self, generator: torch.Generator, trim: Callable[[Any, int], Any] | None
    ) -> GatedBackward | TokenGatedBackward:
        """The engine's step of this method; `generator` is the source of the gate's draws, `trim` shortens answers."""
        loss: Loss = reinforce
        if self.method == "dg":
            loss = delightful(unit=self.dg_unit)
        elif self.method in ("ppo", "grpo"):
            loss = clipped(self.clip)
        gate = None
        if self.gated:
            gate = KondoGate(self.gate_rate, self.price, self.temperature, generator, self.negative_share)
        if gate is not None and self.unit == "token":
            return TokenGatedBackward(gate, loss=loss, trim=trim)
        return GatedBackward(
            gate, loss=loss, score=self._score(generator), micro_batch_size=self.micro_batch_size, normalizer="batch"
        )

    def advantages(self, advantages: Tensor, group_size: int | None) -> Tensor:
        """What this method makes of advantages (B,) over their group's baseline."""
        if self.method == "grpo":
            return group_standardised_advantage(advantages, group_size)
        if self.method == "pmpo":
            return good_and_bad_advantage(advantages)
        return advantages

    def _score(self, generator: torch.Generator) -> ScoreFunction:
        scores: dict[str, ScoreFunction] = {
            "delight": delight,
            "advantage": advantage_score,
            "absolute-advantage": absolute_advantage_score,
            "surprisal": surprisal_score,
            "additive": additive_score(self.alpha),
            "uniform": uniform_score(generator),
        }
        return scores["uniform" if self.method == "uniform" else self.score]
