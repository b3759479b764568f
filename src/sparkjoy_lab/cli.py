"""The `sparkjoy` command: train, compare, study."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext

from sparkjoy_lab.command_names import COMMANDS, GROUPS, listed
from sparkjoy_lab.output import lasting_output, warnings_in_a_line
from sparkjoy_lab.training.stopping import Terminated, ending_on_sigterm, leaving_on_sigint

HELP = """usage: sparkjoy {usage} [flags]

{commands}

Each takes --help. Results are a folder: config.json, records.jsonl, summary.json and figures. train, pareto, study
scores, budget, frictions, screening and scaling go on from the last checkpoint when started again with the same
--out. Those but train may be given more arms, seeds and the like after those they had, and train only the new runs."""

NO_MEMORY = ("allocate memory", "std::bad_alloc", "out of memory", "calculation overflowed", "multiplication overflow")
"""What torch says of sizes that are beyond memory, or beyond numbers."""


def main() -> None:
    """Run one command; exit status 2 and one line for what the user got wrong or the machine could not do."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's, which its shell has too, is of no use here, and may be missing
    with lasting_output(), warnings_in_a_line():
        try:
            with leaving_on_sigint():
                from sparkjoy_lab.training.memory import within_machine_memory  # torch, which takes a second
            with within_machine_memory():
                _run(sys.argv[1:])
        except (ValueError, OSError, ModuleNotFoundError, MemoryError, RuntimeError) as error:
            line = _line(error)
            if line is None:
                raise
            _say(line)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print("sparkjoy: interrupted; finished work is in --out", file=sys.stderr)
            raise SystemExit(130) from None
        except Terminated:
            print("sparkjoy: terminated; finished work is in --out", file=sys.stderr)
            raise
    if os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # all is written; an interpreter that shuts down around gloo's threads aborts now and then


def _run(arguments: list[str]) -> None:
    group = arguments[0] if arguments and arguments[0] in GROUPS else ""
    if not arguments or arguments[bool(group) :][:1] in (["-h"], ["--help"]):
        lines = (f"  sparkjoy {name:<15}  {COMMANDS[name][1]}" for name in listed(group))
        print(HELP.format(usage=f"{group} NAME" if group else "COMMAND", commands="\n".join(lines)))
        return
    if arguments == ["--version"]:
        from sparkjoy import __version__

        print(f"sparkjoy {__version__}")
        return
    with leaving_on_sigint():
        from sparkjoy_lab import commands

    alone = os.environ.get("WORLD_SIZE", "1") == "1"  # torchrun has its own ways to end its processes
    with ending_on_sigterm() if alone else nullcontext():
        commands.run(arguments)


def _say(line: str) -> None:
    """Write a line to stderr: once, whatever number of processes has come to it."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        print(f"sparkjoy: {line}", file=sys.stderr)
    else:
        from sparkjoy_lab.training.processes import say_once

        say_once(line)


def _line(error: Exception) -> str | None:
    """What went wrong, in one line; None for what is nobody's fault but the program's."""
    said = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError):
        return f'{str(error.name).partition(".")[0]} is missing; the command line needs: pip install "sparkjoy[cli]"'
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(word in said for word in NO_MEMORY)):
        return "this takes more memory than there is; give smaller sizes."
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}."
    return None if isinstance(error, RuntimeError) else said


if __name__ == "__main__":
    main()
