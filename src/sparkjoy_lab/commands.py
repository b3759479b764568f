"""How a line becomes a command that runs; needs the extra [cli]."""

from __future__ import annotations

import importlib
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from sparkjoy_lab.command_names import COMMANDS, named
from sparkjoy_lab.parsing import parse
from sparkjoy_lab.training.flags import checked, named_once, need
from sparkjoy_lab.training.processes import refuse_several_processes

JOBS = (
    "Runs trained at once, each in a process of its own with the threads of one run; with more threads than CPUs they "
    "wait for one another. Seconds compare only with 1, where runs follow one another; the other figures are the same."
)


def run(arguments: list[str]) -> None:
    """Parse and run one command.

    Raises:
        ValueError: an unknown command, or a flag's value that its config refuses.
    """
    words = named(arguments)
    name, flags = " ".join(words), arguments[len(words) :]
    program = f"sparkjoy {name}"
    given = named_once(flags)
    need("cli", "pandas", *([] if words[0] == "train" else ["matplotlib"]))
    parsed = checked(parse(_with_folder(name), flags, program), given)
    if name != "train reversal":
        refuse_several_processes(program)
    from sparkjoy_lab.studies.study import Study, run_study

    if isinstance(parsed.asked, Study):
        run_study(parsed.asked, parsed.out, getattr(parsed, "jobs", 1))
    else:
        parsed.asked.start(parsed.out)


def _with_folder(name: str) -> type:
    """A dataclass of the command's own flags, --out, and --jobs where it is made of runs."""
    module, _, of_module = COMMANDS[name][0].partition(":")
    asked = getattr(importlib.import_module(f"sparkjoy_lab.studies.{module}"), of_module)
    longer = ", ".join(f"--{name.replace('_', '-')}" for name in getattr(asked, "extends", ()))
    said = asked.folder + (f" Values may be added at the end of {longer}." if longer else "")
    out = Annotated[Path, tyro.conf.arg(help=said)]
    flags: list[Any] = [("out", out, field(default=Path("out", name.replace(" ", "-"))))]
    if getattr(asked, "trains", False):
        flags.append(("jobs", Annotated[int, tyro.conf.arg(help=JOBS)], field(default=1)))
    flags.append(("asked", Annotated[asked, tyro.conf.arg(name="")], field(default_factory=asked)))
    return make_dataclass("Flags", flags, namespace={"__doc__": asked.__doc__}, frozen=True)
