"""The budget study: every arm at its best learning rate, resumable, with a table and a figure."""

import json

import pytest

from sparkjoy_lab.studies import budget, budget_results
from sparkjoy_lab.studies.study import run_study
from sparkjoy_lab.studies.tuning import most_accurate, soonest
from sparkjoy_lab.tasks.mnist import MnistConfig
from sparkjoy_lab.tasks.reversal import ReversalConfig

TINY = ReversalConfig(prompt_length=2, vocab_size=2, prompts=4, answers=4, held_out=20, layers=1, width=8, heads=2)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(budget.MNIST, "mnist", (MnistConfig(batch_size=20), 200))
    monkeypatch.setitem(budget.REVERSAL, "reversal H=10 M=2", TINY)
    return budget.BudgetStudy(
        tasks=("mnist", "reversal H=10 M=2"),
        arms=("dg", "noise 0.3", "hard 10%"),
        learning_rates=(1e-3, 2e-3),
        tuning_seeds=(100,),
        seeds=(0, 1),
        reversal_steps=30,
        target_error=0.2,
    )


@pytest.mark.slow
def test_the_study_resumes_and_compares_with_dg(tiny, tmp_path):
    rows = run_study(tiny, tmp_path)
    found = budget_results.table(rows)
    assert [(row["task"], row["arm"]) for row in found] == [(task, arm) for task in tiny.tasks for arm in tiny.arms]
    of_mnist = {row["arm"]: row for row in found if row["task"] == "mnist"}
    assert of_mnist["dg"]["kept"] == of_mnist["dg"]["value_of_dg"] == 1
    assert of_mnist["hard 10%"]["kept"] == 0.1
    assert 0 < of_mnist["noise 0.3"]["kept"] < 1
    assert json.loads((tmp_path / "summary.json").read_text())["runs"] == rows
    assert run_study(tiny, tmp_path) == rows  # finished runs are not run again, so seconds are the same too
    assert len(budget_results.plot(rows).axes) == 2


def test_a_failed_seed_leaves_no_mean():
    row = {"task": "reversal H=10 M=2", "learning_rate": 1e-3, "measure": "steps", "kept": 1.0, "seconds": 1.0}
    rows = [
        {**row, "arm": arm, "value": value}
        for arm, value in (("dg", 10), ("dg", 20), ("noise 0.3", 30), ("noise 0.3", None))
    ]
    dg, noise = budget_results.table(rows)
    assert (dg["value"], dg["solved"]) == (15, 2)
    assert (noise["value"], noise["value_of_dg"], noise["solved"]) == (None, None, 1)
    budget_results.plot(rows)


def test_the_soonest_rate_wins_and_a_losing_one_is_stopped():
    allowed = {}

    def run(rate, seed, samples):
        needs = {1e-3: 300, 2e-3: 200, 3e-3: 900}[rate]
        allowed[rate, seed] = samples
        solved = needs <= samples
        return {"samples": min(needs, samples), "error": 0.01 if solved else 0.5, "to_target": solved or None}

    assert soonest((1e-3, 2e-3, 3e-3), (100, 101), 1000, 10, run) == 2e-3
    assert allowed[3e-3, 100] == 400  # as much as the best took for all its seeds
    assert (3e-3, 101) not in allowed


def test_the_most_accurate_rate_wins():
    def run(rate, seed, samples):
        return {"mean_error": abs(rate - 2e-3) + 0.001 * seed}

    assert most_accurate((1e-3, 2e-3, 3e-3), (1, 2), 10, run) == 2e-3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tasks": ("chess",)}, "--tasks 'chess': expected some of mnist"),
        ({"arms": ("sarsa",)}, "--arms 'sarsa': expected some of dg"),
        ({"tasks": ("mnist, full",)}, "needs --data"),
        ({"seeds": (100,)}, "share one"),
        ({"seeds": ()}, "--seeds: expected at least one"),
        ({"learning_rates": (-1.0,)}, "--learning-rate -1"),
    ],
)
def test_wrong_studies_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        budget.BudgetStudy(**options)
