"""Screening for less than a forward pass: every screener, noise on delight, and the gate that stays unbiased."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from sparkjoy.lab.studies.pareto import OnRun, train_one
from sparkjoy.lab.tasks.mnist import MnistConfig, MnistTask
from sparkjoy.lab.tasks.reversal import ReversalConfig, ReversalTask
from sparkjoy.lab.tasks.rollouts import Task
from sparkjoy.lab.training.draft_settings import Screen
from sparkjoy.lab.training.folder import opened
from sparkjoy.lab.training.loop import Record
from sparkjoy.lab.training.settings import Settings
from sparkjoy.lab.training.tracking import write_json, write_json_lines

Part = Literal["screeners", "noise", "unbiased"]
VERIFY = 4.0
ALIKE = "mnist, batch-mean baseline"
KEPT: tuple[dict[str, Any], ...] = ({"rate": 0.03}, {"rate": 0.1}, {"price": 0.0})
MEASURED = (
    "recall",
    "draft_recall",
    "spearman",
    "proposed",
    "seconds_over_forward",
    "learn_over_forward",
    "flops_over_forward",
)


@dataclass(frozen=True)
class ScreeningStudy:
    """What can be had for less than an exact forward pass over every row."""

    full: bool = False
    """The grid of the paper index, in hours; without it a small one, in minutes."""
    parts: tuple[Part, ...] = get_args(Part)
    """Which parts to run."""
    data: str = "embedded"
    """MNIST: embedded, openml, or a folder of IDX files."""

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("--parts: expected at least one of screeners, noise and unbiased.")


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
    config: MnistConfig | ReversalConfig
    settings: Settings


def arms(study: ScreeningStudy) -> list[Arm]:
    """Every run of the study, seed by seed, so that a stopped study has whole seeds."""
    seeds = range(3 if study.full else 1)
    every = {"screeners": _screener_arms, "noise": _noise_arms, "unbiased": _unbiased_arms}
    return [
        replace(arm, settings=replace(arm.settings, seed=seed))
        for seed in seeds
        for part in study.parts
        for arm in every[part](study)
    ]


def run(study: ScreeningStudy, out: Path, on_run: OnRun | None = None) -> dict[str, list[Record]]:
    """Train every arm in a folder of its own under `out`; finished runs are not run again.

    Returns:
        The tables of summary.json: "screeners", "noise" and "unbiased".
    """
    with opened(out, asdict(study)):
        return _run(study, out, on_run)


def _run(study: ScreeningStudy, out: Path, on_run: OnRun | None) -> dict[str, list[Record]]:
    tasks: dict[Any, Task] = {}
    records: list[Record] = []
    for arm in arms(study):
        task = tasks.setdefault(arm.config, _task(arm.config))
        folder = out / "runs" / arm.part / arm.task.replace(" ", "-")
        batch = arm.config.batch_size if isinstance(arm.config, MnistConfig) else None
        shared = {"part": arm.part, "task": arm.task, "batch_size": batch, "price_asked": arm.settings.price}
        settings = arm.settings
        shared |= {"screen": settings.screen, "verify": settings.verify}
        shared |= {"noise": settings.score_noise, "noise_kind": settings.score_noise_kind}
        of_arm = train_one(settings, task, folder, asdict(arm.config), on_run)
        records += [{**record, **shared} for record in of_arm]
        write_json_lines(out / "records.jsonl", records)
        write_json(out / "summary.json", tables(records))
    return tables(records)


def tables(records: list[Record]) -> dict[str, list[Record]]:
    """One row an arm, means over its seeds; "mean_error" is over the evaluations of a run, a measure of its speed."""
    of_arms: dict[tuple[Any, ...], dict[int, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        key = (record["part"], record["task"], record["arm"])
        of_arms[key][record["seed"]].append(record)
    rows: dict[str, list[Record]] = {part: [] for part in get_args(Part)}
    for (part, _, _), of_seeds in of_arms.items():
        rows[part].append(_row(list(of_seeds.values())))
    exact = {row["task"]: row for row in rows["screeners"] if row["screener"] == "exact"}
    for row in rows["screeners"]:
        for name in ("error", "mean_error"):
            row[f"{name}_exact"] = exact[row["task"]][name] if row["task"] in exact else None
    return rows


def _row(of_seeds: list[list[Record]]) -> Record:
    last = [records[-1] for records in of_seeds]
    screening = [record["screening"] for record in last if record["screening"] is not None]

    def mean(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else None

    return {
        "screener": last[0]["screen"],
        "task": last[0]["task"],
        "method": last[0]["method"],
        "arm": last[0]["arm"],
        "rate": last[0]["rate"],
        "price": last[0]["price_asked"],
        "verify": last[0]["verify"],
        "noise": last[0]["noise"],
        "noise_kind": last[0]["noise_kind"],
        "batch_size": last[0]["batch_size"],
        "step": last[0]["step"],
        "backward_samples": mean([record["backward_samples"] for record in last]),
        **{name: mean([found[name] for found in screening]) for name in MEASURED},
        "gave_up": sum(found["exact"] for found in screening),
        "error": mean([record["error"] for record in last]),
        "mean_error": mean([record["error"] for records in of_seeds for record in records]),
        "seeds": len(last),
    }


def _task(config: MnistConfig | ReversalConfig) -> Task:
    return MnistTask(config) if isinstance(config, MnistConfig) else ReversalTask(config)


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
