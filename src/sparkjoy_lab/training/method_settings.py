"""Which method a run trains by, and what its gate keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from sparkjoy.baselines import group_standardised_advantage
from sparkjoy_lab.baselines import good_and_bad_advantage
from sparkjoy_lab.training.flags import refuse_idle

Method = Literal["pg", "importance", "dg", "kondo", "uniform", "unbiased", "ppo", "grpo", "pmpo"]
PriceKind = Literal["batch", "rolling", "budget", "effective", "nucleus"]
Score = Literal["delight", "advantage", "absolute-advantage", "surprisal", "additive", "uniform"]

DEFAULT_RATE = 0.03
DEFAULT_NOISE = 0.3


@dataclass(frozen=True)
class MethodSettings:
    """The loss, and which samples it is of."""

    method: Method = "kondo"
    """pg: plain policy gradient; importance: the same, weighted by the ratio to what sampled; dg: delightful one;
    kondo: the gate; uniform: rows at random; unbiased: DG at a noise budget; ppo, grpo, pmpo."""
    rate: float | None = None
    """Fraction of samples kept by kondo, uniform and unbiased. Default 0.03 for kondo and uniform without a price."""
    noise: float | None = None
    """Noise budget of unbiased: what skipping may add to the batch's own gradient noise. Default 0.3 without a rate."""
    price: float | None = None
    """Keep only samples whose score is above this; 0 is the papers' zero price."""
    floor: float = 0.0
    """Least chance of unbiased to keep an answer, for sizes that may be 0 by mistake."""
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
    score_noise: float = 0.0
    """Gaussian noise on the delight that kondo ranks by, or that weights dg, relative to it: 0.5 for 50%."""
    score_noise_kind: Literal["multiplicative", "additive"] = "multiplicative"
    """Noise in proportion to each sample's delight, or to the batch's standard deviation of it."""
    clip: float = 0.2
    """Range of the ratio in ppo and grpo."""
    epochs: int | None = None
    """Updates on each batch. Default 4 for ppo, else 1."""
    dg_unit: Literal["token", "sample"] = "token"
    """Whose delight weights a term in dg: its own token's, or the whole answer's."""
    unit: Literal["sample", "token"] = "sample"
    """What kondo keeps or skips: whole answers, or, as an experiment, single tokens."""

    def __post_init__(self) -> None:
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"--epochs {self.epochs}: expected at least 1.")
        if not self.gated and (self.rate is not None or self.price is not None):
            raise ValueError(
                f"--method {self.method} keeps every sample; --rate and --price go with kondo, uniform and unbiased."
            )
        if self.method == "unbiased" and (self.price is not None or self.temperature or self.score != "delight"):
            raise ValueError("--method unbiased goes by a score of its own, at a --noise or --rate; expected no other.")
        if self.noise is not None and (self.method != "unbiased" or self.rate is not None):
            raise ValueError(
                f"--noise {self.noise:g}: a budget that finds its own rate; give it with --method "
                "unbiased, and no --rate."
            )
        if not self.score_noise >= 0:
            raise ValueError(f"--score-noise {self.score_noise}: expected a number of at least 0.")
        if self.score_noise and not (self.method == "dg" or (self.method == "kondo" and self.unit == "sample")):
            raise ValueError(
                f"--score-noise {self.score_noise}: goes with --method dg, or with kondo of whole samples."
            )
        if self.score_noise and self.method == "dg" and self.dg_unit == "token":
            raise ValueError("--score-noise is on the delight of whole answers; give --dg-unit sample with it.")
        hard = self.method == "kondo" and not self.temperature and self.price_kind != "budget"
        refuse_idle(
            self,
            {
                "floor": (self.method == "unbiased", "--method unbiased"),
                "temperature": (self.method in ("kondo", "uniform"), "--method kondo or uniform"),
                "negative_share": (hard, "--method kondo, without --temperature and --price-kind budget"),
                "score": (self.method == "kondo", "--method kondo"),
                "alpha": (self.score == "additive", "--score additive"),
                "score_noise_kind": (self.score_noise > 0, "--score-noise"),
                "clip": (self.method in ("ppo", "grpo"), "--method ppo or grpo"),
                "dg_unit": (self.method in ("dg", "unbiased"), "--method dg or unbiased"),
            },
        )

    @property
    def gated(self) -> bool:
        """Whether samples are skipped at all."""
        return self.method in ("kondo", "uniform", "unbiased")

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
        """A short name of the method, without the seed: `kondo 3%`."""
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
        return " ".join(parts)

    def advantages(self, advantages: Tensor, group_size: int | None) -> Tensor:
        """What this method makes of advantages (B,) over their group's baseline."""
        if self.method == "grpo":
            return group_standardised_advantage(advantages, group_size)
        if self.method == "pmpo":
            return good_and_bad_advantage(advantages)
        return advantages
