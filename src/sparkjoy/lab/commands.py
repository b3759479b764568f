"""What each `sparkjoy` command takes and does; needs the extra [cli]."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from sparkjoy.lab.bench import frontier
from sparkjoy.lab.bench import run as bench
from sparkjoy.lab.studies import (
    bandit_theory,
    budget,
    budget_figure,
    frictions,
    frictions_figure,
    pareto,
    scaling,
    score_comparison,
    screening,
    screening_figures,
    step_gain,
    token_gate,
)
from sparkjoy.lab.studies.language import LanguageStudy
from sparkjoy.lab.studies.language_tasks import TASKS
from sparkjoy.lab.tasks.mnist import MnistConfig, MnistTask
from sparkjoy.lab.tasks.reversal import ReversalConfig, ReversalTask
from sparkjoy.lab.tasks.rollouts import Task
from sparkjoy.lab.training.console import (
    LiveRuns,
    print_bench,
    print_budget,
    print_frictions,
    print_gains,
    print_language,
    print_runs,
    print_scaling,
    print_scores,
    print_screening,
    print_slopes,
    study_progress,
)
from sparkjoy.lab.training.flags import checked, need, refuse_empty
from sparkjoy.lab.training.folder import opened
from sparkjoy.lab.training.loop import summary, train
from sparkjoy.lab.training.processes import WHOLE, Share, joined, refuse_several_processes, share_of_this_process
from sparkjoy.lab.training.settings import Settings
from sparkjoy.lab.training.tracking import save_figure, write_json, write_json_lines

FLAT = tyro.conf.arg(name="")  # flags of a nested config without its name before them


@dataclass(frozen=True)
class TrainMnist:
    """Train one policy on MNIST as a contextual bandit."""

    out: Path = Path("out/train-mnist")
    """Folder for the results; a run that was stopped goes on from there."""
    settings: Annotated[Settings, FLAT] = field(default_factory=Settings)
    task: Annotated[MnistConfig, FLAT] = field(default_factory=MnistConfig)

    def __call__(self) -> None:
        _train(MnistTask(self.task), self.task, self.settings, _mnist_target(self.task), self.out)


@dataclass(frozen=True)
class ParetoMnist:
    """Train every method at every rate on MNIST, and draw quality against cost."""

    out: Path = Path("out/pareto-mnist")
    """Folder for the results; finished runs in it are not run again."""
    study: Annotated[pareto.ParetoConfig, FLAT] = field(default_factory=pareto.ParetoConfig)
    task: Annotated[MnistConfig, FLAT] = field(default_factory=MnistConfig)

    def __call__(self) -> None:
        _pareto(MnistTask(self.task), self.task, self.study, _mnist_target(self.task), self.out)


@dataclass(frozen=True)
class TrainReversal:
    """Train a transformer to write a prompt backwards, from rewards alone."""

    out: Path = Path("out/train-reversal")
    """Folder for the results; a run that was stopped goes on from there."""
    settings: Annotated[Settings, FLAT] = field(default_factory=lambda: Settings(steps=1_000, evaluate_every=20))
    task: Annotated[ReversalConfig, FLAT] = field(default_factory=ReversalConfig)

    def __call__(self) -> None:
        share = share_of_this_process()
        task = ReversalTask(self.task, share)
        with joined(share):
            _train(task, self.task, self.settings, 0.01, self.out, share)


@dataclass(frozen=True)
class ParetoReversal:
    """Train every method at every rate on token reversal, and draw quality against cost."""

    out: Path = Path("out/pareto-reversal")
    """Folder for the results; finished runs in it are not run again."""
    study: Annotated[pareto.ParetoConfig, FLAT] = field(
        default_factory=lambda: pareto.ParetoConfig(steps=400, evaluate_every=20, rates=(0.03, 0.1), prices=(0.0,))
    )
    task: Annotated[ReversalConfig, FLAT] = field(default_factory=ReversalConfig)

    def __call__(self) -> None:
        _pareto(ReversalTask(self.task), self.task, self.study, 0.01, self.out)


@dataclass(frozen=True)
class StudyScores:
    """The same rate by delight and by every other score, under two baselines, on MNIST."""

    out: Path = Path("out/study-scores")
    """Folder for the results; finished runs in it are not run again."""
    study: Annotated[score_comparison.ScoresStudy, FLAT] = field(default_factory=score_comparison.ScoresStudy)

    def __call__(self) -> None:
        task = MnistTask(MnistConfig(data=self.study.data))
        with LiveRuns(runs=len(self.study.arms()) * len(score_comparison.BASELINES)) as live:
            records = score_comparison.run(self.study, task, self.out, live.start)
        save_figure(score_comparison.plot(records), self.out, "scores")
        print_scores(score_comparison.table(records))
        print(f"results in {self.out}, the figure in {self.out / 'scores.png'}")


@dataclass(frozen=True)
class StudyBandit:
    """The papers' bandit theory, checked number by number, in about half a minute."""

    out: Path = Path("out/study-bandit")
    """Folder for summary.json and the figures; written when everything is measured."""
    study: Annotated[bandit_theory.BanditStudy, FLAT] = field(default_factory=bandit_theory.BanditStudy)

    def __call__(self) -> None:
        torch.set_num_threads(1)
        with opened(self.out, asdict(self.study)):
            with study_progress() as progress:
                measured = bandit_theory.run(self.study, progress)
            write_json(self.out / "summary.json", measured)
            for name, figure in bandit_theory.plot(measured).items():
                save_figure(figure, self.out, name)
        if measured["slopes"]:
            print_slopes(measured["slopes"])
        print(f"results and six figures in {self.out}")


@dataclass(frozen=True)
class StudyScaling:
    """The longest prompt each method learns to reverse within a budget, each at its best learning rate."""

    out: Path = Path("out/study-scaling")
    """Folder for the results; finished runs in it are not run again."""
    study: Annotated[scaling.ScalingStudy, FLAT] = field(default_factory=scaling.ScalingStudy)

    def __call__(self) -> None:
        study = self.study
        tries = len(study.learning_rates) * len(study.tuning_seeds) + len(study.seeds)
        with LiveRuns(runs=len(study.arms) * len(study.prompt_lengths) * tries) as live:
            rows = scaling.run(study, self.out, live.start)
        save_figure(scaling.plot(rows), self.out, "scaling")
        print_scaling(rows)
        print(f"results in {self.out}, the figure in {self.out / 'scaling.png'}")


@dataclass(frozen=True)
class StudyBudget:
    """One noise budget everywhere, against fixed rates and others that move, each at its best learning rate."""

    out: Path = Path("out/study-budget")
    """Folder for the results; finished runs in it are not run again."""
    study: Annotated[budget.BudgetStudy, FLAT] = field(default_factory=budget.BudgetStudy)

    def __call__(self) -> None:
        with LiveRuns(runs=self.study.most_runs) as live:
            rows = budget.run(self.study, self.out, live.start)
        save_figure(budget_figure.plot(rows), self.out, "budget")
        print_budget(budget.table(rows))
        print(f"results in {self.out}, the figure in {self.out / 'budget.png'}")


@dataclass(frozen=True)
class StudyLanguage:
    """A pre-trained language model learns with TRL's trainer: every gate beside TRL's own, in seconds."""

    out: Path = Path("out/study-language")
    """Folder for the results; finished runs in it are not run again, and one that was stopped goes on."""
    study: Annotated[LanguageStudy, FLAT] = field(default_factory=LanguageStudy)

    def __call__(self) -> None:
        modules = ["trl", *(["reasoning_gym"] if self.study.task == "gym" else [])]
        need("lm", *modules)
        from sparkjoy.lab.studies import language_figure, language_runs  # they import TRL, which takes seconds

        with study_progress() as progress:
            rows = language_runs.run(self.study, self.out, progress)
        target = TASKS[self.study.task].target
        save_figure(language_figure.curves(rows, target), self.out, "language")
        save_figure(language_figure.bars(rows), self.out, "language_seconds")
        print_language(language_runs.table(rows, target), target)
        print(f"results in {self.out}, the figures in language.png and language_seconds.png there")


@dataclass(frozen=True)
class StudyFrictions:
    """Actors that are late, broken, corrupted or lucky: which method stands what, on token reversal."""

    out: Path = Path("out/study-frictions")
    """Folder for the results; finished runs in it are not run again."""
    study: Annotated[frictions.FrictionsStudy, FLAT] = field(default_factory=frictions.FrictionsStudy)

    def __call__(self) -> None:
        with LiveRuns(runs=self.study.runs) as live:
            rows = frictions.run(self.study, self.out, live.start)
        for length in self.study.lengths:
            save_figure(frictions_figure.plot(rows, length), self.out, f"frictions-{length}")
        print_frictions(frictions.table(rows))
        print(f"results in {self.out}, the figures in {self.out / 'frictions-*.png'}")


@dataclass(frozen=True)
class StudyGain:
    """What the gate saves a step as prompts, vocabulary and model grow and backward passes get dearer."""

    out: Path = Path("out/study-gain")
    """Folder for summary.json and the figure; written when everything is measured."""
    study: Annotated[step_gain.StepGainStudy, FLAT] = field(default_factory=step_gain.StepGainStudy)

    def __call__(self) -> None:
        torch.set_num_threads(1)
        with opened(self.out, asdict(self.study)):
            with study_progress() as progress:
                records = step_gain.run(self.study, progress)
            write_json(self.out / "summary.json", {"runs": records})
            save_figure(step_gain.plot(records), self.out, "gain")
        print_gains(records)
        print(f"results in {self.out}, the figure in {self.out / 'gain.png'}")


@dataclass(frozen=True)
class StudyTokens:
    """Gating single tokens against gating whole answers, on token reversal: what is kept, and where it leads."""

    out: Path = Path("out/study-tokens")
    """Folder for records.jsonl, summary.json and the figure; written when everything is measured."""
    study: Annotated[token_gate.TokenGateStudy, FLAT] = field(default_factory=token_gate.TokenGateStudy)

    def __call__(self) -> None:
        torch.set_num_threads(1)
        with opened(self.out, asdict(self.study)):
            with study_progress() as progress:
                records = token_gate.run(self.study, progress)
            write_json_lines(self.out / "records.jsonl", records)
            ends = {(record["arm"], record["seed"]): record for record in records}
            write_json(self.out / "summary.json", {"runs": list(ends.values())})
            save_figure(token_gate.plot(records), self.out, "tokens")
        for (arm, seed), record in ends.items():
            print(f"{arm}, seed {seed}: error {100 * record['error']:.1f}% after {record['step']} steps")
        print(f"results in {self.out}, the figure in {self.out / 'tokens.png'}")


@dataclass(frozen=True)
class StudyScreening:
    """Cheaper screeners than a forward pass, noise on delight, and the gate that stays unbiased; in minutes."""

    out: Path = Path("out/study-screening")
    """Folder for the results; finished runs in it are not run again."""
    study: Annotated[screening.ScreeningStudy, FLAT] = field(default_factory=screening.ScreeningStudy)

    def __call__(self) -> None:
        with LiveRuns(runs=len(screening.arms(self.study))) as live:
            tables = screening.run(self.study, self.out, live.start)
        for name, figure in screening_figures.plot(tables).items():
            save_figure(figure, self.out, name)
        print_screening(tables)
        print(f"results and figures in {self.out}")


@dataclass(frozen=True)
class Bench:
    """Seconds and peak memory of one step: dense, gated, and what else one could do, in one run."""

    out: Path = Path("out/bench")
    """Folder for config.json, summary.json and the figure; summary.json is written after every round."""
    bench: Annotated[bench.BenchConfig, FLAT] = field(default_factory=bench.BenchConfig)

    def __call__(self) -> None:
        need("bench", "transformers", *(["kondo_gate"] if "kondo-gate" in self.bench.arms else []))
        with opened(self.out, asdict(self.bench)):
            with study_progress() as progress:
                result = bench.run(self.bench, self.out, progress)
            save_figure(bench.plot(result), self.out, "speedup")
        print_bench(result)
        print(f"results in {self.out}, the figure in {self.out / 'speedup.png'}")


@dataclass(frozen=True)
class Frontier:
    """What gating saves of a step on your own model and batch, and what it does to the gradient."""

    out: Path = Path("out/frontier")
    """Folder for config.json, answers.jsonl, summary.json and the figure; written when everything is measured."""
    config: Annotated[frontier.FrontierConfig, FLAT] = field(default_factory=frontier.FrontierConfig)

    def __call__(self) -> None:
        need("bench", "transformers")
        with opened(self.out, asdict(self.config)):
            with study_progress() as progress:
                step, found = frontier.run(self.config, progress)
            if step.answers:
                write_json_lines(self.out / "answers.jsonl", step.answers)
            write_json(self.out / "summary.json", frontier.summary(found, self.config.noise))
            save_figure(frontier.plot(found, self.config.noise), self.out, "frontier")
        for one in found.values():
            print(f"{one.table()}\n{one.recommend(self.config.noise).reason}\n")
        print(f"results in {self.out}, the figure in {self.out / 'frontier.png'}")


COMMANDS: dict[tuple[str, str], Callable[..., Any]] = {
    ("train", "mnist"): TrainMnist,
    ("train", "reversal"): TrainReversal,
    ("pareto", "mnist"): ParetoMnist,
    ("pareto", "reversal"): ParetoReversal,
    ("study", "scores"): StudyScores,
    ("study", "screening"): StudyScreening,
    ("study", "bandit"): StudyBandit,
    ("study", "scaling"): StudyScaling,
    ("study", "budget"): StudyBudget,
    ("study", "language"): StudyLanguage,
    ("study", "frictions"): StudyFrictions,
    ("study", "gain"): StudyGain,
    ("study", "tokens"): StudyTokens,
    ("bench", ""): Bench,
    ("frontier", ""): Frontier,
}


def run(arguments: list[str]) -> None:
    """Parse and run one command.

    Raises:
        ValueError: an unknown command, or a flag's value that its config refuses.
    """
    words = [word for word in arguments[:2] if not word.startswith("-")]
    command = COMMANDS.get((words[0] if words else "", words[1] if len(words) > 1 else ""))
    if command is None:
        known = ", ".join(" ".join(names).strip() for names in COMMANDS)
        raise ValueError(f"no command {' '.join(arguments[:2])!r}; there are: {known}. See sparkjoy --help.")
    program, flags = f"sparkjoy {' '.join(words)}", arguments[len(words) :]
    refuse_empty(flags)
    parsed = checked(_parse(command, flags, program))
    if command is not TrainReversal:
        refuse_several_processes(program)
    if words[0] != "train":
        need("cli", "matplotlib")
    parsed()


def _parse(command: Callable[..., Any], flags: list[str], program: str) -> Callable[[], None]:
    """The command with its flags; what tyro would explain in a box becomes one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed: Callable[[], None] = tyro.cli(command, args=flags, prog=program)
            return parsed
    except SystemExit as stop:
        if not stop.code:
            raise
        lines = [line.strip(" │|") for line in said.getvalue().splitlines()]
        words = itertools.dropwhile(_is_rule, lines[1:])  # after the box's own upper edge
        sentence = " ".join(itertools.takewhile(lambda line: not _is_rule(line), words))
        raise ValueError(f"{sentence.rstrip('.')}. See {program} --help.") from None


def _is_rule(line: str) -> bool:
    return "────" in line or "----" in line


def _train(task: Task, task_config: Any, settings: Settings, target: float, out: Path, share: Share = WHOLE) -> None:
    if settings.target_error is None:
        settings = replace(settings, target_error=target)
    target = settings.target_error if settings.target_error is not None else target
    if not share.first:
        train(task, settings, out, asdict(task_config), share=share)
        return
    with LiveRuns(runs=1) as live:
        records = train(task, settings, out, asdict(task_config), live.start(settings.label, settings), share)
    print_runs([{"arm": settings.label, **summary(records, target)}], target)
    print(f"results in {out}")


def _pareto(task: Task, task_config: Any, study: pareto.ParetoConfig, target: float, out: Path) -> None:
    if study.target_error is None:
        study = replace(study, target_error=target)
    target = study.target_error if study.target_error is not None else target
    with LiveRuns(runs=len(study.arms()) * len(study.seeds)) as live:
        records = pareto.run(study, task, out, asdict(task_config), live.start)
    pareto.write_figure(records, out)
    print_runs(pareto.summaries(records, target), target)
    print(f"results in {out}, the figure in {out / 'pareto.png'}")


def _mnist_target(config: MnistConfig) -> float:
    """The error whose first time is reported unless another is asked for."""
    return 0.08 if config.data == "embedded" else 0.05
