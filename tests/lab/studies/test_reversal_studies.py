import json

import pytest

from sparkjoy_lab.studies import token_gate
from sparkjoy_lab.studies.gain import GainStudy
from sparkjoy_lab.studies.scaling import ScalingStudy
from sparkjoy_lab.studies.study import run_study
from sparkjoy_lab.studies.token_gate import TokenGateStudy


@pytest.mark.slow
def test_scaling_tunes_runs_and_stops_where_a_method_fails(tmp_path):
    study = ScalingStudy(
        prompt_lengths=(2, 8), arms=("dg", "uniform 3%"), learning_rates=(1e-3, 3e-3), seeds=(0,), answers=4000
    )
    rows = run_study(study, tmp_path)
    assert [(row["arm"], row["prompt_length"]) for row in rows][:2] == [("dg", 2), ("uniform 3%", 2)]
    solved = rows[0]
    assert solved["error"] <= 0.01
    assert solved["backward_tokens"] == 2 * solved["answers"] > 0
    failed = [row for row in rows if row["answers"] is None]
    assert failed  # rows at random do not solve eight tokens in 40 steps
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["runs"] == rows
    assert max(row["prompt_length"] for row in summary["longest"] if row["arm"] == "dg") >= 2
    assert run_study(study, tmp_path) == rows  # nothing is run again, so seconds are the same too


@pytest.mark.slow
def test_a_learning_rate_that_is_losing_is_not_run_to_the_end(tmp_path):
    study = ScalingStudy(prompt_lengths=(3,), arms=("dg",), learning_rates=(3e-3, 1e-5), seeds=(0,), answers=6000)
    row = run_study(study, tmp_path)[0]
    assert row["learning_rate"] == 3e-3
    tuned = {
        rate: json.loads(
            (tmp_path / "length-3" / f"learning-rate-{rate:g}" / "dg-seed-100" / "summary.json").read_text()
        )
        for rate in study.learning_rates
    }
    best, losing = (tuned[rate]["runs"][0] for rate in study.learning_rates)
    assert best["to_target"] is not None
    assert best["samples"] == losing["samples"] < 6000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arms": ("sgd",)}, "sgd"),
        ({"prompt_lengths": (5, 3)}, "rising"),
        ({"seeds": (100,)}, "share one"),
        ({"seeds": ()}, "--seeds"),
        ({"vocab_size": 1}, "vocab-size"),
    ],
)
def test_scaling_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        ScalingStudy(**arguments)


@pytest.mark.slow
def test_token_study_probes_every_arm(tmp_path):
    records = run_study(TokenGateStudy(prompt_length=3, steps=4, evaluate_every=2, seeds=(0,)), tmp_path)
    assert {record["arm"] for record in records} == set(token_gate.ARMS)
    for record in records:
        assert -1.001 <= record["cosine_full"] <= 1.001
        assert 0 <= record["position_kept"] <= 1
        assert record["surprisal"] > 0
    assert {path.name for path in tmp_path.iterdir()} == {
        *("config.json", "records.jsonl", "summary.json", "tokens.png", "tokens.svg"),
    }


def test_step_gains_of_every_case(tmp_path):
    study = GainStudy(prompt_lengths=(3, 6), vocab_sizes=(5,), widths=(8,), body_width=8, rounds=2)
    records = run_study(study, tmp_path)
    assert len(records) == len(study.cases()) == 2 + 1 + 1 + 5
    ratios = {record["value"]: record["flops_ratio"] for record in records if record["changed"] == "body"}
    # Two products back for one forward; three where blocks run again; the weights' share saved where they are frozen.
    assert ratios["plain"] == pytest.approx(2, abs=0.15)
    assert ratios["checkpointed"] == pytest.approx(3, abs=0.25)
    assert 1 < ratios["adapters"] < 1.7
    assert ratios["head only"] < 0.5
    assert all(record[name] > 0 for record in records for name in ("sample", "dg", "kondo", "total_gain"))
    plain = next(record for record in records if record["value"] == "plain")
    assert plain["training_gain_flops"] == pytest.approx(100 / 3, rel=0.02)  # 3 of 100 rows, equal work each
    assert 1 < plain["total_gain_flops"] < plain["training_gain_flops"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounds": 0}, "--rounds"),
        ({"bodies": ("half",)}, "half"),
        ({"rate": 2.0}, "rate"),
        ({"widths": (30,)}, "width"),
    ],
)
def test_step_gain_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        GainStudy(**arguments)
