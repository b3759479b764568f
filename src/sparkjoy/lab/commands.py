"""What `sparkjoy` commands there are, and how a line becomes one; needs the extra [cli]."""

from __future__ import annotations

import importlib
from dataclasses import field, make_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import tyro

from sparkjoy.lab.parsing import parse
from sparkjoy.lab.training.flags import checked, need, refuse_empty
from sparkjoy.lab.training.processes import refuse_several_processes

COMMANDS = {
    "train mnist": (
        "train:TrainMnist",
        "train one policy: sparkjoy train mnist --method kondo --rate 0.03 --out out/run",
    ),
    "train reversal": ("train:TrainReversal", "the same on token reversal with a transformer"),
    "pareto mnist": ("pareto:ParetoMnist", "train every method at every rate, and draw quality against cost"),
    "pareto reversal": ("pareto:ParetoReversal", "the same on token reversal"),
    "study scores": ("score_comparison:ScoresStudy", "the same rate by other scores than delight, under two baselines"),
    "study budget": ("budget:BudgetStudy", "one noise budget everywhere, against fixed rates and others that move"),
    "study language": (
        "language:LanguageStudy",
        "a pre-trained language model learns with TRL's trainer, gated and not",
    ),
    "study frictions": (
        "frictions:FrictionsStudy",
        "actors that are late, broken, corrupted or lucky: which method stands what",
    ),
    "study screening": (
        "screening:ScreeningStudy",
        "cheaper screeners than a forward pass, noise on delight, an unbiased gate",
    ),
    "study scaling": ("scaling:ScalingStudy", "the longest prompt each method learns to reverse within a budget"),
    "study gain": ("gain:GainStudy", "what the gate saves a step as problems grow and backward passes get dearer"),
    "study tokens": ("token_gate:TokenGateStudy", "gating single tokens against gating whole answers"),
    "study bandit": ("bandit_theory:BanditStudy", "the papers' bandit theory, checked number by number"),
    "bench": ("bench:Bench", "seconds and peak memory of one step: dense, gated, and what else one could do"),
    "frontier": ("frontier:Frontier", "what gating saves, and costs, on your own model, prompts and reward"),
}
"""Each with its class in `sparkjoy.lab.studies`, imported when it is asked for, and its line of help."""
GROUPS = tuple(dict.fromkeys(name.split()[0] for name in COMMANDS if " " in name))
"""First words that a second one follows."""
JOBS = (
    "Runs trained at once, each in a process of its own with the threads of one run; with more threads than CPUs they "
    "wait for one another. Seconds compare only with 1, where runs follow one another; the other figures are the same."
)


def run(arguments: list[str]) -> None:
    """Parse and run one command.

    Raises:
        ValueError: an unknown command, or a flag's value that its config refuses.
    """
    words = _named(arguments)
    name, flags = " ".join(words), arguments[len(words) :]
    program = f"sparkjoy {name}"
    refuse_empty(flags)
    need("cli", "pandas", *([] if words[0] == "train" else ["matplotlib"]))
    parsed = checked(parse(_with_folder(name), flags, program))
    if name != "train reversal":
        refuse_several_processes(program)
    from sparkjoy.lab.studies.study import Study, run_study

    if isinstance(parsed.asked, Study):
        run_study(parsed.asked, parsed.out, getattr(parsed, "jobs", 1))
    else:
        parsed.asked.start(parsed.out)


def listed(group: str = "") -> list[str]:
    """Names of the commands of a group such as `study`, or of all."""
    return [name for name in COMMANDS if name.split()[0] == group or not group]


def _named(arguments: list[str]) -> list[str]:
    """The one or two words that name the command; a ValueError says which there are, and which may be meant."""
    for count in (1, 2):
        if " ".join(arguments[:count]) in COMMANDS:
            return arguments[:count]
    group = arguments[0] if arguments[0] in GROUPS else ""
    there = f"there are: {', '.join(listed(group))}. See {' '.join(['sparkjoy', *group.split()])} --help."
    asked = " ".join(word for word in arguments[:2] if not word.startswith("-")) or arguments[0]
    if asked == group:
        raise ValueError(f"{group} needs a second word; {there}")
    called = {name.removeprefix(group).strip(): name for name in (*listed(group), *GROUPS)}
    meant = get_close_matches(asked.removeprefix(group).strip(), called, 1, cutoff=0.7)
    raise ValueError(f"no command {asked!r}; " + (f"did you mean {called[meant[0]]!r}?" if meant else there))


def _with_folder(name: str) -> type:
    """A dataclass of the command's own flags, --out, and --jobs where it is made of runs."""
    module, _, of_module = COMMANDS[name][0].partition(":")
    asked = getattr(importlib.import_module(f"sparkjoy.lab.studies.{module}"), of_module)
    longer = ", ".join(f"--{name.replace('_', '-')}" for name in getattr(asked, "extends", ()))
    said = asked.folder + (f" Values may be added at the end of {longer}." if longer else "")
    out = Annotated[Path, tyro.conf.arg(help=said)]
    flags: list[Any] = [("out", out, field(default=Path("out", name.replace(" ", "-"))))]
    if getattr(asked, "trains", False):
        flags.append(("jobs", Annotated[int, tyro.conf.arg(help=JOBS)], field(default=1)))
    flags.append(("asked", Annotated[asked, tyro.conf.arg(name="")], field(default_factory=asked)))
    return make_dataclass("Flags", flags, namespace={"__doc__": asked.__doc__}, frozen=True)
