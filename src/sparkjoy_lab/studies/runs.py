"""One training run of a study: on what, how, and where its folder is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from sparkjoy_lab.tasks.mnist import MnistConfig, MnistTask
from sparkjoy_lab.tasks.reversal import ReversalConfig, ReversalTask
from sparkjoy_lab.tasks.rollouts import Task
from sparkjoy_lab.training.loop import OnStep, Record, train
from sparkjoy_lab.training.settings import Settings

TaskConfig = MnistConfig | ReversalConfig


@dataclass(frozen=True)
class Run:
    """A run, which a process of its own can train too.

    Args:
        settings: how.
        task: what the task is built from.
        within: the folder, below the study's, that has the run's own.
        said: its name while it goes on; by default that of its folder, written out.
    """

    settings: Settings
    task: TaskConfig
    within: Path = Path("runs")
    said: str = ""

    @property
    def name(self) -> str:
        """`kondo 3%, seed 0`."""
        return f"{self.settings.label}, seed {self.settings.seed}"

    @property
    def folder(self) -> Path:
        """Its folder, below the study's."""
        return self.within / folder_name(self.name)

    def train(self, out: Path, on_step: OnStep | None = None) -> list[Record]:
        """Train, or read what is finished; the records, each with the name of its arm.

        Args:
            out: the study's folder.
            on_step: called after every step.
        """
        records = train(task_of(self.task), self.settings, out / self.folder, asdict(self.task), on_step)
        return [{"arm": self.settings.label, **record} for record in records]


@lru_cache(maxsize=2)
def task_of(config: TaskConfig) -> Task:
    """The task of a config; runs that follow one another share it, and its data."""
    return MnistTask(config) if isinstance(config, MnistConfig) else ReversalTask(config)


def default_target(config: TaskConfig) -> float:
    """The error whose first time is reported unless another is asked for."""
    if isinstance(config, ReversalConfig):
        return 0.01
    return 0.08 if config.data == "embedded" else 0.05


def folder_name(words: str) -> str:
    """A name without blanks and percent signs.

    >>> folder_name("kondo 3%, seed 0")
    'kondo-3pct-seed-0'
    """
    return words.replace("%", "pct").replace(", ", "-").replace(" ", "-")
