"""`sparkjoy bench` end to end, and the ratios it has once shown."""

import json
from pathlib import Path

import pytest

from sparkjoy_lab.cli import main

BASELINE = Path(__file__).parents[3] / "benchmarks" / "baselines" / "gpt2-2m.json"
FLAGS = [
    "--threads",
    "1",
    "--rows",
    "6",
    "--length",
    "5",
    "--vocabulary",
    "30",
    "--rounds",
    "1",
    "--micro-batch-sizes",
    "2",
    "6",
]


def bench(monkeypatch, out, *flags):
    monkeypatch.setattr("sys.argv", ["sparkjoy", "bench", "--out", str(out), *flags])
    main()
    return json.loads((out / "summary.json").read_text())


def test_a_bench_leaves_seconds_by_phase_a_figure_and_the_machine(monkeypatch, tmp_path, capsys):
    result = bench(monkeypatch, tmp_path, *FLAGS, "--rates", "1.0", "0.4", "--no-memory")
    assert {row["arm"] for row in result["arms"]} == {
        "dense", "non-zero", "positive", "uniform", "pods", "kondo-gate", "known", "screened", "noise",
        "shared",
    }  # fmt: skip
    for row in result["arms"]:
        assert set(row["seconds"]["total"]) == {"p20", "p50", "p80"}
        assert {"forward", "backward"} <= set(row["seconds"])
        assert row["seconds"]["total"]["p50"] > 0
    known = next(row for row in result["arms"] if row["arm"] == "known" and row["rate"] == 0.4)
    assert known["backward_rows"] == 3
    budgets = [(row["rate"], row["noise"]) for row in result["arms"] if row["arm"] == "noise"]
    assert budgets == [(None, 0.3), (None, 1.0)]
    assert all(row["noise"] is None for row in result["arms"] if row["arm"] != "noise")
    assert result["arms"][0]["speedup"] == 1
    assert result["machine"]["torch"]
    assert result["backward_over_forward"]["flops"] == pytest.approx(2, abs=0.1)
    assert (tmp_path / "speedup.png").stat().st_size > 10_000
    assert (tmp_path / "speedup.svg").exists()
    assert "speed-up" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags", [["--rates", "1.5"], ["--noises", "0"], ["--rounds", "0"], ["--model", "gpt3"], ["--device", "cuda"]]
)
def test_wrong_flags_end_with_status_two(monkeypatch, tmp_path, capsys, flags):
    with pytest.raises(SystemExit) as stop:
        bench(monkeypatch, tmp_path, *flags)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("sparkjoy: ")


@pytest.mark.slow
def test_memory_of_a_gated_step_is_a_fraction_of_the_dense_one(monkeypatch, tmp_path):
    flags = ["--rows", "32", "--length", "32", "--vocabulary", "500", "--rounds", "1", "--arms", "dense", "known"]
    result = bench(
        monkeypatch, tmp_path, *flags, "--rates", "0.1", "--memory-rates", "0.1", "--micro-batch-sizes", "32"
    )
    dense, known = result["memory"][0], result["memory"][-1]
    assert (known["arm"], known["rate"]) == ("known", 0.1)
    assert known["peak_bytes"] < 0.3 * dense["peak_bytes"]


@pytest.mark.timing
def test_the_ratios_have_not_worsened(monkeypatch, tmp_path):
    """Ratios within one run, never seconds, against what they once were: with a margin for a busy machine."""
    baseline = json.loads(BASELINE.read_text())
    result = bench(monkeypatch, tmp_path, *baseline["flags"])
    now = {f"{row['arm']} {row['rate']}": row["speedup"] for row in result["arms"]}
    for arm, speedup in baseline["speedups"].items():
        assert now[arm] > 0.6 * speedup, f"{arm}: {now[arm]:.2f} times as fast as dense, once {speedup:.2f}"
