import json
from dataclasses import replace

import pytest

from sparkjoy_lab.studies import screening
from sparkjoy_lab.studies.screening import ScreeningStudy, arms
from sparkjoy_lab.studies.study import run_study

COLUMNS = {"screener", "task", "rate", "recall", "spearman", "seconds_over_forward", "error", "error_exact"}


def shortened(study):
    """The first seed's arms on MNIST, a few steps of each."""
    kept = [arm for arm in arms(study) if arm.task.startswith("mnist") and arm.settings.seed == 0]
    chosen = {(arm.part, arm.task, arm.settings.label): arm for arm in kept}
    few = {"steps": 20, "evaluate_every": 10}
    return [replace(arm, settings=replace(arm.settings, **few)) for arm in chosen.values()]


def test_arms_are_distinct_and_cover_the_claims():
    for full in (False, True):
        every = arms(ScreeningStudy(full=full))
        names = [(arm.part, arm.task, arm.settings.label, arm.settings.seed) for arm in every]
        assert len(names) == len(set(names))
        noisy = [arm.settings for arm in every if arm.part == "noise"]
        assert {(s.method, s.gate_rate, s.price) for s in noisy} == {
            ("dg", None, None),
            ("kondo", 0.03, None),
            ("kondo", 0.1, None),
            ("kondo", None, 0.0),
        }
        assert {0.0, 2.0} <= {s.score_noise for s in noisy}
        assert len({arm.task for arm in every if arm.part == "unbiased"}) >= 4


@pytest.mark.slow
def test_a_run_leaves_tables_and_figures_and_is_not_run_twice(tmp_path, monkeypatch):
    study = ScreeningStudy()
    few = shortened(study)
    few = (
        [arm for arm in few if arm.part == "screeners"]
        + few[-8:]
        + [arm for arm in few if arm.settings.score_noise == 2][:4]
    )
    monkeypatch.setattr(screening, "arms", lambda study: few)
    rows = run_study(study, tmp_path)
    on_disk = json.loads((tmp_path / "summary.json").read_text())
    assert set(on_disk) == {"screeners", "noise", "unbiased"}
    assert all(set(row) >= COLUMNS for row in on_disk["screeners"])
    drafts = [row for row in on_disk["screeners"] if row["screener"] != "exact"]
    assert {row["screener"] for row in drafts} == {"stale", "bfloat16", "draft", "cached", "flat"}
    assert all(0 <= row["recall"] <= 1 and 0 < row["proposed"] <= 12 for row in drafts)
    exact = {row["task"]: row["error"] for row in on_disk["screeners"] if row["screener"] == "exact"}
    assert len(exact) == 2
    assert all(row["error_exact"] == exact[row["task"]] for row in drafts)
    verified = [row for row in on_disk["noise"] if row["verify"]]
    assert verified
    assert all(row["arm"].endswith("verified x4") for row in verified)
    assert all((tmp_path / f"{name}.png").exists() for name in on_disk)
    assert run_study(study, tmp_path) == rows  # nothing is run again, so seconds are the same too


def test_parts_and_seeds_may_be_added(tmp_path, monkeypatch):
    every = shortened(ScreeningStudy())
    few = {part: [arm for arm in every if arm.part == part][:2] for part in ("noise", "unbiased")}

    def chosen(study):
        runs = [(seed, arm) for seed in study.seeds for part in study.parts for arm in few[part]]
        return [replace(arm, settings=replace(arm.settings, seed=seed)) for seed, arm in runs]

    monkeypatch.setattr(screening, "arms", chosen)
    monkeypatch.setattr(screening.screening_figures, "plot", lambda tables: {})
    alone = run_study(ScreeningStudy(parts=("noise",), seeds=(0,)), tmp_path)
    both = run_study(ScreeningStudy(parts=("noise", "unbiased"), seeds=(0, 1)), tmp_path)
    assert both[: len(alone)] == alone  # with their seconds
    assert {row["part"] for row in both[len(alone) :]} == {"noise", "unbiased"}
    noise = json.loads((tmp_path / "summary.json").read_text())["noise"]
    assert [row["seeds"] for row in noise] == [2, 2]
    assert all(row["error_sd"] > 0 for row in noise)


@pytest.mark.parametrize("option", ["parts", "seeds"])
def test_one_at_least(option):
    with pytest.raises(ValueError, match=f"--{option}: expected at least one"):
        ScreeningStudy(**{option: ()})
