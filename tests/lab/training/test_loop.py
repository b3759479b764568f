import json
import subprocess
import sys
from dataclasses import asdict

import kills
import pytest
import torch

from sparkjoy.gates import KondoGate
from sparkjoy.scores import sequence_delight
from sparkjoy.step.backward import GatedBackward
from sparkjoy_lab.tasks.mnist import MnistConfig, MnistTask
from sparkjoy_lab.tasks.reversal import ReversalConfig, ReversalTask
from sparkjoy_lab.training import loop
from sparkjoy_lab.training.checkpoint import load_checkpoint
from sparkjoy_lab.training.loop import Training, summary, train
from sparkjoy_lab.training.settings import Settings

CONFIG = MnistConfig()


@pytest.fixture(scope="module")
def task():
    return MnistTask(CONFIG)


def without_seconds(records):
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def run(task, out, **settings):
    return train(task, Settings(**{"steps": 60, "evaluate_every": 20, **settings}), out, asdict(CONFIG))


def test_records_count_what_ran(task, tmp_path):
    records = run(task, tmp_path, rate=0.03)
    assert [record["step"] for record in records] == [20, 40, 60]
    last = records[-1]
    assert (last["task"], last["method"], last["rate"], last["seed"]) == ("mnist", "kondo", 0.03, 0)
    # 100 images a step, sampled with one forward pass; 3 of them go forward again, and back.
    assert (last["samples"], last["kept"], last["backward_samples"]) == (6000, 180, 180)
    assert last["forward_samples"] == 6000 + 180
    assert last["forward_tokens"] == last["forward_samples"]
    products = 784 * 100 + 100 * 100 + 100 * 10
    assert last["forward_flops"] == 2 * products * last["forward_samples"]
    assert last["backward_flops"] == (4 * products - 2 * 784 * 100) * 180
    assert 0 < last["error"] < 1
    assert last["price"] > 0
    assert set(last["seconds"]) == {"sample", "screen", "backward", "optimizer", "total"}
    parts = sum(value for phase, value in last["seconds"].items() if phase != "total")
    assert 0 < parts <= last["seconds"]["total"]
    on_disk = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert on_disk == records
    assert not list(tmp_path.glob(".tmp*"))


@pytest.mark.parametrize("method", ["pg", "dg"])
def test_dense_methods_differentiate_the_forward_pass_that_sampled(task, tmp_path, method):
    last = run(task, tmp_path, method=method)[-1]
    assert (last["kept"], last["forward_samples"], last["backward_samples"]) == (6000, 6000, 6000)
    assert last["price"] is None
    two_passes = run(task, tmp_path / "divided", method=method, micro_batch_size=50)[-1]
    assert two_passes["forward_samples"] == 12_000


def test_a_seed_reproduces_a_run_and_another_does_not(task, tmp_path):
    first, again, other = (run(task, tmp_path / str(i), seed=seed) for i, seed in enumerate((0, 0, 1)))
    assert without_seconds(first) == without_seconds(again)
    assert without_seconds(first) != without_seconds(other)


def test_until_error_stops_and_target_error_only_reports(task, tmp_path):
    stopped = run(task, tmp_path / "until", steps=300, method="dg", until_error=0.5)
    assert stopped[-1]["error"] <= 0.5
    assert len(stopped) < 15
    assert all(record["error"] > 0.5 for record in stopped[:-1])
    whole = run(task, tmp_path / "target", steps=300, method="dg", target_error=0.5)
    assert len(whole) == 15
    reached = json.loads((tmp_path / "target" / "summary.json").read_text())["runs"][0]["to_target"]
    assert reached["step"] == stopped[-1]["step"]
    assert reached["backward_samples"] == 100 * reached["step"]
    assert summary(whole, 0.0)["to_target"] is None


def test_an_interrupted_run_goes_on_to_the_same_end(task, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    whole = run(task, tmp_path / "whole", temperature=0.5, price=0.0)

    class InterruptionError(Exception):
        pass

    def interrupt(step, record):
        if step == 50:
            raise InterruptionError

    settings = Settings(steps=60, evaluate_every=20, temperature=0.5, price=0.0)
    with pytest.raises(InterruptionError):
        train(task, settings, tmp_path / "broken", asdict(CONFIG), interrupt)
    assert load_checkpoint(tmp_path / "broken" / "checkpoint.pt")["steps_done"] == 40
    resumed = train(task, settings, tmp_path / "broken", asdict(CONFIG))
    assert without_seconds(resumed) == without_seconds(whole)
    states = [load_checkpoint(tmp_path / name / "checkpoint.pt")["policy"] for name in ("whole", "broken")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_finished_run_is_not_run_again(task, tmp_path):
    first = run(task, tmp_path)
    stamp = (tmp_path / "checkpoint.pt").stat().st_mtime_ns
    assert run(task, tmp_path) == first
    assert (tmp_path / "checkpoint.pt").stat().st_mtime_ns == stamp


def test_other_settings_in_the_same_folder_are_refused(task, tmp_path):
    run(task, tmp_path)
    with pytest.raises(ValueError, match=r"other settings \(rate, seed\)"):
        run(task, tmp_path, rate=0.5, seed=1)


def test_a_corrupt_checkpoint_is_named(task, tmp_path):
    run(task, tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        run(task, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate": 1.5}, "rate is 1.5"),
        ({"method": "dg", "rate": 0.1}, "keeps every sample"),
        ({"steps": 0}, "--steps 0"),
        ({"target_error": 5}, "a fraction"),
        ({"learning_rate": 0}, "--learning-rate"),
        ({"score": "additive", "alpha": 2}, "alpha is 2"),
        ({"temperature": -1}, "temperature"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(**settings)


@pytest.mark.slow
def test_killed_runs_go_on_to_the_same_records_and_weights(tmp_path):
    command = [sys.executable, kills.__file__, "--kills", "4", "--seed", "1", "--out", tmp_path / "kills.json"]
    subprocess.run(command, check=True, timeout=600)
    for task in json.loads((tmp_path / "kills.json").read_text())["tasks"].values():
        assert (sum(task["kills"].values()), task["failures"]) == (2, [])


def test_a_run_that_went_on_otherwise_is_told_from_one_that_did_not(task, tmp_path):
    for name, changes in (("one", {}), ("again", {}), ("other", {"seed": 1})):
        run(task, tmp_path / name, **changes)
    one, again, other = (kills.result(tmp_path / name) for name in ("one", "again", "other"))
    assert kills.differences(again, one) == []
    assert any(line.startswith("result.checkpoint.policy") for line in kills.differences(other, one))
    assert any(line.startswith("result.records") for line in kills.differences(other, one))


def test_ppo_updates_each_batch_several_times_and_counts_them(task, tmp_path):
    last = run(task, tmp_path, method="ppo", epochs=3)[-1]
    assert (last["samples"], last["backward_samples"], last["forward_samples"]) == (6000, 18_000, 24_000)


@pytest.mark.parametrize(
    "settings", [{"method": "grpo"}, {"method": "pmpo"}, {"rate": 0.03}, {"rate": 0.03, "unit": "token"}]
)
def test_every_method_trains_on_reversal(tmp_path, settings):
    config = ReversalConfig(prompt_length=4)
    records = train(ReversalTask(config), Settings(steps=20, evaluate_every=10, **settings), tmp_path, asdict(config))
    last = records[-1]
    assert (last["task"], last["samples"]) == ("reversal", 2000)
    if settings.get("rate") is None:
        assert last["backward_tokens"] == 8000
    else:
        assert 0 < last["backward_tokens"] < 8000


def test_free_and_exact_screening_keep_the_same_answers():
    task = ReversalTask(ReversalConfig(prompt_length=6, vocab_size=3))
    torch.manual_seed(0)
    policy, generator = task.policy(), torch.Generator().manual_seed(0)
    for rate in (0.03, 0.1, 0.5):
        rollout = task.rollout(policy, generator, graph=False)
        step = GatedBackward(KondoGate(rate=rate))
        free = step(policy.log_probs, rollout.batch, rollout.advantages, log_probs=rollout.log_probs)
        exact = step(policy.log_probs, rollout.batch, rollout.advantages)
        assert free.screened_rows == 0 < exact.screened_rows <= 100
        margin = (sequence_delight(rollout.advantages, rollout.log_probs) - free.decision.price).abs()
        differ = free.decision.keep != exact.decision.keep
        assert (margin[differ] < 1e-4).all()


@pytest.mark.parametrize(("method", "warned"), [({"price": 0.0}, True), ({"method": "unbiased"}, False)])
def test_a_class_that_is_never_named_is_warned_of_where_the_gate_keeps_successes_only(
    method, warned, task, monkeypatch, recwarn
):
    monkeypatch.setattr(loop, "PATIENCE", 200)
    training = Training(task, Settings(steps=60, evaluate_every=60, **method))
    with torch.no_grad():
        training.policy.layers[-1].bias[8] = -30.0
    for _ in range(60):
        training.step()
    told = [str(warning.message) for warning in recwarn]
    assert training.evaluate()["lost"] == ([8] if warned else [])
    assert [("8" in words.partition("(")[2], "noise budget" in words) for words in told] == [(True, True)] * warned
    resumed = Training(task, Settings(steps=60, evaluate_every=60, **method))
    resumed.load_state_dict(training.state_dict())
    assert resumed.coverage.state_dict() == training.coverage.state_dict()
