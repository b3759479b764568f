"""The bandit theory of the Kondo gate, checked number by number: `sparkjoy study bandit`.

Five claims, each measured in a file of its own: zero price keeps the direction and drops the noise
(`bandit_zero_price`), DG is closer to the supervised oracle (`bandit_contexts`), a product ranks better than a sum
(`bandit_sums`), and noise on a bad arm makes the gate gamble (`bandit_gambling`), with guards against it
(`bandit_guards`), and how long a wrong corner holds whom (`bandit_corners`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from sparkjoy.gates import KondoGate
from sparkjoy_lab.studies import (
    bandit_contexts,
    bandit_corners,
    bandit_gambling,
    bandit_guards,
    bandit_sums,
    bandit_zero_price,
)
from sparkjoy_lab.studies.drawing import fitted
from sparkjoy_lab.studies.frames import grouped
from sparkjoy_lab.studies.study import Rows, Study, Work
from sparkjoy_lab.tasks.bandit import SoftmaxBandit, checked_arms, checked_probability
from sparkjoy_lab.tasks.gambling import Gambling, checked_sigma
from sparkjoy_lab.training.memory import check_memory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DG_TEMPERATURE = 1.0  # of the learning curves, as in the papers
REPEAT_BATCHES = (1, 2, 4, 8, 16, 32, 64)
Record = dict[str, Any]
Job = tuple[str, str, Callable[[], list[Record]]]
"""(part of the summary its records go to, what it does in words, the work)."""


@dataclass(frozen=True)
class BanditStudy(Study):
    """The papers' bandit theory, checked number by number, in about half a minute."""

    trains = False
    folder = "Folder for summary.json and the figures; written when everything is measured."

    arms: tuple[int, ...] = (3, 10, 100)
    """K, numbers of arms, each at least 2."""
    p: tuple[float, ...] = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.7, 0.9, 0.99)
    """Probabilities of the right arm, in (0, 1)."""
    temperatures: tuple[float, ...] = (0.1, 1.0, 10.0)
    """Temperatures of DG, above 0; the learning curves always use 1.0."""
    constant_baseline: float = 0.5
    """The baseline that does not track p, in (0, 1)."""
    draws: int = 20_000
    """Monte Carlo draws per setting."""
    batches: int = 2_000
    """Batches averaged over when searching for a mean cosine of 0.95."""
    max_draws: int = 100_000_000
    """Largest batch tried in that search; null in the summary where it is not enough."""
    fit_below: float = 0.02
    """Slopes against p are fitted over p up to this."""
    context_p: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
    """Difficulties of the contexts that are compared in pairs, in (0, 1)."""
    alphas: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0)
    """Weights of the advantage in the sum, in [0, 1]."""
    sigma: tuple[float, ...] = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)
    """Reward noise, in units of the gap, at least 0."""
    gap: float = 1.0
    """Difference between the arms' mean rewards, above 0."""
    start: float = 0.5
    """Probability of the good arm before learning, in (0, 1)."""
    rate: float = 0.1
    """Rate of the gate with a fixed rate, in (0, 1]."""
    seeds: int = 50
    """Learning runs per setting."""
    steps: int = 300
    """Updates per learning run."""
    batch: int = 32
    """Draws per update."""
    learning_rate: float = 1.0
    """Of plain gradient ascent on the logits, above 0."""
    memory: int = 100
    """Draws that a guard with limited memory looks back over."""
    log_ratios: tuple[float, ...] = (2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0)
    """log π(corner)/π(best) from which a wrong corner is to be left, from 0.1 to 15."""
    corner_steps: int = 2_000
    """Updates of a run with draws that may leave a corner, or come to rest."""
    seed: int = 0
    """Seed of everything drawn."""

    def __post_init__(self) -> None:
        for name in ("arms", "p", "temperatures", "context_p", "alphas", "sigma", "log_ratios"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; give at least one value.")
        for arms in self.arms:
            checked_arms(arms)
        for chance in (*self.p, *self.context_p):
            checked_probability(chance)
        for sigma in self.sigma:
            checked_sigma(sigma)
        for name in ("constant_baseline", "start"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected a number strictly between 0 and 1.")
        for alpha in self.alphas:
            if not 0 <= alpha <= 1:
                raise ValueError(f"alphas has {alpha!r}; expected numbers in [0, 1].")
        for temperature in self.temperatures:
            if not 0 < temperature < math.inf:
                raise ValueError(f"temperatures has {temperature!r}; expected finite numbers above 0.")
        for name in ("draws", "batches", "max_draws", "seeds", "steps", "batch", "memory", "corner_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected at least 1.")
        for name in ("gap", "learning_rate", "fit_below"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected a finite number above 0.")
        for ratio in self.log_ratios:
            if not 0.1 <= ratio <= 15:
                raise ValueError(f"log_ratios has {ratio!r}; expected numbers from 0.1 to 15.")
        if len(set(self.context_p)) < 2:
            raise ValueError("context_p has fewer than 2 different values; contexts are compared in pairs.")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; expected at least 0.")
        KondoGate(rate=self.rate)
        counts, learned = self.batches * max(self.arms), self.seeds * max(self.batch, self.steps, self.memory)
        check_memory(
            8 * max(self.draws, counts, learned),
            "--arms, --draws, --batches, --seeds, --steps, --batch and --memory as given",
        )

    @property
    def tasks(self) -> list[Gambling]:
        """Every noise level, on the bad arm and on both."""
        return [Gambling(ratio * self.gap, self.gap, noise) for noise in ("bad", "all") for ratio in self.sigma]

    @property
    def learning(self) -> bandit_gambling.Learning:
        """How the runs learn."""
        return bandit_gambling.Learning(
            self.seeds, self.steps, self.batch, self.learning_rate / self.gap, self.start, self.seed
        )

    def run(self, work: Work) -> Rows:
        """Records of every part, each with the name of its part."""
        torch.set_num_threads(1)
        jobs = [*_zero_price_jobs(self), *_exact_jobs(self), *_gambling_jobs(self), *_corner_jobs(self)]
        rows: Rows = []
        for done, (part, what, job) in enumerate(jobs):
            work.progress(done / len(jobs), what)
            rows += [{"part": part, **record} for record in job()]
        work.progress(1.0, "done")
        return rows

    def summary(self, rows: Rows) -> dict[str, Any]:
        """Lists of records, plain numbers: one a part, and "slopes", "corner_slopes" and "contexts_summary"."""
        found: dict[str, Any] = {}
        for (part,), of_part in grouped(rows, "part").items():
            found[part] = [{name: value for name, value in row.items() if name != "part"} for row in of_part]
        found["slopes"] = bandit_zero_price.fitted_slopes(found["zero_price"], self.fit_below)
        found["corner_slopes"] = bandit_corners.exit_slopes(found["corners"])
        found["contexts_summary"] = bandit_contexts.context_summary(found["contexts"], self.seed)
        return found

    def tables(self, rows: Rows) -> dict[str, pd.DataFrame]:
        slopes = pd.DataFrame(self.summary(rows)["slopes"])
        if slopes.empty:
            return {}
        slopes["temperature"] = ["" if eta is None or eta != eta else f"{eta:g}" for eta in slopes["temperature"]]
        slopes[["draws_slope", "backward_slope"]] = slopes[["draws_slope", "backward_slope"]].map("{:.2f}".format)
        shown = slopes.rename(columns=lambda name: name.replace("_", " "))
        return {
            "needed for a mean cosine of 0.95: as what power of p": shown.set_index(
                ["arms", "method", "temperature", "baseline"]
            )
        }

    def figures(self, rows: Rows) -> dict[str, Figure]:
        found = self.summary(rows)
        arms = sorted({record["arms"] for record in found["zero_price"]})
        figures = {
            "zero_price": bandit_zero_price.plot_zero_price(
                found["zero_price"], found["slopes"], found["baseline_sweep"], arms[len(arms) // 2]
            ),
            "contexts": bandit_contexts.plot_contexts(found["contexts"]),
            "sums": bandit_sums.plot_sums(found["sums"]),
            "gambling": bandit_gambling.plot_gambling(found["lucky"], found["gambling"]),
            "guards": bandit_guards.plot_guards(found["guards"], found["guard_costs"], found["guard_repeats"]),
            "corners": bandit_corners.plot_corners(found["corners"], found["corners_sampled"], found["shared"]),
        }
        return {name: fitted(figure) for name, figure in figures.items()}


def _zero_price_jobs(config: BanditStudy) -> list[Job]:
    measure = partial(
        bandit_zero_price.zero_price_records,
        temperatures=config.temperatures,
        constant=config.constant_baseline,
        draws=config.draws,
        batches=config.batches,
        max_draws=config.max_draws,
        seed=config.seed,
    )
    settings = [SoftmaxBandit(arms, p) for arms in config.arms for p in config.p]
    swept = SoftmaxBandit(sorted(config.arms)[len(config.arms) // 2], min(config.p))
    values = np.geomspace(swept.p, max(config.constant_baseline, 2 * swept.p), 9).tolist()
    sweep = partial(bandit_zero_price.baseline_sweep, swept, values, config.batches, config.max_draws, config.seed)
    return [
        *(("zero_price", f"zero price, K = {b.arms}, p = {b.p:g}", partial(measure, b)) for b in settings),
        ("baseline_sweep", "zero price, other baselines", sweep),
    ]


def _exact_jobs(config: BanditStudy) -> list[Job]:
    values = sorted(set(config.context_p))
    pairs = bandit_contexts.pair_records
    return [
        *(
            ("contexts", f"contexts, K = {arms}", partial(pairs, arms, temperature, values))
            for arms in config.arms
            for temperature in config.temperatures
        ),
        ("sums", "product against sum", partial(bandit_sums.sum_records, config.alphas)),
    ]


def _gambling_jobs(config: BanditStudy) -> list[Job]:
    tasks, learning, gap = config.tasks, config.learning, config.gap
    chances = sorted({0.1, config.start, 0.9})
    sigmas = [ratio * gap for ratio in config.sigma]
    lucky = partial(bandit_gambling.lucky_records, sigmas, gap, chances, config.draws, config.seed)
    learned = partial(bandit_gambling.gambling_records, tasks, learning, DG_TEMPERATURE, config.rate)
    guarded = partial(bandit_guards.guard_records, tasks, learning)
    noisiest = Gambling(max(sigmas), gap)
    return [
        ("lucky", "gambling, lucky draws", lucky),
        (
            "gambling_thresholds",
            "gambling, thresholds",
            partial(bandit_gambling.threshold_records, gap, chances, DG_TEMPERATURE),
        ),
        *(("gambling", f"gambling, {method}", partial(learned, method)) for method in bandit_gambling.METHODS),
        *(("guards", f"guards, {guard}", partial(guarded, guard)) for guard in bandit_guards.GUARDS),
        ("guards", "guards, mean with a memory", partial(guarded, "mean", memory=config.memory)),
        ("guards", "guards, mean at a rate", partial(guarded, "mean", rate=config.rate)),
        *(
            (
                "guard_costs",
                f"guards, cost of {guard}",
                partial(bandit_guards.cost_records, gap, learning, guard, config.memory),
            )
            for guard in bandit_guards.GUARDS
        ),
        (
            "guard_repeats",
            "guards, fewer repeated draws",
            partial(bandit_guards.repeat_records, noisiest, learning, REPEAT_BATCHES),
        ),
    ]


def _corner_jobs(config: BanditStudy) -> list[Job]:
    seeds, steps = min(config.seeds, 10), config.corner_steps
    lowest = sorted(config.log_ratios)[:3]

    def exits(method: str) -> list[Record]:
        return [bandit_corners.sampled_exits(method, ratio, seeds, steps) for ratio in lowest]

    return [
        ("corners", "corners, exact", partial(bandit_corners.exit_records, sorted(config.log_ratios))),
        *(("corners_sampled", f"corners, {method}", partial(exits, method)) for method in bandit_corners.SAMPLED),
        ("shared", "two states, one parameter", partial(bandit_corners.shared_records, min(seeds, 5), steps // 2)),
    ]
