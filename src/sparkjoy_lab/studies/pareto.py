"""Quality against cost: every method at every rate, its error against steps, backward samples and seconds."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import OmitArgPrefixes as Boxed  # flags without the field's name, in a box of that name

from sparkjoy_lab.studies import run_tables
from sparkjoy_lab.studies.pareto_figure import plot
from sparkjoy_lab.studies.runs import Run, TaskConfig, default_target, task_of
from sparkjoy_lab.studies.study import Rows, Study, Work
from sparkjoy_lab.tasks.mnist import MnistConfig
from sparkjoy_lab.tasks.reversal import ReversalConfig
from sparkjoy_lab.training.flags import refuse_idle
from sparkjoy_lab.training.settings import Method, Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

FLAT = tyro.conf.arg(name="")  # flags of a nested config without its name before them


@dataclass(frozen=True)
class ParetoConfig:
    """Which runs to compare: one after another on the same threads, so that their seconds compare."""

    methods: tuple[Method, ...] = ("pg", "dg", "kondo", "unbiased", "uniform")
    """Methods to train."""
    rates: tuple[float, ...] = (0.01, 0.03, 0.1)
    """Fractions of samples that kondo keeps."""
    uniform_rates: tuple[float, ...] = (0.03,)
    """Fractions that uniform keeps, rows at random: what any choice has to beat."""
    prices: tuple[float, ...] = ()
    """Fixed prices at which to train kondo too, such as 0."""
    noises: tuple[float, ...] = ()
    """Noise budgets at which to train unbiased too, such as 0.3 and 1; 0.3 where it is among the methods alone."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run of every arm for each."""
    steps: int = 4_000
    """Optimizer steps a run."""
    learning_rate: float = 1e-3
    """Adam's learning rate."""
    evaluate_every: int = 100
    """Steps between evaluations."""
    target_error: float | None = None
    """Report when the error first was at or below this fraction."""
    threads: int = 1
    """Threads of torch in each run; the last digits of results depend on it."""

    def __post_init__(self) -> None:
        for name in ("methods", "rates", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"--{name}: expected at least one.")
        kondo = ("kondo" in self.methods, "kondo among --methods")
        uniform = ("uniform" in self.methods, "uniform among --methods")
        refuse_idle(self, {"rates": kondo, "prices": kondo, "uniform_rates": uniform})
        self.arms()

    def arms(self) -> list[Settings]:
        """The settings of every arm, with the first seed."""
        shared: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("steps", "learning_rate", "evaluate_every", "target_error", "threads")
        }
        arms = []
        for method in self.methods:
            choices: list[dict[str, Any]] = [{}]
            if method == "uniform":
                choices = [{"rate": rate} for rate in self.uniform_rates]
            if method == "kondo":
                choices = [{"rate": rate} for rate in self.rates] + [{"price": price} for price in self.prices]
            if method == "unbiased" and self.noises:
                choices = [{"noise": noise} for noise in self.noises]
            arms += [Settings(method=method, seed=self.seeds[0], **choice, **shared) for choice in choices]
        if "unbiased" not in self.methods:
            arms += [Settings("unbiased", noise=noise, seed=self.seeds[0], **shared) for noise in self.noises]
        return arms


@dataclass(frozen=True)
class ReversalParetoConfig(ParetoConfig):
    """The same with what suits token reversal where nothing is given."""

    rates: tuple[float, ...] = (0.03, 0.1)
    prices: tuple[float, ...] = (0.0,)
    steps: int = 400
    evaluate_every: int = 20


class Pareto(Study):
    """Train every method at every rate, and draw quality against cost."""

    study: ParetoConfig
    task: TaskConfig
    keeps_records = True
    extends = ("methods", "rates", "uniform_rates", "prices", "noises", "seeds")

    @property
    def target(self) -> float:
        """The error whose first time is reported."""
        asked = self.study.target_error
        return default_target(self.task) if asked is None else asked

    @property
    def runs(self) -> int:
        return len(self.study.arms()) * len(self.study.seeds)

    @property
    def threads(self) -> int:
        return self.study.threads

    def config(self) -> dict[str, Any]:
        name = task_of(self.task).name
        return {"task": name, **asdict(self.task), **asdict(self.study), "target_error": self.target}

    def run(self, work: Work) -> Rows:
        arms = replace(self.study, target_error=self.target).arms()
        runs = [Run(replace(arm, seed=seed), self.task) for arm in arms for seed in self.study.seeds]
        rows: Rows = []
        for records in work.each(work.train, runs):
            rows += records
            work.save(rows)
        return rows

    def summary(self, rows: Rows) -> dict[str, Any]:
        return {"runs": run_tables.last_records(rows, self.target)}

    def tables(self, rows: Rows) -> dict[str, DataFrame]:
        return run_tables.tables(rows, self.target)

    def figures(self, rows: Rows) -> dict[str, Figure]:
        return {"pareto": plot(rows)}


@dataclass(frozen=True)
class ParetoMnist(Pareto):
    """Train every method at every rate on MNIST, and draw quality against cost."""

    study: Annotated[ParetoConfig, FLAT] = field(default_factory=ParetoConfig)
    task: Boxed[MnistConfig] = field(default_factory=MnistConfig)


@dataclass(frozen=True)
class ParetoReversal(Pareto):
    """Train every method at every rate on token reversal, and draw quality against cost."""

    study: Annotated[ReversalParetoConfig, FLAT] = field(default_factory=ReversalParetoConfig)
    task: Boxed[ReversalConfig] = field(default_factory=ReversalConfig)
