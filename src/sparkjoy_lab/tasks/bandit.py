"""A softmax bandit with one right arm: small enough that every expectation is a formula.

The right arm is arm 0 and has probability p; the other K − 1 arms share the rest equally. The reward is 1 for the right
arm, 0 for any other. One draw's gradient with respect to the logits is

    g(a) = w(χ) · U · (e_a − π),   U = reward − baseline,   χ = U · (−log π(a)),

with w = 1 for the policy gradient (PG), σ(χ/η) for the Delightful Policy Gradient (DG), and 1[χ > 0] for the Kondo gate
at price zero. The true gradient is ∇J = p (e* − π).

Three ways to the same numbers: `closed_form` (algebra), `enumerated` (sum over the arms), `sampled` (Monte Carlo). The
last two take the weights from the library itself, so they check it as well as the algebra.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparkjoy.gates import KondoGate
from sparkjoy.scores import delight

Method = Literal["pg", "dg", "kondo"]
Weight = Callable[[Tensor], Tensor]
"""Delight of each draw (N,) -> what its gradient is multiplied by (N,)."""


@dataclass(frozen=True)
class SoftmaxBandit:
    """K arms, arm 0 right with probability p, the others equal (arXiv 2603.20526).

    >>> SoftmaxBandit(arms=3, p=0.5).probabilities
    tensor([0.5000, 0.2500, 0.2500], dtype=torch.float64)

    Args:
        arms: K, at least 2.
        p: probability of the right arm, strictly between 0 and 1.

    Raises:
        ValueError: fewer than 2 arms, or p outside (0, 1).
    """

    arms: int
    p: float

    def __post_init__(self) -> None:
        checked_arms(self.arms)
        checked_probability(self.p)

    @property
    def wrong(self) -> float:
        """Probability of any one wrong arm, (1 − p) / (K − 1)."""
        return (1 - self.p) / (self.arms - 1)

    @property
    def probabilities(self) -> Tensor:
        """(K,), float64."""
        probabilities = torch.full((self.arms,), self.wrong, dtype=torch.float64)
        probabilities[0] = self.p
        return probabilities

    @property
    def expected_confidence(self) -> float:
        """The baseline Σ π², p² + (1 − p)² / (K − 1): the probability that two draws agree."""
        return self.p**2 + (1 - self.p) ** 2 / (self.arms - 1)

    @property
    def direction(self) -> Tensor:
        """(K,), e* − π: the gradient of log π(right), which the supervised oracle follows; ∇J is p times it."""
        direction = -self.probabilities
        direction[0] += 1
        return direction

    def sample(self, draws: int, generator: torch.Generator) -> Tensor:
        """(draws,) arms drawn from the policy."""
        return torch.multinomial(self.probabilities, draws, replacement=True, generator=generator)

    def reward(self, actions: Tensor) -> Tensor:
        """(N,) 1 for the right arm, 0 for any other, float64."""
        return (actions == 0).double()


@dataclass(frozen=True)
class GradientMoments:
    """What one draw's gradient is on average, and how it scatters.

    Args:
        scale: the expected gradient's length along ∇J, in units of ∇J: 1 for an unbiased method.
        cosine: of the expected gradient to ∇J; 0 where the expected gradient is 0.
        perpendicular_variance: of one draw's gradient, summed over the directions orthogonal to ∇J.
        backward_fraction: draws that get a backward pass (those of non-zero weight).
    """

    scale: float
    cosine: float
    perpendicular_variance: float
    backward_fraction: float


def method_weight(method: Method, temperature: float = 0.0) -> Weight:
    """What each method multiplies a draw's gradient by, through the library's own gate.

    >>> method_weight("kondo")(torch.tensor([0.5, -0.5]))
    tensor([1., 0.])

    Args:
        method: "pg", "dg" or "kondo" (the hard gate at price 0).
        temperature: η of DG, above 0; the others do not read it.
    """
    if method == "pg":
        return torch.ones_like
    if method == "kondo":
        gate = KondoGate(price=0)
        return lambda chi: gate(chi).keep.to(chi.dtype)
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature!r}; DG needs a number above 0.")
    return lambda chi: torch.sigmoid(chi / temperature)


def success_and_failure_weight(
    bandit: SoftmaxBandit, baseline: float, method: Method, temperature: float = 0.0
) -> tuple[float, float]:
    """The weight of a right and of a wrong draw, from the formulas alone.

    >>> success_and_failure_weight(SoftmaxBandit(3, 0.5), 0.5, "kondo")
    (1.0, 0.0)
    """
    if method == "pg":
        return 1.0, 1.0
    if method == "kondo":
        return float(baseline < 1), float(baseline < 0)
    success = (1 - baseline) * -math.log(bandit.p)
    failure = -baseline * -math.log(bandit.wrong)
    return _sigmoid(success / temperature), _sigmoid(failure / temperature)


def closed_form(bandit: SoftmaxBandit, baseline: float, method: Method, temperature: float = 0.0) -> GradientMoments:
    """The moments as formulas: scale w₊(1 − b) + w₋b, perpendicular variance (1 − p) (w₋b)² (K − 2)/(K − 1).

    A wrong arm j pushes along e_j − π, which is −p/(1 − p) (e* − π) plus a part orthogonal to ∇J of squared length
    (K − 2)/(K − 1). Only wrong draws have such a part, so a gate that drops them (w₋ = 0) has none.

    >>> closed_form(SoftmaxBandit(3, 0.5), 0.5, "pg").perpendicular_variance  # (1 − p) p² (K − 2)/(K − 1)
    0.0625
    >>> closed_form(SoftmaxBandit(3, 0.5), 0.5, "kondo")
    GradientMoments(scale=0.5, cosine=1.0, perpendicular_variance=0.0, backward_fraction=0.5)
    """
    success, failure = success_and_failure_weight(bandit, baseline, method, temperature)
    scale = success * (1 - baseline) + failure * baseline
    arms, p = bandit.arms, bandit.p
    return GradientMoments(
        scale=scale,
        cosine=math.copysign(1.0, scale) if scale else 0.0,
        perpendicular_variance=(1 - p) * (failure * baseline) ** 2 * (arms - 2) / (arms - 1),
        backward_fraction=p * (success > 0) + (1 - p) * (failure > 0),
    )


def arm_gradients(bandit: SoftmaxBandit, baseline: float, weight: Weight) -> tuple[Tensor, Tensor]:
    """Each arm's gradient, w U (e_a − π), (K, K) with a row per arm, and its weight (K,)."""
    advantages = bandit.reward(torch.arange(bandit.arms)) - baseline
    weights = weight(delight(advantages, bandit.probabilities.log()))
    score_function = torch.eye(bandit.arms, dtype=torch.float64) - bandit.probabilities
    return (weights * advantages).unsqueeze(1) * score_function, weights


def perpendicular_square(gradients: Tensor) -> Tensor:
    """Squared length of the part of each gradient (..., K) orthogonal to ∇J, for gradients of a softmax's logits.

    Their entries sum to 0, so what is orthogonal to ∇J lives in the differences between the wrong arms: taken to the
    first of them, equal entries give exactly 0, which no projection in floating point would.

    >>> perpendicular_square(torch.tensor([[2.0, -1.0, -1.0], [0.0, 1.0, -1.0]]))
    tensor([0., 2.])
    """
    differences = gradients[..., 1:] - gradients[..., 1:2]
    return differences.square().sum(-1) - differences.sum(-1).square() / differences.shape[-1]


def enumerated(bandit: SoftmaxBandit, baseline: float, weight: Weight) -> GradientMoments:
    """The moments by summing over the arms, with their probabilities."""
    gradients, weights = arm_gradients(bandit, baseline, weight)
    return _moments(bandit, gradients, weights, bandit.probabilities)


def sampled(
    bandit: SoftmaxBandit, baseline: float, weight: Weight, draws: int, generator: torch.Generator
) -> GradientMoments:
    """The moments by Monte Carlo: draw arms, weigh each draw, average.

    Draws of one arm have one gradient, so the averages run over arms with the drawn frequencies; the weights are asked
    for every draw.
    """
    actions = bandit.sample(draws, generator)
    log_probs = bandit.probabilities.log()[actions]
    weights = weight(delight(bandit.reward(actions) - baseline, log_probs))
    gradients, _ = arm_gradients(bandit, baseline, lambda chi: _per_arm_mean(weights, actions, bandit.arms))
    frequencies = torch.bincount(actions, minlength=bandit.arms).double() / draws
    return _moments(bandit, gradients, weights, frequencies, backward=float((weights > 0).double().mean()))


def _moments(
    bandit: SoftmaxBandit, gradients: Tensor, weights: Tensor, frequencies: Tensor, backward: float | None = None
) -> GradientMoments:
    mean = frequencies @ gradients
    truth = bandit.p * bandit.direction
    along = float(mean @ truth)
    length = float(mean.norm() * truth.norm())
    return GradientMoments(
        scale=along / float(truth @ truth),
        cosine=along / length if length else 0.0,
        perpendicular_variance=float(frequencies @ perpendicular_square(gradients) - perpendicular_square(mean)),
        backward_fraction=float(frequencies @ (weights > 0).double()) if backward is None else backward,
    )


def _per_arm_mean(weights: Tensor, actions: Tensor, arms: int) -> Tensor:
    """(K,) mean weight of the draws of each arm; 0 where it was never drawn. Draws of one arm have one delight."""
    count = torch.bincount(actions, minlength=arms).clamp(min=1)
    return torch.zeros(arms, dtype=weights.dtype).index_add_(0, actions, weights) / count


def checked_arms(arms: int) -> int:
    """`arms`, or a ValueError that says what it must be."""
    if isinstance(arms, bool) or not isinstance(arms, int) or arms < 2:
        raise ValueError(f"arms is {arms!r}; expected a whole number of at least 2.")
    return arms


def checked_probability(p: float) -> float:
    """`p`, or a ValueError that says what it must be."""
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 < p < 1:
        raise ValueError(f"p is {p!r}; expected a probability strictly between 0 and 1.")
    return p


def _sigmoid(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float64).sigmoid())
