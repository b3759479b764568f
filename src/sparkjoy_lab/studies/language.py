"""A pre-trained language model learns with TRL's trainer: every gate beside TRL's own, in score and in seconds.

The learning rate is chosen for TRL's own, and every arm takes it. Those of some gates are chosen once more, by what
they score after as many seconds as TRL's own with shared tokens takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparkjoy_lab.studies import language_results
from sparkjoy_lab.studies.language_results import DENSE, LORA, SHARED
from sparkjoy_lab.studies.language_tasks import TASKS
from sparkjoy_lab.studies.study import Rows, Study, Work
from sparkjoy_lab.training.flags import need

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

DROPPED = {"gate_price": 0.0, "gate_score": "absolute-advantage"}
ARMS: dict[str, dict[str, Any]] = {
    DENSE: {},
    SHARED: {},
    "zero advantages dropped": DROPPED,
    "noise 0.3": {"gate_noise": 0.3},
    "noise 1": {"gate_noise": 1.0},
    "delight 15%": {"gate_rate": 0.15},
    "max variance": {"gate_rate": 0.25, "max_variance": True},
    "|advantage| 15%": {"gate_rate": 0.15, "gate_score": "absolute-advantage"},
    "uniform 15%": {"gate_rate": 0.15, "gate_score": "uniform"},
    "delight 25%": {"gate_rate": 0.25},
    "positive only": {"gate_price": 0.0},
    "noise 0.3, twice the answers": {"gate_noise": 0.3, "group": 16},
    LORA: {"lora": 16},
    f"{LORA}, noise 0.3": {"lora": 16, "gate_noise": 0.3},
    f"{LORA}, delight 15%": {"lora": 16, "gate_rate": 0.15},
}
"""|advantage|: CPPO's rule (arXiv 2503.22342). Max variance: PODS (arXiv 2504.13818), 2 of 8 answers to a prompt."""
FIRST = tuple(ARMS)[:6]
ON_FEW_SEEDS = tuple(ARMS)[6:9]
"""Arms that are run on the first three seeds alone, unless they are named."""
LORA_ARMS = tuple(arm for arm in ARMS if arm.startswith(f"{LORA},"))
FEW = 3
LONGEST = 10
"""Times the steps of a run that one may take which ends by its seconds."""


def by_seconds(arm: str) -> str:
    """The name of an arm at its own learning rate, which ends after the seconds of TRL's own with shared tokens."""
    return f"{arm}, as many seconds"


@dataclass(frozen=True)
class LanguageStudy(Study):
    """A pre-trained language model learns with TRL's trainer: every gate beside TRL's own, in seconds."""

    trains = False  # by TRL's loop, not by ours
    folder = "Folder for the results; finished runs in it are not run again, and one that was stopped goes on."
    extends = ("arms", "few", "lora", "seeds")

    task: str = "sums"
    """What is learnt: sums, largest (of five numbers), one more (partial credit, 32 tokens), sentences (without the
    letter e; partial credit, 40 tokens) or gym (of reasoning-gym)."""
    arms: tuple[str, ...] = FIRST
    """What is compared on every seed, by name; TRL's own is always among them."""
    few: tuple[str, ...] = ON_FEW_SEEDS
    """What is compared on the first three seeds."""
    lora: tuple[str, ...] = ()
    """Arms of LoRA adapters of rank 16, on the first three seeds; LoRA without a gate is always among them."""
    share_tokens: bool = True
    """Every arm but TRL's own computes what its rows have in common once."""
    model: str | None = None
    """A causal language model's folder or name on the hub; without it SmolLM2-135M-Instruct."""
    steps: int = 60
    """Optimizer steps of a run; in a finished folder more of them train its runs anew."""
    tuning_steps: int = 24
    """Those of the runs that learning rates are chosen by."""
    prompts: int = 8
    """Prompts of a step."""
    group: int = 8
    """Answers to each prompt."""
    micro_batch: int = 32
    """Rows of a forward and backward pass."""
    bf16: bool = True
    """Mixed precision, as TRL has it by default; --no-bf16 for float32 throughout."""
    learning_rates: tuple[float, ...] = (1e-5, 2e-5, 5e-6)
    """To choose from, for TRL's own; the likeliest first. One alone is taken."""
    lora_learning_rates: tuple[float, ...] = (2e-4, 5e-4, 1e-4)
    """To choose from, for LoRA without a gate. One alone is taken."""
    tuned: tuple[str, ...] = ()
    """Gates whose learning rate is chosen once more, at the seconds of TRL's own with shared tokens."""
    tuning_seed: int = 100
    """The seed on which learning rates are chosen."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds that count."""
    held_out: int = 500
    """Problems that are scored and never trained on."""
    evaluate_every: int = 10
    """Steps between two scores."""
    threads: int = 1
    """Threads of torch."""

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"--task {self.task!r}: expected one of {', '.join(TASKS)}.")
        for name, known in (("arms", ARMS), ("few", ARMS), ("tuned", [*ARMS][2:]), ("lora", [LORA, *LORA_ARMS])):
            unknown = [arm for arm in getattr(self, name) if arm not in known]
            if unknown:
                raise ValueError(f"--{name} {unknown[0]!r}: expected some of {'; '.join(known)}.")
        for name in ("arms", "learning_rates", "lora_learning_rates", "seeds", "few", "lora", "tuned"):
            given, needed = getattr(self, name), name not in ("few", "lora", "tuned")
            if (needed and not given) or len(set(given)) != len(given):
                raise ValueError(f"--{name.replace('_', '-')}: expected {'at least one, and ' * needed}none twice.")
        for name in (
            "steps",
            "tuning_steps",
            "prompts",
            "group",
            "micro_batch",
            "held_out",
            "evaluate_every",
            "threads",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least 1.")
        for name in ("learning_rates", "lora_learning_rates"):
            if not all(rate > 0 for rate in getattr(self, name)):
                raise ValueError(f"--{name.replace('_', '-')} {min(getattr(self, name))}: expected numbers above 0.")
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
        chosen_from = [self.learning_rates] * (1 + len(self.tuned)) + [self.lora_learning_rates] * bool(self.lora)
        tuning = sum(len(rates) for rates in chosen_from if len(rates) > 1)
        return tuning + sum(len(self.seeds_of(arm)) for arm in self.compared)

    @property
    def compared(self) -> list[str]:
        """All arms, TRL's own first; those of adapters, and those by seconds, last."""
        of_lora = [LORA, *self.lora] if self.lora else []
        return list(dict.fromkeys([DENSE, *self.arms, *self.few, *of_lora, *map(by_seconds, self.tuned)]))

    def seeds_of(self, arm: str) -> tuple[int, ...]:
        """The seeds that an arm is run on."""
        return self.seeds if arm in (DENSE, *self.arms, *map(by_seconds, self.tuned)) else self.seeds[:FEW]

    def config(self) -> dict[str, Any]:
        return {name: value for name, value in super().config().items() if name != "steps"}

    def run(self, work: Work) -> Rows:
        need("lm", "trl", *(["reasoning_gym"] if self.task == "gym" else []))
        from sparkjoy_lab.studies import language_runs  # it imports TRL, which takes seconds

        return language_runs.run(self, work)

    def summary(self, rows: Rows) -> dict[str, Any]:
        return {"table": language_results.table(rows), "steps": rows}

    def tables(self, rows: Rows) -> dict[str, DataFrame]:
        return language_results.tables(rows)

    def figures(self, rows: Rows) -> dict[str, Figure]:
        from sparkjoy_lab.studies import language_figure

        found = language_results.table(rows)
        return {
            "language": language_figure.curves(rows, found[0]["target"]),
            "language_seconds": language_figure.bars(found),
        }
