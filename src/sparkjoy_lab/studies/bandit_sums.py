"""Product against sum: no fixed weight α makes αU + (1 − α)ℓ rank samples right under every policy; the product does.

In a softmax bandit of K arms, p on the right one and baseline p, compare a common success (U = 1 − p, ℓ = −log p) with
a rare failure (U = −p, ℓ = log((K − 1)/(1 − p))). Only p > 1/K counts: there failures are the rarer draws. The sum
ranks the failure higher unless α > α* = L/(1 + L), L = log(p(K − 1)/(1 − p)), a threshold that moves with the policy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sparkjoy.scores import ScoreFunction, advantage_score, delight
from sparkjoy_lab.scores import additive_score, surprisal_score

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = dict[str, Any]
ARMS = tuple(int(k) for k in np.unique(np.geomspace(2, 1000, 60).round().astype(int)))
CHANCES = tuple(float(p) for p in np.linspace(0.005, 0.995, 199))


def alpha_threshold(arms: int, p: float) -> float:
    """α* = L/(1 + L), L = log(p(K − 1)/(1 − p)), for p > 1/K (arXiv 2603.20526).

    >>> round(alpha_threshold(10, 0.9), 3)  # L = log 81 = 4.394
    0.815

    Raises:
        ValueError: p of at most 1/K, where the right arm is no more likely than a wrong one.
    """
    log_ratio = math.log(p * (arms - 1) / (1 - p))
    if log_ratio <= 0:
        raise ValueError(f"p is {p:g}; the threshold is for p above 1/K = {1 / arms:g}.")
    return log_ratio / (1 + log_ratio)


def states() -> tuple[Tensor, Tensor]:
    """K and p (N,) of the plane's states with p > 1/K: K from 2 to 1000 by ratio, p from 0.005 to 0.995 by step."""
    arms, p = torch.meshgrid(
        torch.tensor(ARMS, dtype=torch.float64), torch.tensor(CHANCES, dtype=torch.float64), indexing="ij"
    )
    # Where p is 1/K up to rounding neither draw is the rarer one.
    common = p * arms > 1 + 1e-9
    return arms[common], p[common]


def misranked(score: ScoreFunction, arms: Tensor, p: Tensor) -> Tensor:
    """(N,) bool: whether `score` ranks a rare failure above a common success.

    >>> arms, p = torch.tensor([10.0]), torch.tensor([0.9])  # α* = 0.815
    >>> misranked(additive_score(0.8), arms, p), misranked(additive_score(0.83), arms, p), misranked(delight, arms, p)
    (tensor([True]), tensor([False]), tensor([False]))
    """
    success = score(1 - p, p.log())
    failure = score(-p, ((1 - p) / (arms - 1)).log())
    return failure > success


def untold(score: ScoreFunction, p: Tensor, baseline: float) -> Tensor:
    """(N,) bool: whether `score` fails to rank a rarer success (half the chance, p/2) above a success of chance p."""
    advantages = torch.full_like(p, 1 - baseline)
    return score(advantages, (p / 2).log()) <= score(advantages, p.log())


def sum_records(alphas: Sequence[float]) -> list[Record]:
    """Fraction of states misranked per α, beside the threshold's prediction, and for delight and each factor alone.

    `rare_success_not_first` asks for the other half of a good ranking, with a baseline of 0.5: the advantage alone
    (α = 1) never misranks a failure, but cannot tell a rare success from a common one.
    """
    arms, p = states()
    log_ratio = (p * (arms - 1) / (1 - p)).log()
    threshold = log_ratio / (1 + log_ratio)
    scores: list[tuple[str, float | None, ScoreFunction]] = [("sum", a, additive_score(a)) for a in alphas]
    scores += [("delight", None, delight), ("advantage", None, advantage_score), ("surprisal", None, surprisal_score)]
    return [
        {
            "score": name,
            "alpha": alpha,
            "misranked": float(misranked(score, arms, p).double().mean()),
            "rare_success_not_first": float(untold(score, p, baseline=0.5).double().mean()),
            "predicted": None if alpha is None else float((threshold > alpha).double().mean()),
            "states": len(p),
        }
        for name, alpha, score in scores
    ]


def plot_sums(records: Sequence[Record]) -> Figure:
    """The threshold on the (p, K) plane, and the fraction misranked against α."""
    import matplotlib.pyplot as plt

    figure, (plane, curve) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    grid = np.full((len(ARMS), len(CHANCES)), np.nan)
    for i, arms in enumerate(ARMS):
        for j, p in enumerate(CHANCES):
            if p * arms > 1 + 1e-9:
                grid[i, j] = alpha_threshold(arms, p)
    filled = plane.contourf(CHANCES, ARMS, grid, levels=np.linspace(0, 1, 11), cmap="viridis")
    figure.colorbar(filled, ax=plane, label="α*: smallest weight of the advantage that ranks right")
    plane.set(
        xlabel="p, probability of the right arm",
        ylabel="K, arms",
        yscale="log",
        title="the threshold moves with the policy",
    )
    sums = sorted((r["alpha"], r["misranked"], r["predicted"]) for r in records if r["score"] == "sum")
    alphas, measured, predicted = zip(*sums, strict=True) if sums else ((), (), ())
    curve.plot(alphas, measured, "o", color="#2e86c1", label="sum αU + (1 − α)ℓ, measured")
    curve.plot(alphas, predicted, color="#2e86c1", lw=1, label="states with α* > α")
    for record in records:
        if record["score"] == "delight":
            curve.axhline(record["misranked"], color="#c0392b", label=f"delight: {record['misranked']:g}", lw=2)
    curve.set(xlabel="α, weight of the advantage in the sum", ylabel="states that rank a rare failure first")
    curve.set(title="fraction of the (p, K) plane misranked", ylim=(-0.03, 1.03))
    curve.grid(alpha=0.3)
    curve.legend()
    figure.suptitle(
        "A sum needs almost all its weight on the advantage to rank right everywhere; the product always does"
    )
    return figure
