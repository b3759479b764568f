"""Scores to compare delight with, and noise on a score: how approximate may it be?"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor

from sparkjoy import checks
from sparkjoy.scores import SCORE, ScoreFunction, per_row, says, surprisal


@says(reads_log_probs=False)
def absolute_advantage_score(advantages: Tensor, log_probs: Tensor) -> Tensor:
    """|U|: far from expected, in either direction. Shape of `advantages`, detached.

    >>> absolute_advantage_score(torch.tensor([0.5, -0.5]), torch.tensor([-1.0, -3.0]))
    tensor([0.5000, 0.5000])
    """
    return checks.advantages(advantages).abs()


def surprisal_score(advantages: Tensor, log_probs: Tensor) -> Tensor:
    """The surprisal alone, ℓ: rare actions, good or bad. Shape of `log_probs`, detached.

    >>> surprisal_score(torch.tensor([0.5, -0.5]), torch.tensor([-1.0, -3.0]))
    tensor([1., 3.])
    """
    return surprisal(log_probs)


def additive_score(alpha: float) -> ScoreFunction:
    """A score function αU + (1 − α)ℓ, the sum that the product is compared with (arXiv 2603.20526).

    >>> additive_score(0.5)(torch.tensor([0.5, -0.5]), torch.tensor([-1.0, -3.0]))
    tensor([0.7500, 1.2500])

    Args:
        alpha: weight of the advantage, in [0, 1].

    Raises:
        ValueError: `alpha` outside [0, 1].
    """
    alpha = checks.number("alpha", alpha, "a number in [0, 1]", lambda alpha: 0 <= alpha <= 1)
    return partial(_additive, alpha=alpha)


def _additive(advantages: Tensor, log_probs: Tensor, alpha: float) -> Tensor:
    return alpha * per_row(advantages, log_probs) + (1 - alpha) * surprisal(log_probs)


def uniform_score(generator: torch.Generator | None = None) -> ScoreFunction:
    """A score function that draws a uniform number per row: the random baseline any gate has to beat.

    >>> uniform_score(torch.Generator().manual_seed(0))(torch.ones(3), torch.zeros(3))
    tensor([0.4963, 0.7682, 0.0885])

    Args:
        generator: source of the draws; None: torch's global one.
    """
    return says(reads_log_probs=False)(partial(_uniform, generator=checks.generator(generator)))


def _uniform(advantages: Tensor, log_probs: Tensor, generator: torch.Generator | None) -> Tensor:
    checks.tensor("advantages", advantages, (1, 2), shape="(B,) or (B, T)")
    device = advantages.device if generator is None else generator.device
    return torch.rand(len(advantages), generator=generator, device=device).to(advantages.device)


def noisy_score(
    score: ScoreFunction,
    level: float,
    kind: Literal["multiplicative", "additive"] = "multiplicative",
    generator: torch.Generator | None = None,
) -> ScoreFunction:
    """A score function with Gaussian noise on each row's score: how approximate may it be? (arXiv 2603.20526)

    Multiplicative: s(1 + level · ε). Additive: s + level · sd(s) · ε, sd over the batch. ε ~ N(0, 1). Rows of score 0
    stay at 0.

    >>> from sparkjoy import delight
    >>> noisy = noisy_score(delight, 0.5, "multiplicative", torch.Generator().manual_seed(0))
    >>> noisy(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5]).log())
    tensor([1.2272, 0.0000])

    Args:
        score: gives what the noise is put on; (B, T) scores are summed over tokens first, so it takes no mask.
        level: relative size of the noise, at least 0.
        kind: "multiplicative" or "additive".
        generator: source of the draws; None: torch's global one.

    Raises:
        ValueError: a level below 0, or an unknown kind.
    """
    score = checks.function("score", score, SCORE, ..., ...)
    level = checks.number("level", level, "a number of at least 0", lambda level: level >= 0)
    checks.choice("kind", kind, ("multiplicative", "additive"))
    return partial(_noisy, score=score, level=level, kind=kind, generator=checks.generator(generator))


def _noisy(
    advantages: Tensor,
    log_probs: Tensor,
    score: ScoreFunction,
    level: float,
    kind: str,
    generator: torch.Generator | None,
) -> Tensor:
    clean = score(advantages, log_probs)
    clean = checks.tensor("what score returned", clean, (1, 2), checks.FLOATING, "(B,) or (B, T)")
    clean = clean.sum(dim=1) if clean.dim() == 2 else clean
    device = clean.device if generator is None else generator.device
    draws = torch.randn(len(clean), generator=generator, device=device).to(clean)
    size = clean if kind == "multiplicative" else clean.std(correction=0) * (clean != 0)
    return clean + level * size * draws
