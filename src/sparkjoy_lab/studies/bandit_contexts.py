"""Several contexts: does DG's expected gradient point closer to the supervised oracle's than PG's does?

Each context is a softmax bandit with logits of its own, so the gradients of several contexts are stacked. The oracle,
∇ log π(right), weighs every context's direction e* − π with 1; PG weighs it with p; DG with p s(p), where

    s(p) = w₊(1 − p) + w₋p,   w₊ = σ((1 − p)(−log p)/η),   w₋ = σ(−p log((K − 1)/(1 − p))/η).

Everything here is an exact expectation: no difference between the methods is variance.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sparkjoy_lab.tasks.bandit import Method

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = dict[str, Any]
BANDS = {"hard": (0.01, 0.3), "mixed": (0.01, 0.99), "easy": (0.7, 0.99)}
EASY = 0.7


def context_weight(p: Tensor, arms: int, method: Method, temperature: float = 1.0) -> Tensor:
    """What a method multiplies the oracle's direction by in contexts of difficulty p (...,), baseline p.

    >>> context_weight(torch.tensor([0.1, 0.5]), 10, "pg")
    tensor([0.1000, 0.5000])
    >>> context_weight(torch.tensor([0.1, 0.5]), 10, "kondo")  # p (1 − p)
    tensor([0.0900, 0.2500])
    """
    if method == "pg":
        return p
    if method == "kondo":
        return p * (1 - p)
    success = torch.sigmoid((1 - p) * -p.log() / temperature)
    failure = torch.sigmoid(-p * ((arms - 1) / (1 - p)).log() / temperature)
    return p * (success * (1 - p) + failure * p)


def oracle_cosine(p: Tensor, weight: Tensor, arms: int) -> Tensor:
    """Cosine between the stacked gradients of contexts p (..., C) under `weight` (..., C) and under the oracle's 1.

    >>> oracle_cosine(torch.tensor([0.2, 0.8]), torch.tensor([3.0, 3.0]), 10)
    tensor(1.)
    """
    square = (1 - p).square() * arms / (arms - 1)  # |e* − π|²
    along = (weight * square).sum(-1)
    return along / ((weight.square() * square).sum(-1) * square.sum(-1)).sqrt()


def pair_records(arms: int, temperature: float, values: Sequence[float]) -> list[Record]:
    """For each pair p1 < p2: the cosines to the oracle, whether DG is closer than PG, whether it over-corrects.

    Over-correcting is giving the harder context more weight against the easier one than the oracle does.
    """
    pairs = torch.tensor(list(combinations(sorted(values), 2)), dtype=torch.float64)
    weights = {method: context_weight(pairs, arms, method, temperature) for method in ("pg", "dg", "kondo")}
    cosines = {method: oracle_cosine(pairs, weight, arms) for method, weight in weights.items()}
    over = weights["dg"][:, 0] > weights["dg"][:, 1]
    return [
        {
            "arms": arms,
            "temperature": temperature,
            "p1": float(pair[0]),
            "p2": float(pair[1]),
            **{f"cosine_{method}": float(cosine[i]) for method, cosine in cosines.items()},
            "dg_closer": bool(cosines["dg"][i] > cosines["pg"][i]),
            "dg_over_corrects": bool(over[i]),
            "kondo_closer": bool(cosines["kondo"][i] > cosines["pg"][i]),
        }
        for i, pair in enumerate(pairs)
    ]


def peak(arms: int, temperature: float) -> float:
    """The p at which DG's weight is largest: past it DG weighs an easier context less, not more."""
    p = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    return float(p[context_weight(p, arms, "dg", temperature).argmax()])


def context_summary(records: Sequence[Record], seed: int, sets: int = 2000, contexts: int = 10) -> list[Record]:
    """Per K and temperature: where DG is closer, over the pairs of the grid and over random sets of contexts."""
    rng = np.random.default_rng(seed)
    drawn = {
        band: torch.from_numpy(rng.uniform(low, high, size=(sets, contexts))) for band, (low, high) in BANDS.items()
    }
    summary = []
    for arms, temperature in sorted({(record["arms"], record["temperature"]) for record in records}):
        mine = [r for r in records if (r["arms"], r["temperature"]) == (arms, temperature)]
        easy = [r for r in mine if r["p1"] >= EASY]
        top = peak(arms, temperature)
        below_peak = [r for r in mine if r["p2"] <= top]
        sets_closer = {}
        for band, p in drawn.items():
            dg, pg = (oracle_cosine(p, context_weight(p, arms, method, temperature), arms) for method in ("dg", "pg"))
            sets_closer[f"sets_{band}_closer"] = float((dg > pg).double().mean())
        summary.append(
            {
                "arms": arms,
                "temperature": temperature,
                "pairs": len(mine),
                "closer": _share(mine, "dg_closer"),
                "over_corrects": _share(mine, "dg_over_corrects"),
                "easy_closer": _share(easy, "dg_closer"),
                "peak_p": top,
                "closer_below_peak": _share(below_peak, "dg_closer"),
                "kondo_closer": _share(mine, "kondo_closer"),
                "largest_loss": max((r["cosine_pg"] - r["cosine_dg"] for r in mine), default=None),
                "largest_gain": max((r["cosine_dg"] - r["cosine_pg"] for r in mine), default=None),
                **sets_closer,
            }
        )
    return summary


def _share(records: Sequence[Record], name: str) -> float | None:
    return sum(record[name] for record in records) / len(records) if records else None


def plot_contexts(records: Sequence[Record]) -> Figure:
    """One map per K and temperature over (p1, p2): DG's cosine to the oracle minus PG's."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import SymLogNorm

    arms = sorted({record["arms"] for record in records})
    temperatures = sorted({record["temperature"] for record in records})
    shape = (len(arms), len(temperatures))
    figure, axes = plt.subplots(
        *shape, figsize=(1.5 + 4 * shape[1], 1.2 + 3.6 * shape[0]), squeeze=False, layout="constrained"
    )
    image = None
    for row, k in enumerate(arms):
        for column, temperature in enumerate(temperatures):
            mine = [r for r in records if (r["arms"], r["temperature"]) == (k, temperature)]
            values = sorted({r["p1"] for r in mine} | {r["p2"] for r in mine})
            place = {value: i for i, value in enumerate(values)}
            gain = np.full((len(values), len(values)), np.nan)
            axis = axes[row, column]
            for r in mine:
                i, j = place[r["p1"]], place[r["p2"]]
                gain[j, i] = r["cosine_dg"] - r["cosine_pg"]
            image = axis.imshow(gain, origin="lower", cmap="RdBu", norm=SymLogNorm(0.002, vmin=-0.5, vmax=0.5))
            ticks = range(0, len(values), 2)
            axis.set_xticks(ticks, [f"{values[i]:g}" for i in ticks], rotation=60)
            axis.set_yticks(ticks, [f"{values[i]:g}" for i in ticks])
            axis.set_title(
                f"K = {k}, temperature {temperature:g}: DG closer in {_share(mine, 'dg_closer'):.0%}", fontsize=10
            )
            axis.set(xlabel="p of the harder context", ylabel="p of the easier context")
    if image is not None:
        figure.colorbar(image, ax=axes, label="cosine to the oracle, DG minus PG (blue: DG closer)", shrink=0.7)
    figure.suptitle(
        "DG is closer to the supervised oracle than PG, except where contexts are already easy\n"
        "(red: past its peak DG weighs the harder of two easy contexts too much)"
    )
    return figure
