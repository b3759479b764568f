"""The bandit study: its parts against slow or independent versions, its summary, its refusals."""

import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import matplotlib as mpl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparkjoy as sj
from sparkjoy_lab.scores import additive_score
from sparkjoy_lab.studies import bandit_contexts, bandit_gambling, bandit_guards, bandit_sums, bandit_theory
from sparkjoy_lab.studies.bandit_zero_price import CosineSearch, baseline_sweep, fitted_slopes, zero_price_records
from sparkjoy_lab.tasks.bandit import SoftmaxBandit, arm_gradients, method_weight
from sparkjoy_lab.tasks.gambling import Gambling

mpl.use("Agg")

QUIET = SimpleNamespace(progress=lambda done, what: None)

SMALL = bandit_theory.BanditStudy(
    arms=(3,),
    p=(0.01, 0.02, 0.5),
    temperatures=(1.0,),
    draws=200,
    batches=100,
    context_p=(0.1, 0.5, 0.9),
    alphas=(0.5, 0.9),
    sigma=(0.0, 3.0),
    seeds=2,
    steps=20,
    batch=8,
    corner_steps=40,
)


@given(arms=st.integers(2, 6), p=st.floats(0.05, 0.9), baseline=st.floats(0.05, 0.95), size=st.integers(1, 40))
@settings(derandomize=True, max_examples=15)
def test_counts_stand_for_single_draws(arms, p, baseline, size):
    """The mean cosine from multinomial counts against batches drawn arm by arm and their gradients averaged."""
    bandit = SoftmaxBandit(arms, p)
    counted = CosineSearch(bandit, 4_000, 100, seed=0).mean_cosine(size, 1 - baseline, baseline)
    gradients, _ = arm_gradients(bandit, baseline, method_weight("pg"))
    actions = bandit.sample(2_000 * size, torch.Generator().manual_seed(1)).view(2_000, size)
    cosines = torch.cosine_similarity(gradients[actions].mean(1), bandit.direction.expand(2_000, -1), dim=1, eps=1e-300)
    error = float(cosines.std()) * math.sqrt(1 / 2_000 + 1 / 4_000)
    assert abs(counted - float(cosines.mean())) <= 4 * error + 1e-9


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5])
def test_the_gate_needs_one_right_draw(p):
    bandit = SoftmaxBandit(10, p)
    search = CosineSearch(bandit, 4_000, 10**6, seed=0)
    needed = search.draws_to_cosine(p, "kondo", 0.0)
    assert 1 - (1 - p) ** needed >= 0.95 > 1 - (1 - p) ** (needed - 1)
    assert search.mean_cosine(needed, 1.0, 0.0) == pytest.approx(1 - (1 - p) ** needed, abs=4 * math.sqrt(0.05 / 4_000))


def test_draws_grow_as_one_over_p_or_its_square_by_the_baseline():
    records = [
        record
        for p in (0.002, 0.005, 0.01, 0.02)
        for record in zero_price_records(SoftmaxBandit(10, p), (1.0,), 0.5, 100, 1_000, 10**8, 0)
    ]
    slopes = {
        (s["method"], s["baseline"]): (s["draws_slope"], s["backward_slope"]) for s in fitted_slopes(records, 0.02)
    }
    assert slopes["pg", "p"] == pytest.approx((-1, -1), abs=0.1)
    assert slopes["pg", "constant"] == pytest.approx((-2, -2), abs=0.1)
    for baseline in ("p", "confidence", "constant"):
        assert slopes["kondo", baseline] == pytest.approx((-1, 0), abs=0.02)


def test_draws_out_of_reach_are_none():
    records = zero_price_records(SoftmaxBandit(10, 0.001), (1.0,), 0.5, 100, 100, 1_000, 0)
    assert all(record["draws_to_cosine_95"] is None for record in records)


def test_predicted_draws_under_constant_baselines():
    for record in baseline_sweep(SoftmaxBandit(10, 0.002), (0.002, 0.2, 0.5), 1_000, 10**8, 0):
        assert record["draws_pg"] == pytest.approx(record["draws_predicted"], rel=0.15)


@given(
    arms=st.integers(2, 30), p=st.floats(0.01, 0.95), method=st.sampled_from([("pg", 1.0), ("dg", 0.3), ("kondo", 1.0)])
)
@settings(derandomize=True, max_examples=50)
def test_context_weights_are_the_enumerated_gradients(arms, p, method):
    bandit = SoftmaxBandit(arms, p)
    gradients, _ = arm_gradients(bandit, p, method_weight(*method))
    weight = bandit_contexts.context_weight(torch.tensor(p, dtype=torch.float64), arms, *method)
    assert torch.allclose(bandit.probabilities @ gradients, weight * bandit.direction, rtol=1e-9, atol=1e-12)


def test_stacked_cosine_equals_the_cosine_of_stacked_vectors():
    contexts = [SoftmaxBandit(4, p) for p in (0.1, 0.6, 0.9)]
    weights = torch.tensor([0.3, 0.7, 0.1], dtype=torch.float64)
    stacked = torch.cat([weight * bandit.direction for weight, bandit in zip(weights, contexts, strict=True)])
    oracle = torch.cat([bandit.direction for bandit in contexts])
    expected = torch.cosine_similarity(stacked, oracle, dim=0)
    p = torch.tensor([bandit.p for bandit in contexts], dtype=torch.float64)
    assert torch.allclose(bandit_contexts.oracle_cosine(p, weights, 4), expected)


def test_dg_is_closer_for_hard_contexts_and_further_for_easy_ones():
    hard, easy = (bandit_contexts.pair_records(10, 1.0, values)[0] for values in ((0.05, 0.3), (0.7, 0.9)))
    assert hard["dg_closer"]
    assert not hard["dg_over_corrects"]
    assert not easy["dg_closer"]
    assert easy["dg_over_corrects"]


@given(arms=st.integers(2, 1000), p=st.floats(0.01, 0.99))
@settings(derandomize=True, max_examples=100)
def test_a_sum_ranks_right_above_its_threshold_only(arms, p):
    if p * arms <= 1.01:
        with pytest.raises(ValueError, match="the threshold is for p above 1/K"):
            bandit_sums.alpha_threshold(arms, min(p, 1 / arms))
        return
    k, chance = torch.tensor([float(arms)], dtype=torch.float64), torch.tensor([p], dtype=torch.float64)
    threshold = bandit_sums.alpha_threshold(arms, p)
    assert bandit_sums.misranked(additive_score(threshold * 0.999), k, chance)
    assert not bandit_sums.misranked(additive_score(threshold + 0.001 * (1 - threshold)), k, chance)
    assert not bandit_sums.misranked(sj.delight, k, chance)


def test_only_the_product_ranks_both_ways():
    records = {(r["score"], r["alpha"]): r for r in bandit_sums.sum_records((0.0, 0.5, 1.0))}
    product = records["delight", None]
    assert (product["misranked"], product["rare_success_not_first"]) == (0, 0)
    assert records["sum", 0.5]["misranked"] == records["sum", 0.5]["predicted"] > 0.9
    assert records["sum", 1.0]["rare_success_not_first"] == 1


def test_keeping_the_best_of_each_run_is_the_gate():
    score = torch.randn(6, 25, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([sj.KondoGate(rate=0.13)(row).keep for row in score])
    assert torch.equal(bandit_gambling.keep_best(score, 0.13).bool(), expected)


@pytest.mark.parametrize("method", ["pg", "dg", "kondo"])
@pytest.mark.parametrize("noise", ["bad", "all"])
def test_policies_settle_where_the_drift_leads(method, noise):
    task = Gambling(1.0, noise=noise)
    learning = bandit_gambling.Learning(seeds=20)
    record = bandit_gambling.gambling_records([task], learning, 1.0, 0.1, method)[0]
    assert record["final_p"] == pytest.approx(record["settling_point"], abs=0.03)


def test_the_mean_guard_rescues_and_costs_nothing_without_noise():
    learning = bandit_gambling.Learning(seeds=10)
    quiet, noisy = Gambling(0.0), Gambling(10.0)
    bare, guarded = (bandit_guards.guard_records([quiet, noisy], learning, name) for name in ("none", "mean"))
    assert guarded[0] == {**bare[0], "guard": "mean"}
    assert bare[1]["final_p"] < 0.05
    assert guarded[1]["solved"] == 1


def test_the_summary_has_what_the_study_promises_and_draws():
    seen = []
    work = SimpleNamespace(progress=lambda done, what: seen.append((done, what)))
    rows = SMALL.run(work)
    summary = SMALL.summary(rows)
    assert seen[0][0] == 0
    assert seen[-1] == (1.0, "done")
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    required = {
        "arms", "p", "method", "temperature", "cosine", "perpendicular_variance", "backward_fraction",
        "draws_to_cosine_95",
    }  # fmt: skip
    assert all(required <= record.keys() for record in summary["zero_price"])
    assert {record["method"] for record in summary["zero_price"]} == {"pg", "dg", "kondo"}
    assert {"contexts", "sums", "gambling", "lucky", "guards", "guard_costs", "slopes"} <= summary.keys()
    assert {"corners", "corner_slopes", "corners_sampled", "shared"} <= summary.keys()
    json.dumps(summary)
    figures = SMALL.figures(rows)
    assert set(figures) == {"zero_price", "contexts", "sums", "gambling", "guards", "corners"}
    mpl.pyplot.close("all")


@pytest.mark.slow
def test_one_seed_gives_one_summary():
    first, again, other = (study.run(QUIET) for study in (SMALL, SMALL, replace(SMALL, seed=1)))
    assert first == again
    drawn = [[row for row in rows if row["part"] == "gambling"] for rows in (first, other)]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": (0.5, 1.0)}, "p is 1.0; expected a probability strictly between 0 and 1."),
        ({"arms": (1,)}, "arms is 1; expected a whole number of at least 2."),
        ({"arms": ()}, "arms is empty; give at least one value."),
        ({"sigma": (-1.0,)}, "sigma is -1.0; expected a standard deviation, a finite number of at least 0."),
        ({"temperatures": (0.0,)}, "temperatures has 0.0; expected finite numbers above 0."),
        ({"alphas": (2.0,)}, "alphas has 2.0; expected numbers in [0, 1]."),
        ({"start": 1.0}, "start is 1.0; expected a number strictly between 0 and 1."),
        ({"seeds": 0}, "seeds is 0; expected at least 1."),
        ({"gap": 0.0}, "gap is 0.0; expected a finite number above 0."),
        ({"context_p": (0.5,)}, "context_p has fewer than 2 different values; contexts are compared in pairs."),
        ({"rate": 2.0}, "rate is 2.0; expected the fraction to keep, a number in (0, 1], such as 0.03 for 3%."),
    ],
)
def test_impossible_studies_are_refused_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        bandit_theory.BanditStudy(**arguments)


def test_baselines_follow_their_definitions():
    bandit = SoftmaxBandit(10, 0.01)
    assert bandit.expected_confidence == pytest.approx(float(np.square(bandit.probabilities.numpy()).sum()))
