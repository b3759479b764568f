"""A step visits few modules, never goes back up, waits for the device few times, and does what its diagram says."""

import re
import sys
from pathlib import Path

import pytest
import torch
from engine_cases import ACTIONS, WIDTH, make_case
from torch.utils._python_dispatch import TorchDispatchMode

import sparkjoy as sj
from sparkjoy import checks
from sparkjoy.testing import TinyPolicy
from sparkjoy_lab.drafts import StaleWeights

DIAGRAM = Path(__file__).parents[2] / "docs" / "how_a_step_runs.md"
ROOMS = 5
PASSED_THROUGH = "sparkjoy.processes.ranks"
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
        options = {"draft": sj.Draft(small, verify=options["draft"])}
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

    reach("sparkjoy.step.backward", [])


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


def test_a_step_with_known_log_probs_is_few_calls():
    """The figures of docs/how_a_step_runs.md, which says so to whoever reads the step."""
    policy, batch, advantages, _ = make_case("rows")
    step, calls = sj.GatedBackward(sj.KondoGate(rate=0.3)), []
    known = policy.log_probs(batch).detach()

    def watch(frame, event, _):
        module, code = frame.f_globals.get("__name__", ""), frame.f_code
        written = code.co_filename.endswith(".py") and not code.co_name.startswith("<")  # not a dataclass's __init__
        if event == "call" and module.startswith("sparkjoy.") and module != "sparkjoy.testing" and written:
            calls.append((module, code.co_name))

    for watched in (None, watch):  # the first call imports
        sys.setprofile(watched)
        try:
            step(policy.log_probs, batch, advantages, log_probs=known)
        finally:
            sys.setprofile(None)
    assert len({module for module, _ in calls}) <= 12
    assert len(calls) <= 100


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: numbers it reads, one by one or as a list; and searches of rows."""

    def __init__(self):
        super().__init__()
        self.numbers = self.searches = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.numbers += func.overloadpacket is torch.ops.aten._local_scalar_dense
        self.searches += func.overloadpacket is torch.ops.aten.nonzero
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "gate", "known", "numbers", "searches"),
    [
        ("known on tokens", sj.KondoGate(rate=0.3), True, 4, 1),
        ("screened", sj.KondoGate(rate=0.3), False, 6, 2),
        ("noise budget", sj.UnbiasedGate(noise=0.3), False, 6, 2),
        ("dense", None, False, 2, 0),
    ],
)
def test_the_host_waits_few_times(name, gate, known, numbers, searches, monkeypatch):
    """As on a GPU, where several numbers are read at once: on a CPU, which waits for nothing, one by one."""
    policy, batch, advantages, mask = make_case("ragged tokens")
    given = {"log_probs": policy.log_probs(batch).detach()} if known else {}
    step, waits, read = sj.GatedBackward(gate), Waits(), torch.Tensor.tolist
    step(policy.log_probs, batch, advantages, mask=mask, **given)

    def tolist(tensor):
        waits.numbers += 1
        return read(tensor)

    monkeypatch.setattr(checks, "NO_WAIT", ())
    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    with waits:
        step(policy.log_probs, batch, advantages, mask=mask, **given)
    assert (waits.numbers <= numbers, waits.searches <= searches) == (True, True), (waits.numbers, waits.searches)
