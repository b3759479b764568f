"""The frictions study: every case with every arm, tuned on seeds of its own, resumable, with a table and a figure."""

import json

import pytest

from sparkjoy_lab.studies.frictions import FrictionsStudy
from sparkjoy_lab.studies.frictions_results import plot, table
from sparkjoy_lab.studies.study import run_study

TINY = FrictionsStudy(
    prompt_lengths=(2,),
    frictions=("none", "corrupt", "all"),
    arms=("dg", "noise 0.3", "importance"),
    learning_rates=(1e-3, 2e-3),
    tuning_seeds=(9,),
    seeds=(0, 1),
    steps_per_token=5,
    target_error=0.5,
)


@pytest.mark.slow
def test_the_study_tunes_runs_resumes_and_compares_with_dg(tmp_path):
    rows = run_study(TINY, tmp_path)
    assert len(rows) == (1 + 3 + 1) * 3 * 2
    assert TINY.runs == len(rows) + 2 * 3
    found = table(rows)
    assert [row["friction"] for row in found[::3]] == ["none", "corrupt", "corrupt", "corrupt", "all"]
    assert [row["strength"] for row in found[3:12:3]] == [0.1, 0.3, 0.6]
    assert all(row["of_dg"] == row["whole_run_of_dg"] == row["kept"] == 1 for row in found if row["arm"] == "dg")
    assert 0 < next(row["kept"] for row in found if row["arm"] == "noise 0.3") < 1
    config = json.loads(next((tmp_path / "runs").glob("H=2-all-2-dg/*/*-seed-0/config.json")).read_text())
    assert [config[name] for name in ("delay", "bug", "corrupt", "discover")] == [30, 0.3, 0.3, 0.03]
    assert run_study(TINY, tmp_path) == rows  # finished runs are not run again, so seconds are the same too
    assert len(plot(rows, 2).axes) == 2 * 2


def test_means_over_seeds_and_medians_of_steps():
    row = {"prompt_length": 5, "friction": "bug", "level": 0, "strength": 0.1, "learning_rate": 1e-3, "kept": 0.5}
    rows = [
        {**row, "arm": arm, "seed": seed, "error": error, "whole_run": 2 * error, "steps_to_target": steps}
        for arm, seed, error, steps in (
            ("dg", 0, 0.1, 20),
            ("dg", 1, 0.3, None),
            ("pg", 0, 0.4, 40),
            ("pg", 1, 0.4, 60),
        )
    ]
    dg, pg = table(rows)
    assert (dg["error"], dg["solved"], dg["steps"]) == (
        pytest.approx(0.2),
        1,
        None,
    )  # half never got there
    assert (pg["of_dg"], pg["whole_run_of_dg"], pg["steps"]) == (pytest.approx(2), pytest.approx(2), 50)
    nothing = table([{**one, "error": 0.0} for one in rows])
    assert nothing[1]["of_dg"] is None


def test_the_full_grid_has_all_lengths_and_strengths():
    assert FrictionsStudy().cases[-1] == ("all", 1)
    assert len(FrictionsStudy(full=True).cases) == len(FrictionsStudy().cases) + 2
    assert FrictionsStudy(full=True).lengths == (5, 10, 15)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"arms": ()}, "--arms: expected at least one"),
        ({"arms": ("trpo",)}, "--arms 'trpo': expected some of dg; noise 0.3"),
        ({"seeds": (0, 100)}, "--tuning-seeds and --seeds share one"),
        ({"steps_per_token": 0}, "--steps-per-token 0"),
        ({"prompt_lengths": (0,)}, "--prompt-length 0"),
        ({"learning_rates": (-1.0,)}, "--learning-rate -1.0"),
        ({"target_error": 2.0}, "--target-error 2.0"),
    ],
)
def test_impossible_studies_are_refused(change, says):
    with pytest.raises(ValueError, match=says):
        FrictionsStudy(**change)
