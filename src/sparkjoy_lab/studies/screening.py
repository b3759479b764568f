"""Screening for less than a forward pass: every screener, noise on delight, and the gate that stays unbiased."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from sparkjoy_lab.studies import screening_figures, screening_results
from sparkjoy_lab.studies.runs import Run, TaskConfig
from sparkjoy_lab.studies.study import Rows, Study, Work
from sparkjoy_lab.tasks.mnist import MnistConfig
from sparkjoy_lab.tasks.reversal import ReversalConfig
from sparkjoy_lab.training.draft_settings import Screen
from sparkjoy_lab.training.settings import Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

Part = Literal["screeners", "noise", "unbiased"]
VERIFY = 4.0
ALIKE = "mnist, batch-mean baseline"
KEPT: tuple[dict[str, Any], ...] = ({"rate": 0.03}, {"rate": 0.1}, {"price": 0.0})


@dataclass(frozen=True)
class ScreeningStudy(Study):
    """Cheaper screeners than a forward pass, noise on delight, and the gate that stays unbiased; in minutes."""

    keeps_records = True
    extends = ("parts", "seeds")

    full: bool = False
    """A larger grid and three times the steps, in hours a seed; without it a small one, in ten minutes a seed."""
    parts: tuple[Part, ...] = get_args(Part)
    """Which parts to run."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Runs of every arm. On MNIST one says little: its 1,000 test digits make a point of error a standard error."""
    data: str = "embedded"
    """MNIST: embedded, openml, or a folder of IDX files."""

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("--parts: expected at least one of screeners, noise and unbiased.")
        if not self.seeds:
            raise ValueError("--seeds: expected at least one.")

    @property
    def runs(self) -> int:
        return len(arms(self))

    def run(self, work: Work) -> Rows:
        rows: Rows = []
        every = arms(self)
        for arm, records in zip(every, work.each(lambda arm: work.train(arm.run), every), strict=True):
            rows += [{**record, **arm.facts} for record in records]
            work.save(rows)
        return rows

    def summary(self, rows: Rows) -> dict[str, Any]:
        return screening_results.summary(rows)

    def tables(self, rows: Rows) -> dict[str, DataFrame]:
        return screening_results.tables(rows)

    def figures(self, rows: Rows) -> dict[str, Figure]:
        return screening_figures.plot(screening_results.summary(rows))


@dataclass(frozen=True)
class Arm:
    """One run, and where it belongs.

    Args:
        part: of the study.
        task: name of the task, as it appears in tables and folders.
        config: what the task is built from.
        settings: how to train.
    """

    part: Part
    task: str
    config: TaskConfig
    settings: Settings

    @property
    def run(self) -> Run:
        """Its run, in a folder of the part and task."""
        return Run(self.settings, self.config, Path("runs", self.part, self.task.replace(" ", "-")))

    @property
    def facts(self) -> dict[str, Any]:
        """What the study's records say of it besides."""
        settings = self.settings
        return {
            "part": self.part,
            "task": self.task,
            "batch_size": self.config.batch_size if isinstance(self.config, MnistConfig) else None,
            "price_asked": settings.price,
            "screen": settings.screen,
            "verify": settings.verify,
            "noise": settings.score_noise,
            "noise_kind": settings.score_noise_kind,
        }


def arms(study: ScreeningStudy) -> list[Arm]:
    """Every run of the study, seed by seed, so that a stopped study has whole seeds."""
    every = {"screeners": _screener_arms, "noise": _noise_arms, "unbiased": _unbiased_arms}
    return [
        replace(arm, settings=replace(arm.settings, seed=seed))
        for seed in study.seeds
        for part in study.parts
        for arm in every[part](study)
    ]


def _mnist(study: ScreeningStudy, steps: int, **settings: Any) -> Settings:
    return Settings(**{"steps": 3 * steps if study.full else steps, "evaluate_every": 100, **settings})


def _reversal(steps: int, **settings: Any) -> Settings:
    return Settings(**{"steps": steps, "evaluate_every": 20, **settings})


def _screener_arms(study: ScreeningStudy) -> Iterator[Arm]:
    verified: tuple[float | None, ...] = (VERIFY, None) if study.full else (VERIFY,)
    mnist: tuple[Screen, ...] = ("stale", "bfloat16", "draft", "cached", "flat")
    reversal: tuple[Screen, ...] = ("stale", "bfloat16", "early-exit", "draft", "flat")
    images = MnistConfig(data=study.data)
    lengths = {10: 300, 20: 700} if study.full else {10: 200}
    alike = replace(images, baseline="batch-mean")  # every success has the same advantage
    yield Arm("screeners", "mnist", images, _mnist(study, 1000, screen="exact"))
    yield Arm("screeners", ALIKE, alike, _mnist(study, 1000, screen="exact"))
    for length, steps in lengths.items():
        config = ReversalConfig(prompt_length=length)
        yield Arm("screeners", f"reversal H={length}", config, _reversal(steps, screen="exact"))
    for verify in verified:
        options = {"verify": verify, "recall_floor": 0.0, "audit_every": 10}
        for screen in mnist:
            yield Arm("screeners", "mnist", images, _mnist(study, 1000, screen=screen, **options))
            if screen != "bfloat16":
                yield Arm("screeners", ALIKE, alike, _mnist(study, 1000, screen=screen, **options))
        for length, steps in lengths.items():
            config = ReversalConfig(prompt_length=length)
            for screen in reversal:
                yield Arm("screeners", f"reversal H={length}", config, _reversal(steps, screen=screen, **options))


def _noise_arms(study: ScreeningStudy) -> Iterator[Arm]:
    levels = (0.25, 0.5, 1.0, 1.5, 2.0) if study.full else (0.5, 1.0, 2.0)
    on_reversal = levels if study.full else (2.0,)
    noises = [(0.0, "multiplicative"), *((level, kind) for kind in ("multiplicative", "additive") for level in levels)]
    images, prompts = MnistConfig(data=study.data), ReversalConfig()
    for level, kind in noises:
        noise = {"score_noise": level, "score_noise_kind": kind}
        chosen: list[dict[str, Any]] = [{"method": "dg", "dg_unit": "sample"}]
        for kept in KEPT:
            chosen += [kept, {**kept, "verify": VERIFY, "audit_every": 50, "recall_floor": 0.0}]
        for choice in chosen:
            yield Arm("noise", "mnist", images, _mnist(study, 1000, **choice, **noise))
            if level == 0 or level in on_reversal:
                yield Arm("noise", "reversal H=10", prompts, _reversal(200, **choice, **noise))


def _unbiased_arms(study: ScreeningStudy) -> Iterator[Arm]:
    images = MnistConfig(data=study.data)
    harder = {
        "mnist": images,
        "mnist, 8 hidden": replace(images, hidden=8),
        "mnist, 30% wrong labels": replace(images, label_noise=0.3),
    }
    methods: list[dict[str, Any]] = [{"method": "dg"}]
    methods += [{"method": method, "rate": rate} for rate in (0.1, 0.03) for method in ("kondo", "unbiased")]
    for name, config in harder.items():
        for method in methods:
            yield Arm("unbiased", name, config, _mnist(study, 1500, **method))
    for method in methods:
        yield Arm("unbiased", "reversal H=10", ReversalConfig(), _reversal(250, **method))
    noisy = harder["mnist, 30% wrong labels"]
    for batch_size in (200, 400):  # the same backward passes, three a step, out of more forward ones
        for name in ("kondo", "unbiased"):
            settings = _mnist(study, 1500, method=name, rate=3 / batch_size)
            config = replace(noisy, batch_size=batch_size)
            yield Arm("unbiased", f"mnist, 30% wrong labels, three of {batch_size}", config, settings)
    # The same cost, a backward pass being two forward ones, in batches of other sizes.
    budget = 1500 * 100 * (1 + 3 * 0.03) * (3 if study.full else 1)
    for batch_size in (25, 50, 200, 400):
        config = replace(noisy, batch_size=batch_size)
        for method in methods[1:]:
            steps = round(budget / (batch_size * (1 + 3 * method["rate"])))
            settings = Settings(steps=steps, evaluate_every=max(1, steps // 10), **method)
            yield Arm("unbiased", f"mnist, 30% wrong labels, batches of {batch_size}", config, settings)
