"""SIGTERM and Ctrl-C end a run after the step it is at, and it goes on from there."""

import os
import signal
from dataclasses import asdict

import pytest
import torch

from sparkjoy_lab import parsing
from sparkjoy_lab.tasks.reversal import ReversalConfig, ReversalTask
from sparkjoy_lab.training.checkpoint import load_checkpoint
from sparkjoy_lab.training.loop import train
from sparkjoy_lab.training.settings import Settings
from sparkjoy_lab.training.stopping import Stopping, Terminated, end, ending_on_sigterm

TASK = ReversalConfig(prompt_length=3, prompts=2, answers=4, layers=1, width=8, heads=1, feed_forward=8, held_out=10)
SETTINGS = Settings(steps=12, evaluate_every=4, price=0.0, temperature=0.5)


def run(out, signals=(), at=6):
    def on_step(step, record):
        for number in signals if step == at else ():
            os.kill(os.getpid(), number)

    return train(ReversalTask(TASK), SETTINGS, out, asdict(TASK), on_step)


def without_seconds(records):
    return [{**record, "seconds": None} for record in records]


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
@pytest.mark.parametrize("at", [1, 6, 8])
def test_a_signal_leaves_a_checkpoint_that_ends_as_an_unbroken_run(tmp_path, number, raised, at):
    whole = run(tmp_path / "whole")
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(raised):
        run(tmp_path / "broken", [number], at)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert load_checkpoint(tmp_path / "broken" / "checkpoint.pt")["steps_done"] == at + 1
    assert without_seconds(run(tmp_path / "broken")) == without_seconds(whole)
    weights = [load_checkpoint(tmp_path / name / "checkpoint.pt")["policy"] for name in ("whole", "broken")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_signal_in_the_last_step_ends_what_would_come_after(tmp_path):
    with pytest.raises(Terminated):
        run(tmp_path, [signal.SIGTERM], 12)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json", "records.jsonl", "summary.json", "checkpoint.pt",
    }  # fmt: skip


def test_a_second_signal_ends_it_where_it_is(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, [signal.SIGTERM, signal.SIGINT])
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stopping() as stopping:
            os.kill(os.getpid(), signal.SIGINT)
        assert stopping.asked is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_sigterm_ends_with_128_and_its_number_and_only_inside():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated) as stop, ending_on_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_while_flags_are_read_is_no_wrong_flag(monkeypatch):
    monkeypatch.setattr(parsing.tyro, "cli", lambda *_, **__: end(signal.SIGTERM))
    with pytest.raises(Terminated):
        parsing.parse(object, [], "sparkjoy train mnist")
