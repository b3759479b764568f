"""What one training run is asked to do, and the step that does it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sparkjoy.baselines import good_and_bad_advantage, group_standardised_advantage
from sparkjoy.drafts import Audit
from sparkjoy.drafts.draft import Draft
from sparkjoy.engine.backward import GatedBackward
from sparkjoy.gates import BudgetGate, Gate, KondoGate, SoftGate, UnbiasedGate
from sparkjoy.lab.token_gate import TokenGatedBackward
from sparkjoy.lab.training.processes import WHOLE, Share
from sparkjoy.lab.training.screening import Screen
from sparkjoy.losses import Loss, clipped, delightful, importance_weighted, reinforce, weighted_by
from sparkjoy.prices import EffectiveSize, Nucleus, RollingQuantile
from sparkjoy.scores import (
    ScoreFunction,
    absolute_advantage_score,
    additive_score,
    advantage_score,
    delight,
    noisy_score,
    surprisal_score,
    uniform_score,
)

Method = Literal["pg", "importance", "dg", "kondo", "uniform", "unbiased", "ppo", "grpo", "pmpo"]
PriceKind = Literal["batch", "rolling", "budget", "effective", "nucleus"]
Score = Literal["delight", "advantage", "absolute-advantage", "surprisal", "additive", "uniform"]

DEFAULT_RATE = 0.03
DEFAULT_NOISE = 0.3


@dataclass(frozen=True)
class Settings:
    """One run: everything that its records depend on, but for the task."""

    method: Method = "kondo"
    """pg: plain policy gradient; importance: the same, weighted by the ratio to what sampled; dg: delightful one;
    kondo: the gate; uniform: rows at random; unbiased: DG at a noise budget; ppo, grpo, pmpo."""
    rate: float | None = None
    """Fraction of samples kept by kondo, uniform and unbiased. Default 0.03 for kondo and uniform without a price."""
    noise: float | None = None
    """Noise budget of unbiased: what skipping may add to the batch's own gradient noise. Default 0.3 without a rate."""
    floor: float = 0.0
    """Least chance of unbiased to keep an answer, for sizes that may be 0 by mistake."""
    price: float | None = None
    """Keep only samples whose score is above this; 0 is the papers' zero price."""
    price_kind: PriceKind = "batch"
    """What the rate is of: of every batch; of a rolling window of scores; as a budget, of all tokens so far; of the
    effective number of positive scores; or, a nucleus, of their sum."""
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
    compare_every: int | None = None
    """Steps between comparisons of the gated gradient with the dense one, computed besides; none by default."""
    screen: Screen = "sampler"
    """Log-probs that the gate decides on: the sampler's own, free, or an exact forward pass where others sampled; those
    recorded, whoever sampled; an exact forward pass; or a cheaper draft."""
    verify: float | None = None
    """Propose so many times the rate by the draft, and decide by exact log-probs of the proposed; None: do not."""
    audit_every: int = 20
    """Steps between comparisons of the draft with an exact forward pass."""
    recall_floor: float = 0.5
    """Give the draft up for exact screening when it finds less than this fraction of the rows to keep; 0: never."""
    refresh_every: int = 10
    """Steps that the weights of --screen stale are used for."""
    exit_layers: int = 1
    """Layers read by --screen early-exit."""
    max_age: int = 200
    """Steps that a log-prob of --screen cached is believed for."""
    score_noise: float = 0.0
    """Gaussian noise on the delight that kondo ranks by, or that weights dg, relative to it: 0.5 for 50%."""
    score_noise_kind: Literal["multiplicative", "additive"] = "multiplicative"
    """Noise in proportion to each sample's delight, or to the batch's standard deviation of it."""
    lesson_every: int = 1
    """Steps between lessons of --screen draft."""
    draft_learning_rate: float = 3e-3
    """Adam's learning rate for --screen draft."""

    def __post_init__(self) -> None:
        for name in ("steps", "evaluate_every", "threads", "epochs", "audit_every", "compare_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least 1.")
        for name in ("until_error", "target_error"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: expected a fraction, such as 0.05 for 5%.")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"--learning-rate {self.learning_rate}: expected a finite number above 0.")
        if not self.gated and (self.rate is not None or self.price is not None):
            raise ValueError(
                f"--method {self.method} keeps every sample; --rate and --price go with kondo, uniform and unbiased."
            )
        if self.compare_every is not None and (not self.gated or self.speculates or self.unit == "token"):
            raise ValueError(
                f"--compare-every {self.compare_every}: goes with a gate of whole samples (kondo, uniform, unbiased), "
                "without a draft."
            )
        if self.verify is not None and self.screen == "exact":
            raise ValueError(f"--verify {self.verify:g} verifies a draft; --screen exact needs none.")
        if self.method == "unbiased" and (self.price is not None or self.temperature or self.score != "delight"):
            raise ValueError("--method unbiased goes by a score of its own, at a --noise or --rate; expected no other.")
        if self.noise is not None and (self.method != "unbiased" or self.rate is not None):
            raise ValueError(
                f"--noise {self.noise:g}: a budget that finds its own rate; give it with --method "
                "unbiased, and no --rate."
            )
        if self.floor and self.method != "unbiased":
            raise ValueError(f"--floor {self.floor:g} goes with --method unbiased; --method {self.method} was given.")
        if not self.score_noise >= 0:
            raise ValueError(f"--score-noise {self.score_noise}: expected a number of at least 0.")
        if self.score_noise and not (self.method == "dg" or (self.method == "kondo" and self.unit == "sample")):
            raise ValueError(
                f"--score-noise {self.score_noise}: goes with --method dg, or with kondo of whole samples."
            )
        if self.speculates and (not self.gated or self.unit == "token"):
            raise ValueError(
                "--screen and --verify go with a gate of whole samples: --method kondo, uniform, unbiased."
            )
        ranks = self.method in ("kondo", "uniform") and self.price is None and self.temperature == 0
        if self.price_kind != "batch" and (not ranks or self.speculates):
            raise ValueError(
                f"--price-kind {self.price_kind} goes with the --rate of kondo or uniform, without --price, "
                "--temperature, --screen or --verify."
            )
        if self.negative_share and self.method != "kondo":
            raise ValueError(f"--negative-share goes with --method kondo; --method {self.method} was given.")
        if self.unit == "token" and (self.method != "kondo" or self.score != "delight" or self.micro_batch_size):
            raise ValueError("--unit token goes with --method kondo, by delight, in one micro-batch.")
        self.step(torch.Generator(), trim=None)  # raises on a rate, price, temperature or alpha outside its range

    @property
    def gated(self) -> bool:
        """Whether samples are skipped at all."""
        return self.method in ("kondo", "uniform", "unbiased")

    @property
    def speculates(self) -> bool:
        """Whether a draft decides, or proposes."""
        return self.screen not in ("sampler", "recorded", "exact") or self.verify is not None

    @property
    def updates(self) -> int:
        """Updates on each batch."""
        return self.epochs or (4 if self.method == "ppo" else 1)

    @property
    def gate_rate(self) -> float | None:
        """The rate in force; None where a price or a noise budget finds it."""
        fixed = self.method in ("kondo", "uniform") and self.price is None
        return DEFAULT_RATE if fixed and self.rate is None else self.rate

    @property
    def gate_noise(self) -> float | None:
        """The noise budget in force."""
        by_default = self.method == "unbiased" and self.rate is None
        return DEFAULT_NOISE if by_default and self.noise is None else self.noise

    @property
    def label(self) -> str:
        """A short name of the arm, without the seed: `kondo 3%`."""
        parts: list[str] = [self.method]
        if self.gate_rate is not None:
            parts.append(f"{100 * self.gate_rate:g}%" + ("" if self.price_kind == "batch" else f" {self.price_kind}"))
        if self.gate_noise is not None:
            parts.append(f"noise {self.gate_noise:g}")
        if self.floor:
            parts.append(f"floor {self.floor:g}")
        if self.price is not None:
            parts.append(f"price {self.price:g}")
        if self.unit == "token":
            parts.append("of tokens")
        if self.negative_share:
            parts.append(f"negative {100 * self.negative_share:g}%")
        if self.method == "kondo" and self.score != "delight":
            parts.append(f"by {self.score}" + (f" {self.alpha:g}" if self.score == "additive" else ""))
        if self.score_noise:
            parts.append(f"{self.score_noise_kind} noise {100 * self.score_noise:g}%")
        if self.screen != "sampler":
            parts.append(f"screened by {self.screen}")
        if self.verify is not None:
            parts.append(f"verified x{self.verify:g}")
        return " ".join(parts)

    def step(
        self,
        generator: torch.Generator,
        trim: Callable[[Any, int], Any] | None,
        screen: Callable[[Any], Tensor] | None = None,
        share: Share = WHOLE,
        module: Any = None,
    ) -> GatedBackward | TokenGatedBackward:
        """The engine's step of this method.

        Args:
            generator: source of the gate's draws.
            trim: shortens answers.
            screen: the draft, where this run has one.
            share: this process's part of a batch.
            module: what averages the gradients of several processes.
        """
        if share.count > 1 and (self.unit == "token" or self.speculates or self.score_noise):
            raise ValueError(
                "--unit token, --screen, --verify and --score-noise run in one process; start it without torchrun."
            )
        loss: Loss = reinforce
        if self.method in ("dg", "unbiased"):
            loss = delightful(unit=self.dg_unit)
            if self.score_noise:
                loss = weighted_by(self._noisy(delight, generator))
        elif self.method in ("ppo", "grpo"):
            loss = clipped(self.clip)
        elif self.method == "importance":
            loss = importance_weighted
        gate = self._gate(generator) if self.gated else None
        if gate is not None and self.unit == "token":
            return TokenGatedBackward(gate, loss=loss, trim=trim, count_flops=True)
        score, size = self._score(generator, share), self.micro_batch_size
        if gate is not None and self.speculates:
            audit = Audit(self.audit_every, floor=self.recall_floor)
            noisy = None if score is None else self._noisy(score, generator)
            draft = Draft(screen, verify=self.verify, audit=audit, score=noisy)
            return GatedBackward(
                gate, draft=draft, loss=loss, score=score, micro_batch_size=size, normalizer="batch", count_flops=True
            )
        score = self._noisy(score, generator) if gate is not None and score is not None else score
        module = module if share.count > 1 else None
        return GatedBackward(
            gate,
            loss=loss,
            score=score,
            micro_batch_size=size,
            normalizer="batch",
            module=module,
            count_flops=True,
            compare_every=self.compare_every,
        )

    def _gate(self, generator: torch.Generator) -> Gate:
        if self.method == "unbiased":
            return UnbiasedGate(self.gate_noise, self.gate_rate, self.floor, generator)
        if self.gate_rate is not None and self.price_kind == "budget":
            return BudgetGate(self.gate_rate)
        prices = {"rolling": RollingQuantile, "effective": EffectiveSize, "nucleus": Nucleus}
        if self.gate_rate is not None and self.price_kind in prices:
            return KondoGate(price=prices[self.price_kind](self.gate_rate), negative_share=self.negative_share)
        if self.temperature:
            return SoftGate(self.temperature, self.gate_rate, self.price, generator)
        return KondoGate(self.gate_rate, self.price, self.negative_share)

    def advantages(self, advantages: Tensor, group_size: int | None) -> Tensor:
        """What this method makes of advantages (B,) over their group's baseline."""
        if self.method == "grpo":
            return group_standardised_advantage(advantages, group_size)
        if self.method == "pmpo":
            return good_and_bad_advantage(advantages)
        return advantages

    def _noisy(self, score: ScoreFunction, generator: torch.Generator) -> ScoreFunction:
        return noisy_score(score, self.score_noise, self.score_noise_kind, generator) if self.score_noise else score

    def _score(self, generator: torch.Generator, share: Share) -> ScoreFunction | None:
        draw = uniform_score(generator)

        def uniform(advantages: Tensor, log_probs: Tensor) -> Tensor:
            """The draws for all processes' rows, of which this one's count."""
            total = share.count * len(advantages)
            return draw(advantages.new_empty(total), log_probs)[share.of(total)]

        scores: dict[str, ScoreFunction] = {
            "delight": delight,
            "advantage": advantage_score,
            "absolute-advantage": absolute_advantage_score,
            "surprisal": surprisal_score,
            "additive": additive_score(self.alpha),
            "uniform": uniform,
        }
        if self.method == "unbiased":
            return None  # the size of a row in the loss
        return scores["uniform" if self.method == "uniform" else self.score]
