"""What every study is, and the one way to run it."""

from __future__ import annotations

import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from sparkjoy_lab.studies.runs import Run
from sparkjoy_lab.studies.workers import StoppedError, Workers, available_cpus
from sparkjoy_lab.training.console import LiveRuns, print_table, study_progress
from sparkjoy_lab.training.folder import opened
from sparkjoy_lab.training.loop import Record
from sparkjoy_lab.training.tracking import as_json, read_json, save_figure, write_json, write_json_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

Rows = list[Record]
Item = TypeVar("Item")
Found = TypeVar("Found")


class Study(ABC):
    """One claim, with its runs, its table and its figures: a frozen dataclass, whose fields are the command's flags.

    The class's docstring is the command's help. Rows are plain dicts, one a run or an evaluation; what is made of them
    starts with `pandas.json_normalize`.
    """

    trains: ClassVar[bool] = True
    """Whether it is made of training runs, which a stopped study keeps and which `--jobs` may train at once."""
    keeps_records: ClassVar[bool] = False
    """Whether the rows are what records.jsonl holds."""
    extends: ClassVar[tuple[str, ...]] = ()
    """Fields that only say which runs there are: a folder's results may be gone on from with longer ones, to what all
    runs at once would have come to. Never what a run's own result, or the choice of a learning rate, depends on."""
    folder: ClassVar[str] = "Folder for the results; finished runs in it are not run again."
    """The help of --out."""

    @property
    def runs(self) -> int:
        """Training runs, if none is left out."""
        return 0

    @property
    def threads(self) -> int:
        """Threads of torch in each run."""
        return 1

    def config(self) -> dict[str, Any]:
        """What the results depend on, for config.json."""
        return asdict(self)  # type: ignore[call-overload,no-any-return]  # a dataclass, as every study is

    @abstractmethod
    def run(self, work: Work) -> Rows:
        """Measure; where it takes long, `work.save` what there is along the way."""

    @abstractmethod
    def summary(self, rows: Rows) -> dict[str, Any]:
        """What summary.json holds."""

    @abstractmethod
    def tables(self, rows: Rows) -> dict[str, DataFrame]:
        """What is printed, by title: text in cells, words in the index, figures in columns."""

    @abstractmethod
    def figures(self, rows: Rows) -> dict[str, Figure]:
        """Figures by the names of their files."""


class Work:
    """What a study has while it runs: a folder, and how to train, to count and to write there.

    Args:
        study: whose work it is.
        out: the folder.
        live: where runs show how far they are.
        progress: `(fraction done, what comes next)`, for a study that does not train.
        workers: processes that train; None: this one does.
    """

    def __init__(
        self,
        study: Study,
        out: Path,
        live: LiveRuns,
        progress: Callable[[float, str], None] = lambda done, what: None,
        workers: Workers | None = None,
        jobs: int = 1,
    ) -> None:
        self.study, self.out, self.progress = study, out, progress
        self._live, self._workers, self._jobs = live, workers, jobs
        self._there = _rows_there(out, study.keeps_records)

    def train(self, run: Run) -> list[Record]:
        """The records of a run; a finished one is read, and one that was stopped goes on."""
        with self._live.run(run.said or run.name, run.settings) as on_step:
            if self._workers is None:
                return run.train(self.out, on_step)
            return self._workers.train(run, on_step)

    def each(self, do: Callable[[Item], Found], items: Iterable[Item]) -> Iterator[Found]:
        """What `do` makes of each item, in their order; as many at once as there are processes for their runs."""
        if self._workers is None:
            yield from map(do, items)
            return
        with ThreadPoolExecutor(self._jobs) as threads:
            found = [threads.submit(do, item) for item in items]
            try:
                for one in found:
                    yield one.result()
            except BaseException as error:
                self._workers.stop()
                threads.shutdown(wait=True, cancel_futures=True)
                if isinstance(error, StoppedError) and self._workers.failure is not None:
                    raise self._workers.failure from None
                raise

    def save(self, rows: Rows, all_done: bool = False) -> None:
        """Write summary.json, and records.jsonl where the study has one.

        On the way only once every row that an earlier start has written is among them: what may yet fail leaves them.
        """
        if not all_done and not self._there <= set(map(_as_line, rows)):
            return
        if self.study.keeps_records:
            write_json_lines(self.out / "records.jsonl", rows)
        write_json(self.out / "summary.json", self.study.summary(rows))


def run_study(study: Study, out: Path, jobs: int = 1) -> Rows:
    """Run a study in its folder, or go on with it; write its results and figures, and print its tables.

    Args:
        study: what to run.
        out: the folder: config.json, summary.json, the runs, and figures as PNG and SVG.
        jobs: runs trained at once, each in a process of its own. Records are the same, but for their seconds.

    Raises:
        ValueError: the folder cannot be written, or holds results with other settings.
    """
    most = max(64, os.cpu_count() or 1)
    if not 1 <= jobs <= most:
        raise ValueError(f"--jobs {jobs}: expected a number from 1 to {most}.")
    with opened(out, study.config(), extends=study.extends):
        with working(study, out, jobs) as work:
            rows = study.run(work)
        work.save(rows, all_done=True)
        figures = study.figures(rows)
        for name, figure in figures.items():
            save_figure(figure, out, name)
    for title, table in study.tables(rows).items():
        print_table(title, table)
    print(f"results in {out}; drawn: {', '.join(f'{name}.png' for name in figures)}")
    return rows


def _rows_there(out: Path, in_records: bool) -> set[str]:
    """The rows that an earlier start has left, each as a line of JSON; what cannot be read is written anew."""
    try:
        if in_records:
            return set((out / "records.jsonl").read_text().splitlines())
        summary = read_json(out / "summary.json")
        return set(map(_as_line, summary["steps" if "steps" in summary else "runs"]))
    except (OSError, ValueError, LookupError, TypeError):
        return set()


def _as_line(row: Record) -> str:
    return json.dumps(as_json(row))


def _warn_of_waiting(jobs: int, threads: int) -> None:
    """Say where runs have fewer CPUs than threads; their number is left alone, since last digits depend on it."""
    there = available_cpus()
    if jobs * threads > there:
        each = f"{threads} thread{'s' * (threads > 1)} each"
        said = (
            f"{jobs} runs at once, of {each}, wait for one another on {there} CPUs; --jobs {max(1, there // threads)}"
        )
        print(f"sparkjoy: {said} fits. Records are the same, but for their seconds.", file=sys.stderr)


@contextmanager
def working(study: Study, out: Path, jobs: int = 1) -> Iterator[Work]:
    """A study's work, with progress shown and processes started."""
    with ExitStack() as stack:
        live = stack.enter_context(LiveRuns(study.runs))
        if not study.trains:
            yield Work(study, out, live, stack.enter_context(study_progress()))
        elif jobs == 1:
            yield Work(study, out, live)
        else:
            count = min(jobs, max(1, study.runs))
            _warn_of_waiting(count, study.threads)
            yield Work(study, out, live, workers=stack.enter_context(Workers(count, out)), jobs=count)
