"""What comes of a valid call of any public name where something wrong stands in the place of an argument.

python tests/hostile_calls.py 30000    # how many of so many calls end in an unclear error, and which
"""

from __future__ import annotations

import random
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hostile_cases
import hostile_engine_cases
import torch
from hostile_cases import POLICY, Case
from hostile_values import hostile_values

import sparkjoy as sj
from sparkjoy import testing

SOURCE = str(Path(sj.__file__).parent)
SAID_AS = {
    "draft_score": "the score|score is",
    "log_prob_fn": "log-prob function|score",
    "output_layer": "output layer|weight",
    "hidden": "hidden",
    "known": "log_probs|mask",
    "value": "price",
    "keys": "keys|key",
    "size": "keys",
    "source": "log-prob function",
    "rows": "log-prob function|actions|cache's keys",
    "batch": "batch|log-prob function",
    "seen": "log_probs",
}
"""How messages call an argument where they do not by its name."""

GIVEN = (hostile_cases.__file__, hostile_engine_cases.__file__, testing.__file__)
"""Where the functions that calls are given are written."""


def cases() -> dict[str, Case]:
    """By name."""
    found = {**hostile_cases.formula_cases(), **hostile_engine_cases.engine_cases()}
    return {**found, **hostile_engine_cases.state_cases()}


@dataclass(frozen=True)
class Outcome:
    """What came of a call.

    Args:
        case: its name.
        changed: arguments, and what stood there.
        kind: "fine"; "clear", a ValueError or TypeError of ours that names an argument that was changed; "own", an
            error in a function that the caller gave, called as it said it would be; else "unclear".
        error: what it raised.
        where: file and line that raised.
        touched: whether it changed `.grad` although it failed, and did not say so, or said so and had not.
    """

    case: str
    changed: dict[str, str]
    kind: str
    error: str
    where: str
    touched: bool


def outcome(name: str, case: Case, changed: dict[str, tuple[str, Any]]) -> Outcome:
    """Call, with some arguments changed, and see."""
    arguments = {**case.valid(), **{argument: value for argument, (_, value) in changed.items()}}
    before = [torch.full_like(parameter, 3.0) for parameter in POLICY.parameters()]
    for parameter, gradient in zip(POLICY.parameters(), before, strict=True):
        parameter.grad = gradient.clone()
    labels = {argument: label for argument, (label, _) in changed.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.call(**arguments)
        return Outcome(name, labels, "fine", "", "", False)
    except Exception as error:
        now = [parameter.grad for parameter in POLICY.parameters()]
        changed_grad = any(grad is None or not torch.equal(grad, old) for grad, old in zip(now, before, strict=True))
        touched = changed_grad != (".grad: zero it" in "".join([str(error), *getattr(error, "__notes__", [])]))
        frames = traceback.extract_tb(error.__traceback__)
        frame, text = frames[-1], str(error)
        said = any(
            word in text for argument in changed for word in (argument, *SAID_AS.get(argument, "").split("|")) if word
        )
        clear = isinstance(error, ValueError | TypeError) and frame.filename.startswith(SOURCE) and said
        kind = "clear" if clear else "own" if raised_by_callers_function(frames) else "unclear"
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        return Outcome(name, labels, kind, f"{type(error).__name__}: {text[:300]}", where, touched)


def raised_by_callers_function(frames: traceback.StackSummary) -> bool:
    """Whether it was in a function that we were given, of which these here and modules are."""
    begun = False
    for frame in frames:
        ours = frame.filename.startswith(SOURCE) and not frame.filename.endswith(("testing.py", "transformer.py"))
        if begun and (frame.filename in GIVEN or "torch/nn/modules" in frame.filename):
            return True
        begun = begun or ours
    return False


def calls(seed: int, count: int) -> Iterator[tuple[str, Case, dict[str, tuple[str, Any]]]]:
    """So many calls with one argument changed, or, in one of four, two: of each case as many."""
    draw, table = random.Random(seed), cases()
    names = sorted(table)
    for number in range(count):
        name = names[number % len(names)]
        valid = table[name].valid()
        chosen = draw.sample(sorted(valid), min(len(valid), 1 + (draw.random() < 0.25)))
        changed = {}
        for argument in chosen:
            values = hostile_values(argument, valid[argument])
            label = draw.choice(sorted(values))
            changed[argument] = (label, values[label])
        yield name, table[name], changed


def main(count: int, seed: int = 0, accepted: bool = False) -> None:
    """Make the calls, and print what came of them; `accepted` ones too."""
    kinds: Counter[str] = Counter()
    found: dict[tuple[str, str], list[Outcome]] = {}
    touched = []
    for call in calls(seed, count):
        seen = outcome(*call)
        kinds[seen.kind] += 1
        if seen.touched:
            touched.append(seen)
        if accepted and seen.kind == "fine":
            print(f"accepted: {seen.case} {seen.changed}")
        if seen.kind == "unclear":
            found.setdefault((seen.where, seen.error.split(":")[0]), []).append(seen)
    for (where, _), group in sorted(found.items(), key=lambda pair: -len(pair[1])):
        example = group[0]
        print(f"{len(group):6} {where}: {example.case} {example.changed}: {example.error[:160]}")
    for example in touched[:20]:
        print(f".grad touched: {example}")
    print(f"{count} calls, seed {seed}: {dict(kinds)}, unclear {kinds['unclear'] / count:.2%}; touched {len(touched)}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0, "accepted" in sys.argv)
