"""At price zero the gate keeps the direction of the gradient and drops the noise: where that saves, and where not.

Every number three times: by formula, by enumeration of the arms, by Monte Carlo through the public gate. Then the draws
and backward passes that a batch needs for a mean cosine of 0.95 to the true gradient, under three baselines.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sparkjoy_lab.studies.frames import grouped
from sparkjoy_lab.tasks.bandit import (
    Method,
    SoftmaxBandit,
    closed_form,
    enumerated,
    method_weight,
    sampled,
    success_and_failure_weight,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = dict[str, Any]
TARGET_COSINE = 0.95
GRID_RATIO = 1.15  # between neighbouring batch sizes of the search


def methods(temperatures: Iterable[float]) -> list[tuple[Method, float | None]]:
    """PG, DG at each temperature, the gate at price 0."""
    return [("pg", None), *(("dg", temperature) for temperature in temperatures), ("kondo", 0.0)]


def baselines(bandit: SoftmaxBandit, constant: float) -> dict[str, float]:
    """The three baselines compared: p itself, the expected confidence Σπ² of the papers, and a constant."""
    return {"p": bandit.p, "confidence": bandit.expected_confidence, "constant": constant}


def zero_price_records(
    bandit: SoftmaxBandit,
    temperatures: Sequence[float],
    constant: float,
    draws: int,
    batches: int,
    max_draws: int,
    seed: int,
) -> list[Record]:
    """One record per baseline and method: the moments three ways, and the draws to a mean cosine of 0.95."""
    generator = torch.Generator().manual_seed(seed)
    search = CosineSearch(bandit, batches, max_draws, seed)
    records = []
    for name, baseline in baselines(bandit, constant).items():
        for method, temperature in methods(temperatures):
            exact = closed_form(bandit, baseline, method, temperature or 0.0)
            weight = method_weight(method, temperature or 0.0)
            arms = enumerated(bandit, baseline, weight)
            drawn = sampled(bandit, baseline, weight, draws, generator)
            needed = search.draws_to_cosine(baseline, method, temperature or 0.0)
            records.append(
                {
                    "arms": bandit.arms,
                    "p": bandit.p,
                    "method": method,
                    "temperature": temperature,
                    "baseline": name,
                    "baseline_value": baseline,
                    "scale": exact.scale,
                    "cosine": exact.cosine,
                    "cosine_enumerated": arms.cosine,
                    "cosine_monte_carlo": drawn.cosine,
                    "perpendicular_variance": exact.perpendicular_variance,
                    "perpendicular_variance_enumerated": arms.perpendicular_variance,
                    "perpendicular_variance_monte_carlo": drawn.perpendicular_variance,
                    "backward_fraction": exact.backward_fraction,
                    "backward_fraction_monte_carlo": drawn.backward_fraction,
                    "draws_to_cosine_95": needed,
                    "backward_passes_to_cosine_95": None if needed is None else needed * exact.backward_fraction,
                }
            )
    return records


class CosineSearch:
    """Finds how many draws a batch needs for a mean cosine of 0.95 between its gradient and the true one.

    A batch's gradient depends on the draws only through how often each arm came up, so multinomial counts stand for the
    draws, however many; one set of counts per batch size serves every method and baseline. A batch in which nothing
    survives has no gradient and counts 0.

    Args:
        bandit: the bandit.
        batches: batches averaged over, per batch size.
        max_draws: give up above this batch size.
        seed: of the counts.
    """

    def __init__(self, bandit: SoftmaxBandit, batches: int, max_draws: int, seed: int) -> None:
        self.bandit = bandit
        self.batches = batches
        self.seed = seed
        steps = math.ceil(math.log(max_draws) / math.log(GRID_RATIO))
        self.sizes = sorted({min(max_draws, math.ceil(GRID_RATIO**step)) for step in range(steps + 1)})
        self._counts: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def draws_to_cosine(self, baseline: float, method: Method, temperature: float) -> float | None:
        """Draws to the target, interpolated in log(draws) between two grid sizes 15% apart; None above max_draws.

        The hard gate needs no search: its cosine is 1 unless no right arm was drawn, 1 − (1 − p)^B.
        """
        success, failure = success_and_failure_weight(self.bandit, baseline, method, temperature)
        toward, away = success * (1 - baseline), failure * baseline
        if away == 0:
            needed = math.ceil(math.log(1 - TARGET_COSINE) / math.log1p(-self.bandit.p))
            return needed if needed <= self.sizes[-1] else None
        low, high = -1, len(self.sizes) - 1
        if self.mean_cosine(self.sizes[high], toward, away) < TARGET_COSINE:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            if self.mean_cosine(self.sizes[middle], toward, away) < TARGET_COSINE:
                low = middle
            else:
                high = middle
        if low < 0:
            return 1.0
        below, above = (self.mean_cosine(self.sizes[i], toward, away) for i in (low, high))
        share = (TARGET_COSINE - below) / (above - below)
        return self.sizes[low] * math.exp(share * math.log(self.sizes[high] / self.sizes[low]))

    def mean_cosine(self, size: int, toward: float, away: float) -> float:
        """Mean over batches of the cosine; a right draw pushes `toward` (e* − π), a wrong one −`away` (e_j − π)."""
        right, spread = self._count(size)
        p, arms = self.bandit.p, self.bandit.arms
        # |e* − π|² = (1 − p)² K/(K − 1); a wrong draw's own share along it is p/(1 − p) (see tasks/bandit.py).
        along = (right * toward + (size - right) * away * p / (1 - p)) * (1 - p) * math.sqrt(arms / (arms - 1))
        length = np.sqrt(along**2 + away**2 * spread)
        return float(np.mean(np.divide(along, length, out=np.zeros_like(length), where=length > 0)))

    def _count(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Per batch: right draws, and the squared distance of the wrong arms' counts from their mean."""
        if size not in self._counts:
            rng = np.random.default_rng([self.seed, size])
            others = self.bandit.arms - 1
            right = rng.binomial(size, self.bandit.p, size=self.batches)
            counts = rng.multinomial(size - right, np.full(others, 1 / others))
            spread = np.square(counts - counts.mean(axis=1, keepdims=True)).sum(axis=1)
            self._counts[size] = right.astype(float), spread
        return self._counts[size]


def fitted_slopes(records: Sequence[Record], fit_below: float) -> list[Record]:
    """Slopes of log(draws) and log(backward passes) against log(p), over the records with p up to `fit_below`."""
    keys = ("arms", "method", "temperature", "baseline")
    near = [row for row in records if row["p"] <= fit_below and row["draws_to_cosine_95"] is not None]
    return [
        {
            **dict(zip(keys, key, strict=True)),
            "draws_slope": _log_slope(group, "draws_to_cosine_95"),
            "backward_slope": _log_slope(group, "backward_passes_to_cosine_95"),
            "points": len(group),
        }
        for key, group in grouped(near, *keys).items()
        if len({record["p"] for record in group}) >= 2
    ]


def _log_slope(group: Sequence[Record], name: str) -> float:
    log_p, log_value = (np.log([record[key] for record in group]) for key in ("p", name))
    return float(np.polyfit(log_p, log_value, 1)[0])


def baseline_sweep(
    bandit: SoftmaxBandit, values: Sequence[float], batches: int, max_draws: int, seed: int
) -> list[Record]:
    """How far from p a constant baseline may be before the ungated gradient's noise, not its signal, sets the draws.

    `draws_predicted` adds the draws for one success, 3/p, to those that average the perpendicular noise down to the
    angle of cosine 0.95: (b/p)² / (1 − p) / tan²(acos 0.95) · (K − 2)/K.
    """
    search = CosineSearch(bandit, batches, max_draws, seed)
    angle = 1 / TARGET_COSINE**2 - 1
    success = -math.log(1 - TARGET_COSINE) / bandit.p
    return [
        {
            "arms": bandit.arms,
            "p": bandit.p,
            "baseline_value": value,
            "draws_pg": search.draws_to_cosine(value, "pg", 0.0),
            "draws_kondo": search.draws_to_cosine(value, "kondo", 0.0),
            "draws_predicted": success
            + (value / bandit.p) ** 2 / (1 - bandit.p) / angle * (bandit.arms - 2) / bandit.arms,
        }
        for value in values
    ]


STYLES = {"pg": ("PG", "#444444", "-"), "kondo": ("gate, price 0", "#c0392b", "-")}
SHADES = ("#85c1e9", "#2e86c1", "#1b4f72", "#48c9b0", "#117864")


def plot_zero_price(records: Sequence[Record], slopes: Sequence[Record], sweep: Sequence[Record], arms: int) -> Figure:
    """Variance, draws and backward passes against p for one K, and draws against the baseline."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(15, 8.5), layout="constrained")
    chosen = [record for record in records if record["arms"] == arms]
    tracking = [record for record in chosen if record["baseline"] == "p"]
    _lines(axes[0, 0], tracking, "perpendicular_variance")
    axes[0, 0].set(ylabel="perpendicular variance of one draw", title="noise, baseline p (the gate: 0, not drawn)")
    axes[0, 0].set_ylim(bottom=1e-9)  # cold DG goes on to 1e-60
    for row, baseline in enumerate(("p", "constant")):
        rows = [record for record in chosen if record["baseline"] == baseline]
        name = "baseline p" if baseline == "p" else f"baseline {rows[0]['baseline_value']:g}" if rows else baseline
        _lines(axes[row, 1], rows, "draws_to_cosine_95")
        _lines(axes[row, 2], rows, "backward_passes_to_cosine_95")
        axes[row, 1].set(ylabel="draws to mean cosine 0.95", title=f"draws, {name}")
        axes[row, 2].set(ylabel="backward passes to mean cosine 0.95", title=f"backward passes, {name}")
        _write_slopes(axes[row, 1], slopes, arms, baseline, "draws_slope")
        _write_slopes(axes[row, 2], slopes, arms, baseline, "backward_slope")
    figure.legend(*axes[1, 1].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    _plot_sweep(axes[1, 0], sweep)
    for row in range(2):  # the same axis for both baselines, so that the eye can compare
        for column in (1, 2):
            axes[row, column].set_ylim(1, 3 * max(_drawn(chosen, "draws_to_cosine_95"), default=10))
    figure.suptitle(
        f"{arms} arms: with a baseline that tracks p both need about 3/p draws and the gate about 3 backward passes;\n"
        "draws grow as 1/p² only when the baseline does not track p",
        fontsize=13,
    )
    return figure


def _drawn(records: Sequence[Record], name: str) -> list[float]:
    return [record[name] for record in records if record[name] is not None]


def _lines(axis: Axes, records: Sequence[Record], name: str) -> None:
    temperatures = sorted({record["temperature"] for record in records if record["method"] == "dg"})
    for method, temperature in methods(temperatures):
        points = [
            (record["p"], record[name])
            for record in records
            if (record["method"], record["temperature"]) == (method, temperature) and record[name]
        ]
        if not points:
            continue
        label, color, style = STYLES.get(method) or (
            f"DG, temperature {temperature:g}",
            SHADES[temperatures.index(temperature) % len(SHADES)],
            "--",
        )
        axis.plot(*zip(*sorted(points), strict=True), style, color=color, label=label, marker=".")
    axis.set(xscale="log", yscale="log", xlabel="p, probability of the right arm")
    axis.grid(alpha=0.3)


def _write_slopes(axis: Axes, slopes: Sequence[Record], arms: int, baseline: str, name: str) -> None:
    shown = [
        f"{'gate' if record['method'] == 'kondo' else record['method'].upper()} slope {record[name]:+.2f}"
        for record in slopes
        if (record["arms"], record["baseline"]) == (arms, baseline) and record["method"] in ("pg", "kondo")
    ]
    axis.text(0.97, 0.97, "\n".join(shown), transform=axis.transAxes, ha="right", va="top", fontsize=11)


def _plot_sweep(axis: Axes, sweep: Sequence[Record]) -> None:
    if sweep:
        values = [record["baseline_value"] for record in sweep]
        for name, style, color, label in (
            ("draws_pg", ".-", "#444444", "PG, measured"),
            ("draws_predicted", ":", "#444444", "3/p + 9.3 b²/p² (K − 2)/K"),
            ("draws_kondo", ".-", "#c0392b", "gate, price 0"),
        ):
            axis.plot(values, [record[name] for record in sweep], style, color=color, label=label)
        axis.legend(fontsize=9)
        axis.set_title(f"K = {sweep[0]['arms']}, p = {sweep[0]['p']:g}: a baseline above √(p/3) costs PG draws")
    axis.set(xscale="log", yscale="log", xlabel="constant baseline b", ylabel="draws to mean cosine 0.95")
    axis.grid(alpha=0.3)
