"""`sparkjoy train`: one policy, in one process or several."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from tyro.conf import OmitArgPrefixes as Boxed  # flags without the field's name, in a box of that name

from sparkjoy_lab.studies.runs import TaskConfig, default_target
from sparkjoy_lab.tasks.mnist import MnistConfig, MnistTask
from sparkjoy_lab.tasks.reversal import ReversalConfig, ReversalTask
from sparkjoy_lab.tasks.rollouts import Task
from sparkjoy_lab.training.console import LiveRuns, print_table
from sparkjoy_lab.training.draft_settings import DraftSettings
from sparkjoy_lab.training.loop import train
from sparkjoy_lab.training.method_settings import MethodSettings
from sparkjoy_lab.training.processes import WHOLE, Share, joined, share_of_this_process
from sparkjoy_lab.training.run_settings import RunSettings
from sparkjoy_lab.training.settings import Settings

FOLDER = "Folder for the results; a run that was stopped goes on from there."


@dataclass(frozen=True)
class Trained:
    """How to train, in parts: each is a box of the help."""

    method: Boxed[MethodSettings] = field(default_factory=MethodSettings)
    run: Boxed[RunSettings] = field(default_factory=RunSettings)
    draft: Boxed[DraftSettings] = field(default_factory=DraftSettings)

    def __post_init__(self) -> None:
        _ = self.settings  # raises on parts that do not go together

    @property
    def settings(self) -> Settings:
        """The parts as one."""
        return Settings(**asdict(self.method), **asdict(self.run), **asdict(self.draft))


@dataclass(frozen=True)
class TrainMnist(Trained):
    """Train one policy on MNIST as a contextual bandit.

    Start with --method, --rate or --noise, --steps, --seed, --until-error and --data; the others are for experiments.
    """

    task: Boxed[MnistConfig] = field(default_factory=MnistConfig)
    folder = FOLDER

    def start(self, out: Path) -> None:
        """Train, or go on, and print what came of it."""
        _train(MnistTask(self.task), self.task, self.settings, out)


@dataclass(frozen=True)
class TrainReversal(Trained):
    """Train a transformer to write a prompt backwards, from rewards alone.

    Start with --method, --rate or --noise, --steps, --seed, --until-error and --prompt-length; the others are for
    experiments.
    """

    run: Boxed[RunSettings] = field(default_factory=lambda: RunSettings(steps=1_000, evaluate_every=20))
    task: Boxed[ReversalConfig] = field(default_factory=ReversalConfig)
    folder = FOLDER

    def start(self, out: Path) -> None:
        """Train, or go on, as one of the processes that torchrun started, and print what came of it."""
        share = share_of_this_process()
        task = ReversalTask(self.task, share)
        with joined(share):
            _train(task, self.task, self.settings, out, share)


def _train(task: Task, task_config: TaskConfig, settings: Settings, out: Path, share: Share = WHOLE) -> None:
    asked = settings.target_error
    target = default_target(task_config) if asked is None else asked
    settings = replace(settings, target_error=target)
    if not share.first:
        train(task, settings, out, asdict(task_config), share=share)
        return
    with LiveRuns(runs=1) as live, live.run(settings.label, settings) as on_step:
        records = train(task, settings, out, asdict(task_config), on_step, share)
    from sparkjoy_lab.studies.run_tables import tables  # pandas, of which processes after the first have no need

    for title, table in tables([{"arm": settings.label, **record} for record in records], target).items():
        print_table(title, table)
    print(f"results in {out}")
