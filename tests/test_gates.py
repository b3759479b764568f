import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import keep_by_price, keep_by_rate

import sparkjoy as sj

# Few distinct values, zeros among them, so that ties and zero scores are common.
tied_scores = st.lists(st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=40)
any_scores = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=40)
distinct_scores = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=40, unique=True)
rates = st.floats(0.001, 0.999)
prices = st.floats(-3, 3)


@given(tied_scores | any_scores, rates)
def test_a_rate_keeps_the_greatest_scores_earlier_ones_first(scores, rate):
    decision = sj.KondoGate(rate=rate)(torch.tensor(scores))
    keep = keep_by_rate(scores, rate)
    assert decision.keep.tolist() == keep
    nonzero = sum(score != 0 for score in scores)
    assert int(decision.keep.sum()) == min(nonzero, math.ceil(rate * len(scores) - 1e-9))
    if any(keep):
        assert decision.price.item() == min(score for score, kept in zip(scores, keep, strict=True) if kept)
    else:
        assert decision.price is None


@given(tied_scores | any_scores, prices)
def test_a_price_keeps_strictly_more(scores, price):
    decision = sj.KondoGate(price=price)(torch.tensor(scores, dtype=torch.float64))
    assert decision.keep.tolist() == keep_by_price(scores, price)
    assert torch.equal(decision.probability, decision.keep.double())
    assert torch.equal(decision.weight, torch.ones(len(scores), dtype=torch.float64))


@given(any_scores, prices, st.floats(0, 2))
def test_a_higher_price_keeps_a_subset(scores, price, rise):
    score = torch.tensor(scores, dtype=torch.float64)
    lower, higher = sj.KondoGate(price=price)(score).keep, sj.KondoGate(price=price + rise)(score).keep
    assert not (higher & ~lower).any()


@given(any_scores, rates, rates)
def test_a_higher_rate_keeps_a_superset(scores, first, second):
    fewer, more = (sj.KondoGate(rate=rate)(torch.tensor(scores)).keep for rate in sorted((first, second)))
    assert not (fewer & ~more).any()


@given(distinct_scores, rates, st.randoms(use_true_random=False))
def test_distinct_scores_are_kept_wherever_they_stand(scores, rate, random):
    order = list(range(len(scores)))
    random.shuffle(order)
    score = torch.tensor(scores)
    for gate in (sj.KondoGate(rate=rate), sj.KondoGate(price=0.1), sj.KondoGate(rate=rate, price=0.1)):
        assert torch.equal(gate(score[order]).keep, gate(score).keep[order])


@given(tied_scores, rates, prices)
def test_price_and_rate_first_the_price_then_the_best(scores, rate, price):
    affordable = [score if score > price else 0.0 for score in scores]
    decision = sj.KondoGate(rate=rate, price=price)(torch.tensor(scores, dtype=torch.float64))
    assert decision.keep.tolist() == keep_by_rate(affordable, rate)


@given(tied_scores)
def test_rate_one_keeps_everything_zeros_too(scores):
    decision = sj.KondoGate(rate=1)(torch.tensor(scores))
    assert decision.keep.all()
    assert decision.price.item() == min(scores)


def test_the_count_forgives_float_products():
    # 0.03 · 100 is 3.0000000000000004 in floats; 3 are meant.
    assert int(sj.KondoGate(rate=0.03)(torch.arange(1.0, 101)).keep.sum()) == 3


def test_negative_scores_fill_the_quota():
    assert sj.KondoGate(rate=0.5)(torch.tensor([-3.0, 1.0, 0.0, -1.0])).keep.tolist() == [False, True, False, True]


@given(distinct_scores, rates, st.sampled_from([0.1, 0.25, 0.5, 0.9]))
def test_a_share_of_the_kept_goes_to_the_worst(scores, rate, share):
    decision = sj.KondoGate(rate=rate, negative_share=share)(torch.tensor(scores))
    good = sorted((score for score in scores if score > 0), reverse=True)
    bad = sorted(score for score in scores if score < 0)
    kept = math.ceil(rate * len(scores) - 1e-9)
    of_bad = min(len(bad), max(round(share * kept), kept - len(good)))
    expected = {*good[: kept - of_bad], *bad[:of_bad]}
    assert {score for score, keep in zip(scores, decision.keep.tolist(), strict=True) if keep} == expected
    if expected:
        assert decision.price.item() == min(map(abs, expected))
    else:
        assert decision.price is None


def test_a_share_beside_a_price_adds_to_what_the_price_keeps():
    score = torch.tensor([3.0, 2.0, 0.5, -0.5, -2.0, -3.0, -4.0])
    gate = sj.KondoGate(price=1, negative_share=0.5)
    assert gate(score).keep.tolist() == [True, True, False, False, False, True, True]
    assert sj.KondoGate(rate=2 / 7, price=1, negative_share=0.5)(score).keep.nonzero().flatten().tolist() == [0, 6]
    assert not gate(-score.abs()).keep.any()  # nothing passes the price, so there is nothing to have a share of


def test_ties_of_a_share_go_to_the_earlier_position():
    keep = sj.KondoGate(rate=0.5, negative_share=0.5)(torch.tensor([1.0, -1.0, 1.0, -1.0])).keep
    assert keep.tolist() == [True, True, False, False]


def test_a_soft_gate_keeps_with_the_sigmoid_of_the_margin(generator):
    score = torch.tensor([-1.0, 0.0, 2.0]).repeat(20_000)
    decision = sj.SoftGate(0.5, price=0.5, generator=generator)(score)
    expected = torch.sigmoid((score - 0.5) / 0.5)
    torch.testing.assert_close(decision.probability, expected)
    for value in (-1.0, 0.0, 2.0):
        p = 1 / (1 + math.exp(-(value - 0.5) / 0.5))
        seen = decision.keep[score == value].float().mean().item()
        assert abs(seen - p) < 4 * math.sqrt(p * (1 - p) / 20_000)
    assert decision.price.item() == 0.5


def test_a_soft_rate_gate_prices_at_the_quantile(generator):
    decision = sj.SoftGate(1.0, rate=0.25, generator=generator)(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert decision.price.item() == 4.0


def test_a_soft_gate_draws_once_per_call_from_its_generator():
    def draw(count):
        generator = torch.Generator().manual_seed(7)
        keep = sj.SoftGate(1.0, price=0.0, generator=generator)(torch.zeros(count)).keep
        return keep, torch.rand(1, generator=generator).item()

    (first, after_first), (second, after_second) = draw(50), draw(50)
    assert torch.equal(first, second)
    assert after_first == after_second


def test_low_precision_scores_are_ranked_in_float32():
    decision = sj.KondoGate(rate=0.5)(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    assert decision.keep.tolist() == [False, True]
    assert decision.probability.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "neither rate nor price"),
        ({"rate": 0}, "rate is 0"),
        ({"rate": 1.5}, "rate is 1.5"),
        ({"rate": math.nan}, "rate is nan"),
        ({"rate": True}, "rate is True"),
        ({"rate": "3%"}, "rate is '3%'"),
        ({"price": math.nan}, "price is nan"),
        ({"price": math.inf}, "price is inf"),
        ({"price": "high"}, "price is 'high'"),
        ({"rate": 0.5, "negative_share": 1}, "negative_share is 1"),
        ({"rate": 0.5, "negative_share": -0.1}, "negative_share is -0.1"),
        ({"rate": 0.5, "negative_share": "half"}, "negative_share is 'half'"),
        ({"price": -1, "negative_share": 0.5}, "price is -1, below 0"),
    ],
)
def test_wrong_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        sj.KondoGate(**arguments)


@pytest.mark.parametrize(
    "score", [torch.tensor([]), torch.ones(2, 2), torch.tensor([1.0, math.nan]), torch.tensor([math.inf])]
)
def test_wrong_scores_are_refused(score):
    with pytest.raises(ValueError, match="score has"):
        sj.KondoGate(rate=0.5)(score)


def test_it_says_what_it_is():
    assert repr(sj.KondoGate(rate=0.03, price=0)) == "KondoGate(rate=0.03, price=0)"


def test_a_price_object_is_asked_once_and_saved():
    class Counting:
        calls = 0

        def __call__(self, score, cost=None):
            self.calls += 1
            return torch.tensor(float(self.calls))

        def state_dict(self):
            return {"calls": self.calls}

        def load_state_dict(self, state):
            self.calls = state["calls"]

    gate = sj.KondoGate(price=Counting())
    assert gate(torch.tensor([1.5])).keep.item()
    resumed = sj.KondoGate(price=Counting())
    resumed.load_state_dict(gate.state_dict())
    assert not resumed(torch.tensor([1.5])).keep.item()  # the price is 2 now
