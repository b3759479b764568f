"""A step visits few rooms, never goes back up, and does what the diagram in docs/how_a_step_runs.md says."""

import re
import sys
from pathlib import Path

import pytest
import torch
from engine_cases import ACTIONS, WIDTH, make_case

import sparkjoy as sj
from sparkjoy.drafts import Audit
from sparkjoy.testing import TinyPolicy
from sparkjoy_lab.drafts import StaleWeights

DIAGRAM = Path(__file__).parents[2] / "docs" / "how_a_step_runs.md"
ROOMS = 8
PASSED_THROUGH = "sparkjoy.engine.processes.ranks"
"""A process that is alone does at once what it is handed."""
KNOWN = {"log_probs": True}
STEPS = {
    "known": (sj.KondoGate(rate=0.3), {}, KNOWN),
    "signs": (sj.KondoGate(price=0), {}, {}),
    "screen": (sj.KondoGate(rate=0.3), {"micro_batch_size": 3}, {}),
    "dense": (sj.KondoGate(rate=0.8), {}, {}),
    "everything": (None, {}, {}),
    "noise": (sj.UnbiasedGate(noise=0.3), {}, {}),
    "noise, known": (sj.UnbiasedGate(noise=0.3), {}, KNOWN),
    "draft": (sj.KondoGate(rate=0.3), {"draft": 4}, {}),
    "draft decides": (sj.KondoGate(rate=0.3), {"draft": None}, {}),
}


def calls_of(name):
    """(caller, callee, function) of sparkjoy's modules, while one step runs."""
    policy, batch, advantages, _ = make_case("rows")
    gate, options, given = STEPS[name]
    if "draft" in options:
        small = StaleWeights(TinyPolicy(WIDTH, ACTIONS, seed=3, dtype=torch.float64), every=3)
        options = {"draft": sj.Draft(small, verify=options["draft"], audit=Audit(every=1, floor=0))}
    given = {"log_probs": policy.log_probs(batch).detach()} if given else {}
    step = sj.GatedBackward(gate, **options)
    found = set()

    def watch(frame, event, _):
        caller = frame.f_back
        while caller is not None and caller.f_globals.get("__name__") == PASSED_THROUGH:
            caller = caller.f_back
        makes_data = frame.f_code.co_name in ("__init__", "__post_init__")
        if event == "call" and caller is not None and not makes_data:
            pair = caller.f_globals.get("__name__", ""), frame.f_globals.get("__name__", "")
            if pair[0] != pair[1] and all(module.startswith("sparkjoy.") for module in pair):
                found.add((*pair, frame.f_code.co_name))

    sys.setprofile(watch)
    try:
        step(policy.log_probs, batch, advantages, **given)
    finally:
        sys.setprofile(None)
    return {call for call in found if "sparkjoy.testing" not in call}  # the user's own function


def drawn():
    """The rooms of the diagram, in their order, and its arrows."""
    text = DIAGRAM.read_text()
    diagram = text[text.index("sequenceDiagram") :].split("```", 1)[0]
    return re.findall(r"participant (\w+)", diagram), set(re.findall(r"(\w+)->>(\w+): (\w+)", diagram))


@pytest.mark.parametrize("name", STEPS)
def test_no_module_calls_back_up(name):
    below = {}
    for caller, callee, _ in calls_of(name):
        below.setdefault(caller, set()).add(callee)

    def reach(module, path):
        assert module not in path, " -> ".join([*path, module])
        for following in below.get(module, ()):
            reach(following, [*path, module])

    reach("sparkjoy.engine.backward", [])


def test_the_diagram_is_what_runs():
    rooms, arrows = drawn()
    assert len(rooms) <= ROOMS
    named = {(callee, function) for _, callee, function in arrows}
    ran = {
        (caller.rpartition(".")[2], callee.rpartition(".")[2], function)
        for name in STEPS
        for caller, callee, function in calls_of(name)
    }
    between = {(caller, callee, function) for caller, callee, function in ran if {caller, callee} <= set(rooms)}
    assert all(rooms.index(caller) < rooms.index(callee) for caller, callee, _ in between)
    assert {call for call in between if call[1:] in named} == arrows
