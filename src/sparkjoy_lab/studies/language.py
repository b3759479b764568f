"""A pre-trained language model learns with TRL's trainer: every gate beside TRL's own, in seconds.

The learning rate is chosen for TRL's own, and every arm takes it. That of one gate is chosen once more, by what it
scores after as many seconds as TRL's own takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparkjoy_lab.studies import language_results
from sparkjoy_lab.studies.language_results import DENSE
from sparkjoy_lab.studies.language_tasks import TASKS
from sparkjoy_lab.studies.study import Rows, Study, Work
from sparkjoy_lab.training.flags import need

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

ARMS: dict[str, dict[str, Any]] = {
    DENSE: {},
    f"{DENSE}, shared": {"share_tokens": True},
    "noise 0.3": {"gate_noise": 0.3},
    "delight 15%": {"gate_rate": 0.15},
    "|advantage| 15%": {"gate_rate": 0.15, "gate_score": "absolute-advantage"},
    "max variance": {"gate_rate": 0.25, "max_variance": True},
    "uniform 15%": {"gate_rate": 0.15, "gate_score": "uniform"},
    "delight 25%": {"gate_rate": 0.25},
    "zero advantages dropped": {"gate_price": 0.0, "gate_score": "absolute-advantage"},
    "noise 1": {"gate_noise": 1.0},
    "positive only": {"gate_price": 0.0},
    "noise 0.3, twice the answers": {"gate_noise": 0.3, "group": 16},
}
"""|advantage|: CPPO's rule (arXiv 2503.22342). Max variance: PODS (arXiv 2504.13818), 2 of 8 answers to a prompt."""
LONGEST = 10
"""Times the steps of a run that one may take which ends by its seconds."""


@dataclass(frozen=True)
class LanguageStudy(Study):
    """A pre-trained language model learns with TRL's trainer: every gate beside TRL's own, in seconds."""

    trains = False  # by TRL's loop, not by ours
    folder = "Folder for the results; finished runs in it are not run again, and one that was stopped goes on."

    task: str = "sums"
    """What is learnt: sums, sentences (without the letter e; partial credit, 40 tokens) or gym (of reasoning-gym)."""
    arms: tuple[str, ...] = tuple(ARMS)
    """What is compared, by name; TRL's own is always among them."""
    share_tokens: bool = False
    """Every arm but TRL's own computes what its rows have in common once."""
    model: str | None = None
    """A causal language model's folder or name on the hub; without it SmolLM2-135M-Instruct."""
    steps: int = 24
    """Optimizer steps of a run."""
    prompts: int = 8
    """Prompts of a step."""
    group: int = 8
    """Answers to each prompt."""
    micro_batch: int = 32
    """Rows of a forward and backward pass."""
    bf16: bool = True
    """Mixed precision, as TRL has it by default; --no-bf16 for float32 throughout."""
    learning_rates: tuple[float, ...] = (1e-5, 2e-5, 5e-6)
    """To choose from, for TRL's own; the likeliest first."""
    tuned: str = "noise 0.3"
    """The gate whose learning rate is chosen once more, at the seconds of TRL's own; "none" for none."""
    tuning_seed: int = 100
    """The seed on which learning rates are chosen."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds that count."""
    held_out: int = 500
    """Problems that are scored and never trained on."""
    evaluate_every: int = 3
    """Steps between two scores."""
    threads: int = 1
    """Threads of torch."""

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"--task {self.task!r}: expected one of {', '.join(TASKS)}.")
        unknown = [name for name in self.arms if name not in ARMS]
        if unknown:
            raise ValueError(f"--arms {unknown[0]!r}: expected some of {'; '.join(ARMS)}.")
        if self.tuned not in (*ARMS, "none") or self.tuned == DENSE:
            raise ValueError(f"--tuned {self.tuned!r}: expected one of {'; '.join([*ARMS][1:])}; or none.")
        for name in ("arms", "learning_rates", "seeds"):
            given = getattr(self, name)
            if not given or len(set(given)) != len(given):
                raise ValueError(f"--{name.replace('_', '-')}: expected at least one, and none twice.")
        for name in ("steps", "prompts", "group", "micro_batch", "held_out", "evaluate_every", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least 1.")
        if not all(rate > 0 for rate in self.learning_rates):
            raise ValueError(f"--learning-rates {min(self.learning_rates)}: expected numbers above 0.")
        if self.group < 2:
            raise ValueError(f"--group {self.group}: expected at least 2; an answer is compared with its group's.")
        if self.prompts * self.group % self.micro_batch:
            raise ValueError(
                f"--micro-batch {self.micro_batch}: expected a divisor of a step's {self.prompts * self.group} answers."
            )
        if self.tuning_seed in self.seeds:
            raise ValueError("--tuning-seed is one of --seeds; the learning rate is chosen on a seed of its own.")

    @property
    def runs(self) -> int:
        """How many there will be."""
        arms = len({DENSE, *self.arms}) + self.tunes
        return len(self.learning_rates) * (1 + self.tunes) + len(self.seeds) * arms

    @property
    def tunes(self) -> bool:
        """Whether a gate's learning rate is chosen too."""
        return self.tuned != "none"

    def run(self, work: Work) -> Rows:
        need("lm", "trl", *(["reasoning_gym"] if self.task == "gym" else []))
        from sparkjoy_lab.studies import language_runs  # it imports TRL, which takes seconds

        return language_runs.run(self, work)

    def summary(self, rows: Rows) -> dict[str, Any]:
        return {"table": language_results.table(rows, TASKS[self.task].target), "steps": rows}

    def tables(self, rows: Rows) -> dict[str, DataFrame]:
        return language_results.tables(rows, TASKS[self.task].target)

    def figures(self, rows: Rows) -> dict[str, Figure]:
        from sparkjoy_lab.studies import language_figure

        target = TASKS[self.task].target
        return {
            "language": language_figure.curves(rows, target),
            "language_seconds": language_figure.bars(language_results.table(rows, target)),
        }
