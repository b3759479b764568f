"""Two arms, one of them noisy: where a lucky draw of the bad arm looks like a breakthrough.

The good arm (arm 0) has mean reward Δ, the bad arm 0. Gaussian noise of standard deviation σ is added to the bad arm's
rewards, or to both arms'. The policy takes the good arm with probability p; the baseline is the expected reward pΔ.
Everything the gate does on average is then a formula of the normal distribution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparkjoy_lab.tasks.bandit import Method, checked_probability

Noise = Literal["bad", "all"]


@dataclass(frozen=True)
class Gambling:
    """Two arms a gap Δ apart, with reward noise σ on the bad one or on both (arXiv 2603.20526).

    >>> Gambling(sigma=1.0).lucky_probability(0.5)  # Φ(−pΔ/σ) = Φ(−0.5)
    0.3085375387259869

    Args:
        sigma: σ, standard deviation of the reward noise, at least 0.
        gap: Δ, above 0.
        noise: on which arm: "bad", or "all" for both.

    Raises:
        ValueError: a value outside its range.
    """

    sigma: float
    gap: float = 1.0
    noise: Noise = "bad"

    def __post_init__(self) -> None:
        checked_sigma(self.sigma)
        if not 0 < self.gap < math.inf:
            raise ValueError(f"gap is {self.gap!r}; expected a number above 0.")
        if self.noise not in ("bad", "all"):
            raise ValueError(f"noise is {self.noise!r}; expected 'bad' or 'all'.")

    @property
    def arm_sigmas(self) -> tuple[float, float]:
        """Noise of the good and of the bad arm."""
        return (self.sigma if self.noise == "all" else 0.0, self.sigma)

    def lucky_probability(self, p: float) -> float:
        """Pr(U > 0 | bad arm) = Φ(−pΔ/σ), with baseline pΔ: what the gate at price zero keeps of the bad arm."""
        checked_probability(p)
        return normal_cdf(-p * self.gap / self.sigma) if self.sigma > 0 else 0.0

    def drift(self, p: float, method: Method, temperature: float = 1.0) -> float:
        """Expected step of the logit difference (good minus bad) per draw: above 0 where the method learns.

        2p(1 − p) (E[wU | good] − E[wU | bad]); for the gate at price zero E[wU] = E[max(U, 0)].

        >>> Gambling(sigma=10.0).drift(0.5, "pg")  # unbiased whatever the noise: 2p(1 − p)Δ
        0.5
        >>> Gambling(sigma=10.0).drift(0.5, "kondo") < 0  # the gate gambles
        True
        """
        checked_probability(p)
        good = self._weighted_advantage((1 - p) * self.gap, self.arm_sigmas[0], -math.log(p), method, temperature)
        bad = self._weighted_advantage(-p * self.gap, self.sigma, -math.log(1 - p), method, temperature)
        return 2 * p * (1 - p) * (good - bad)

    def settling_point(self, method: Method, temperature: float = 1.0, start: float = 0.5) -> float:
        """Where the expected step leads from `start`: the first p at which the drift is 0, or 0 or 1.

        >>> Gambling(sigma=3.0).settling_point("kondo"), Gambling(sigma=3.0).settling_point("pg")
        (0.0, 1.0)
        >>> round(Gambling(sigma=1.0).settling_point("kondo"), 2)
        0.9
        """
        up = self.drift(start, method, temperature) > 0
        logit = math.log(start / (1 - start))
        logits = torch.linspace(logit, 12 if up else -12, 500, dtype=torch.float64)
        for p in logits.sigmoid().tolist():
            if (self.drift(p, method, temperature) > 0) != up:
                return float(p)
        return 1.0 if up else 0.0

    @staticmethod
    def _weighted_advantage(mean: float, sigma: float, surprisal: float, method: Method, temperature: float) -> float:
        """E[w(Uℓ) U] for U ~ N(mean, σ²)."""
        if method == "pg":
            return mean
        if method == "kondo":
            return mean_above_zero(mean, sigma)
        # DG has no closed form: the trapezoid rule over ±8 standard deviations is exact enough: the weight is smooth.
        z = torch.linspace(-8, 8, 401, dtype=torch.float64)
        density = torch.exp(-z.square() / 2)
        advantages = mean + sigma * z
        weighted = torch.sigmoid(advantages * surprisal / temperature) * advantages
        return float((density * weighted).sum() / density.sum())


def tipping_sigma(p: float, gap: float, method: Method, temperature: float = 1.0, noise: Noise = "bad") -> float | None:
    """The smallest noise at which a method's expected step at p leads away from the good arm; None up to 1000 gaps.

    >>> round(tipping_sigma(0.5, 1.0, "kondo"), 2)
    1.81
    >>> tipping_sigma(0.5, 1.0, "pg") is None
    True
    """
    # A scan before the bisection: under noise on both arms DG turns round and, at larger noise still, back again.
    scanned: list[float] = [0.0, *torch.logspace(-2, 3, 251, dtype=torch.float64).mul(gap).tolist()]
    turned = [sigma for sigma in scanned if Gambling(sigma, gap, noise).drift(p, method, temperature) <= 0]
    if not turned or turned[0] == 0:
        return turned[0] if turned else None
    low, high = scanned[scanned.index(turned[0]) - 1], turned[0]
    for _ in range(40):
        middle = (low + high) / 2
        if Gambling(middle, gap, noise).drift(p, method, temperature) > 0:
            low = middle
        else:
            high = middle
    return high


def draw_actions(p: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """(..., draws) arms, 0 the good one, for policies that take it with probability p (...,)."""
    return (torch.rand(*p.shape, draws, generator=generator, dtype=p.dtype) >= p.unsqueeze(-1)).long()


def draw_rewards(actions: Tensor, sigmas: Tensor, gap: float, generator: torch.Generator) -> Tensor:
    """Rewards of the arms taken (R, draws), for R runs with noise `sigmas` (R, 2) on the good and the bad arm."""
    noise = torch.randn(actions.shape, generator=generator, dtype=sigmas.dtype)
    return gap * (actions == 0) + noise * sigmas.gather(1, actions)


def mean_above_zero(mean: float, sigma: float) -> float:
    """E[max(U, 0)] for U ~ N(m, σ²): m Φ(m/σ) + σ φ(m/σ).

    >>> mean_above_zero(-1.0, 0.0), mean_above_zero(2.0, 0.0)
    (0.0, 2.0)
    """
    if sigma == 0:
        return max(mean, 0.0)
    z = mean / sigma
    return mean * normal_cdf(z) + sigma * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def normal_cdf(x: float) -> float:
    """Φ(x), accurate in the lower tail.

    >>> normal_cdf(0.0)
    0.5
    """
    return math.erfc(-x / math.sqrt(2)) / 2


def checked_sigma(sigma: float) -> float:
    """`sigma`, or a ValueError that says what it must be."""
    if isinstance(sigma, bool) or not isinstance(sigma, int | float) or not 0 <= sigma < math.inf:
        raise ValueError(f"sigma is {sigma!r}; expected a standard deviation, a finite number of at least 0.")
    return sigma
