"""A run with comparisons: what its records say, that it is the run without them, and that it goes on to the bit."""

import copy

import pytest
import torch
from command_line import sparkjoy

from sparkjoy_lab.tasks.mnist import MnistConfig, MnistTask
from sparkjoy_lab.training.loop import Training
from sparkjoy_lab.training.settings import Settings


def stepped(training, count):
    for _ in range(count):
        training.step()
    return training


def comparable(record):
    return {key: value for key, value in record.items() if key not in ("seconds", "comparison")}


def test_a_compared_run_is_the_run_without():
    task = MnistTask(MnistConfig())
    plain, compared = (
        stepped(Training(task, Settings(method="unbiased", compare_every=every)), 6) for every in (None, 2)
    )
    for one, other in zip(plain.policy.parameters(), compared.policy.parameters(), strict=True):
        assert torch.equal(one, other)
    without, record = plain.evaluate(), compared.evaluate()
    assert comparable(without) == comparable(record)
    assert without["comparison"] is None
    found = record["comparison"]
    assert (found["compared"], found["backward_samples"]) == (3, 300)
    assert 0.5 < found["cosine"] < 1
    stepped(compared, 1)  # no comparison since the last record
    assert compared.evaluate()["comparison"]["cosine"] is None


def test_a_resumed_run_compares_as_the_unbroken_one():
    task, settings = MnistTask(MnistConfig()), Settings(rate=0.1, compare_every=1, steps=40, evaluate_every=22)
    unbroken = stepped(Training(task, settings), 15)
    resumed = Training(task, settings)
    resumed.load_state_dict(copy.deepcopy(unbroken.state_dict()))
    records = [stepped(training, 7).evaluate()["comparison"] for training in (unbroken, resumed)]
    assert {**records[0], "seconds": 0} == {**records[1], "seconds": 0}


@pytest.mark.parametrize("options", [("--method", "pg"), ("--screen", "stale"), ("--unit", "token")])
def test_where_nothing_can_be_compared(options, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    status, said = sparkjoy(monkeypatch, capsys, "train", "mnist", "--compare-every", "5", *options, "--out", out)
    assert status == 2
    assert "--compare-every 5: goes with a gate of whole samples" in said
    assert not out.exists()
