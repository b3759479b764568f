"""A checkpoint: sealed, of one kind of run only, and refused whole."""

import copy
import math
import random
from dataclasses import asdict

import pytest
import torch

from sparkjoy_lab.tasks.reversal import ReversalConfig, ReversalTask
from sparkjoy_lab.training.checkpoint import load_checkpoint, save_checkpoint
from sparkjoy_lab.training.loop import Training, train
from sparkjoy_lab.training.settings import Settings
from sparkjoy_lab.training.tracking import write_json

TASK = ReversalConfig(prompt_length=3, prompts=2, answers=4, layers=1, width=8, heads=1, feed_forward=8, held_out=10)
SETTINGS = Settings(steps=8, evaluate_every=2, rate=0.3)
CONFIG = {"task": "reversal", **asdict(TASK), **asdict(SETTINGS)}


@pytest.fixture
def path(tmp_path):
    """A checkpoint in a run's folder."""
    train(ReversalTask(TASK), SETTINGS, tmp_path, asdict(TASK))
    return tmp_path / "checkpoint.pt"


def test_a_checkpoint_is_a_torch_file_with_its_settings(path):
    saved = torch.load(path, weights_only=True)
    assert saved["config"]["rate"] == 0.3
    assert saved["state"]["steps_done"] == load_checkpoint(path)["steps_done"] == 8
    with pytest.raises(ValueError, match=r"made under other settings \(seed\)"):
        load_checkpoint(path, {**CONFIG, "seed": 1})
    assert load_checkpoint(path.with_name("none.pt")) is None


def test_every_changed_bit_and_every_cut_is_refused(path):
    data = path.read_bytes()
    chance = random.Random(0)
    places = [chance.randrange(8 * len(data)) for _ in range(200)]
    edges = [*range(64), *range(8 * len(data) - 8 * 120, 8 * len(data))]  # the archive's header, its end, and the seal
    for place in places + edges:
        changed = bytearray(data)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="not a whole checkpoint"):
            load_checkpoint(path)
    for length in (0, 1, 22, 80, 101, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match="not a whole checkpoint"):
            load_checkpoint(path)
    path.write_bytes(data)
    assert load_checkpoint(path, CONFIG)["steps_done"] == 8


def test_a_torch_file_without_a_seal_is_refused(path):
    torch.save({"version": 1, "config": CONFIG, "state": {}}, path)
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        load_checkpoint(path)


def test_a_checkpoint_that_cannot_be_read_is_not_called_damaged(path, monkeypatch):
    def denied(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "read_bytes", denied)
    with pytest.raises(ValueError, match=r"cannot be read \(Permission denied\); it may well be whole") as refusal:
        load_checkpoint(path)
    assert "remove" not in str(refusal.value)


def set_in(state, keys, value):
    for key in keys[:-1]:
        state = state[key]
    state[keys[-1]] = value


def without(state, keys):
    for key in keys[:-1]:
        state = state[key]
    del state[keys[-1]]


FIRST = ("policy", "head.weight")
MOMENT = ("optimizer", "state", 0, "exp_avg")
CHANGES = {
    "NaN weights": lambda s: s["policy"]["head.weight"].fill_(math.nan),
    "infinite moments": lambda s: s["optimizer"]["state"][0]["exp_avg_sq"].fill_(math.inf),
    "weights of another size": lambda s: set_in(s, FIRST, torch.zeros(3, 9)),
    "weights of another dtype": lambda s: set_in(s, FIRST, s["policy"]["head.weight"].double()),
    "moments of another size": lambda s: set_in(s, MOMENT, torch.zeros(1)),
    "a moment too many": lambda s: set_in(s, ("optimizer", "state", 99), s["optimizer"]["state"][0]),
    "no moment": lambda s: without(s, MOMENT),
    "another learning rate": lambda s: s["optimizer"]["param_groups"][0].update(lr=1.0),
    "a weight too many": lambda s: set_in(s, ("policy", "other"), torch.zeros(1)),
    "a weight missing": lambda s: without(s, FIRST),
    "a field too many": lambda s: set_in(s, ("other",), 1),
    "a field missing": lambda s: without(s, ("tally",)),
    "steps as words": lambda s: set_in(s, ("steps_done",), "8"),
    "steps as a fraction": lambda s: set_in(s, ("steps_done",), 7.5),
    "negative steps": lambda s: set_in(s, ("steps_done",), -2),
    "too many steps": lambda s: set_in(s, ("steps_done",), 10),
    "fewer steps than records": lambda s: set_in(s, ("steps_done",), 3),
    "no records": lambda s: set_in(s, ("records",), []),
    "records of numbers": lambda s: set_in(s, ("records",), [1, 2, 3, 4]),
    "a record without its error": lambda s: without(s, ("records", 1, "error")),
    "a record with an odd error": lambda s: set_in(s, ("records", 1, "error"), "low"),
    "a generator of another size": lambda s: set_in(s, ("generator",), torch.zeros(7, dtype=torch.uint8)),
    "no random state": lambda s: set_in(s, ("torch_random_state",), None),
    "a backward of nothing": lambda s: set_in(s, ("backward",), {}),
    "a backward of words": lambda s: set_in(s, ("backward", "kept_fraction"), "all"),
    "counts of NaN": lambda s: set_in(s, ("tally", "reward_sum"), math.nan),
    "counts of another kind": lambda s: set_in(s, ("tally", "samples"), [1]),
    "rollout FLOPs of words": lambda s: set_in(s, ("rollout_flops",), "many"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_sealed_state_of_another_kind_is_refused(path, name):
    state = load_checkpoint(path)
    CHANGES[name](state)
    save_checkpoint(path, state, CONFIG)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="does not fit this run") as refusal:
        train(ReversalTask(TASK), SETTINGS, path.parent, asdict(TASK))
    assert "\n" not in str(refusal.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("saved", [[], None, {"state": {}}, {"version": 2, "config": {}, "state": {}}])
def test_a_sealed_file_of_another_kind_is_refused(path, saved, monkeypatch):
    kept = torch.save
    monkeypatch.setattr(torch, "save", lambda _, file: kept(saved, file))
    save_checkpoint(path, {}, CONFIG)
    with pytest.raises(ValueError, match="not a whole checkpoint of this version"):
        load_checkpoint(path)


@pytest.mark.parametrize("edited", [False, True])
def test_a_config_gone_or_edited_beside_a_checkpoint_of_other_settings_is_refused(path, edited):
    other = Settings(**{**asdict(SETTINGS), "seed": 1})
    if edited:
        write_json(path.with_name("config.json"), {**CONFIG, "seed": 1})
    else:
        path.with_name("config.json").unlink()
    left = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    with pytest.raises(ValueError, match=r"checkpoint.pt was made under other settings \(seed\)"):
        train(ReversalTask(TASK), other, path.parent, asdict(TASK))
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == left
    if not edited:
        train(ReversalTask(TASK), SETTINGS, path.parent, asdict(TASK))  # the checkpoint says itself what it is of


@pytest.mark.parametrize(
    "settings",
    [
        *({"price_kind": kind, "rate": 0.3} for kind in ("rolling", "budget")),
        *({"method": method} for method in ("dg", "unbiased", "ppo")),
        *({"price": 0.0, "temperature": 0.5}, {"unit": "token"}, {"score_noise": 0.5}),
        *({"method": "unbiased", "noise": 0.5}, {"price_kind": "nucleus"}, {"price_kind": "effective"}),
        *({"screen": "draft"}, {"screen": "stale", "verify": 3}),
    ],
)
def test_the_state_of_every_kind_of_run_fits_a_run_of_its_kind(settings, tmp_path):
    settings = Settings(steps=8, evaluate_every=3, **settings)
    task = ReversalTask(TASK)
    for steps in (0, 5):
        first = Training(task, settings)
        for _ in range(steps):
            first.step()
            if first.steps_done % 3 == 0:
                first.evaluate()
        save_checkpoint(tmp_path / "checkpoint.pt", first.state_dict(), CONFIG)
        second = Training(task, settings)
        second.load_state_dict(copy.deepcopy(load_checkpoint(tmp_path / "checkpoint.pt", CONFIG)))
        assert second.steps_done == steps
