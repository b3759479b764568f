"""The noise budget: an exact price, what it adds, and what approximate sizes cost."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkjoy import UnbiasedGate
from sparkjoy.noise import expected_noise, noise_ratio, noise_sums, price_for_noise

SIZES = st.lists(
    st.one_of(st.just(0.0), st.floats(1e-3, 1e3), st.sampled_from([1e-30, 1e30, 3e38, 1e-45])), min_size=1, max_size=30
)


def added(size, root_cost, price):
    below = size < price * root_cost
    return (size * (price * root_cost - size))[below].sum()


@settings(max_examples=300)
@given(sizes=SIZES, noise=st.floats(1e-3, 100), costs=st.lists(st.floats(0.5, 50), min_size=30, max_size=30))
def test_the_price_spends_the_budget_exactly(sizes, noise, costs):
    size = torch.tensor(sizes, dtype=torch.float64)
    root_cost = torch.tensor(costs[: len(sizes)], dtype=torch.float64).sqrt()
    allowed = noise * float(size.square().sum())
    price = price_for_noise(size, root_cost, allowed)
    if not size.any():
        assert price == 0
    else:
        assert float(added(size, root_cost, price)) == pytest.approx(allowed, rel=1e-6, abs=1e-200)


@settings(max_examples=200)
@given(sizes=SIZES, noise=st.sampled_from([1e-9, 0.3, 1.0, 1e6]), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_every_kind_of_batch_gets_a_sound_decision(sizes, noise, dtype):
    score = torch.tensor(sizes, dtype=dtype) * torch.tensor([1.0, -1.0], dtype=dtype).repeat(len(sizes))[: len(sizes)]
    decision = UnbiasedGate(noise=noise, generator=torch.Generator().manual_seed(0))(score)
    assert bool(((decision.probability >= 0) & (decision.probability <= 1)).all())
    assert bool(decision.weight.isfinite().all())
    assert not bool((decision.keep & (score == 0)).any())
    assert bool(decision.keep[decision.probability >= 1].all())


def test_edge_cases():
    def chances(*sizes, noise=0.3):
        return UnbiasedGate(noise=noise)(torch.tensor(sizes)).probability.tolist()

    assert chances(2.0) == [pytest.approx(1 / 1.3)]  # s (λ − s) = τ s²
    assert chances(0.0, 0.0) == [0, 0]
    assert chances(1.0, 1.0, 1.0, 1.0) == [pytest.approx(1 / 1.3)] * 4
    huge, small, _ = chances(1e6, 1.0, 1.0)  # the huge row is the batch: the others almost never matter
    assert huge == pytest.approx(1 / 1.3, rel=1e-5)
    assert small == pytest.approx(1e-6 * huge)
    assert chances(5.0, 4.0, 0.5, noise=1e-30) == [1, 1, 1]
    assert UnbiasedGate().noise == 0.3


def test_spread_out_signal_keeps_many_rows_and_concentrated_signal_few():
    def kept(size):
        return float(UnbiasedGate(noise=0.3)(size).probability.mean())

    spread, concentrated = torch.ones(100), torch.arange(1.0, 101).pow(-2)
    assert kept(spread) == pytest.approx(1 / 1.3)
    assert kept(concentrated) < 0.05
    effective = float(spread.sum() ** 2 / spread.square().sum())
    assert kept(spread) * 100 == pytest.approx(effective / 1.3)  # ESS / (1 + τ) where no probability is capped


def test_poor_batches_pay_less_than_rich_ones(generator):
    gate = UnbiasedGate(noise=0.3, generator=generator)
    rich, poor = torch.rand(100, generator=generator), 0.1 * torch.rand(100, generator=generator)
    chances = [float(gate(size).probability.mean()) for _ in range(10) for size in (rich, poor)]
    assert chances[-1] < 0.5 * chances[-2]


def test_rows_that_cost_more_are_kept_more_seldom_within_the_same_budget(generator):
    size, cost = torch.rand(200, generator=generator), torch.randint(1, 100, (200,), generator=generator).float()
    blind, priced = UnbiasedGate(noise=0.3)(size), UnbiasedGate(noise=0.3)(size, cost)
    for decision in (blind, priced):
        assert expected_noise(size, decision.probability) == pytest.approx(0.3, rel=1e-5)
    assert (priced.probability * cost).sum() < 0.95 * (blind.probability * cost).sum()
    open_ = (priced.probability < 1) & (size > 0)
    ratio = (priced.probability * cost.sqrt() / size)[open_]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


def test_a_floor_is_the_least_probability():
    gate = UnbiasedGate(noise=1.0, floor=0.05)
    assert gate(torch.tensor([1.0, 0.0, 1e-9])).probability.tolist() == [pytest.approx(0.5), *[pytest.approx(0.05)] * 2]


def draw(gate, exact, used):
    """One step of a batch whose rows' gradients are orthogonal; what was added, and what the batch had."""
    decision = gate(used)
    keep, some = decision.keep, exact > 0
    sums = noise_sums(exact[keep], used[keep], decision.weight[keep]).tolist()
    gate.learn(*sums)
    truth = (exact[some].double() ** 2 * (1 / decision.probability[some].double() - 1)).sum()
    reported = expected_noise(used, decision.probability) * noise_ratio(*sums)
    return float(truth), float((exact.double() ** 2).sum()), reported


def sizes_of(kind, generator):
    uniform = torch.rand(100, generator=generator)
    size = {
        "spread": uniform,
        "concentrated": uniform**8 + 1e-3,
        "lognormal": torch.randn(100, generator=generator).exp(),
    }[kind]
    return size * (torch.rand(100, generator=generator) < 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["spread", "concentrated", "lognormal"])
@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_sizes_that_are_off_cost_rows_not_the_budget(kind, noise):
    generator = torch.Generator().manual_seed(0)
    saved = 0.3 if kind == "lognormal" else 0.0  # some batches are outliers, which count little in the budget
    for off, tolerance in ((0.0, 0.02), (0.3, 0.1), (1.0, 0.25)):
        gate = UnbiasedGate(noise=noise, generator=generator)
        found = []
        for _ in range(450):
            exact = sizes_of(kind, generator)
            found.append(draw(gate, exact, exact * (off * torch.randn(100, generator=generator)).exp()))
        truth, own, _ = (sum(column) for column in zip(*found[50:], strict=True))
        assert 1 - tolerance - saved <= truth / own / noise <= 1 + tolerance, off
    uncorrected = UnbiasedGate(noise=noise, generator=generator)
    uncorrected.learn = lambda *sums: None
    found = [
        draw(uncorrected, exact, exact * torch.randn(100, generator=generator).exp())
        for exact in (sizes_of(kind, generator) for _ in range(200))
    ]
    truth, own, _ = (sum(column) for column in zip(*found, strict=True))
    assert truth / own > 1.5 * noise  # the correction does something


@pytest.mark.parametrize(
    ("outlier", "step", "off"),
    [(10.0, 0, 0.0), (10.0, 1, 0.3), (10.0, 40, 0.0), (1e3, 0, 0.3), (1e3, 1, 0.0), (1e3, 40, 0.3)]
    + [(1e155, step, off) for step in (0, 1) for off in (0.0, 0.3)],
)
def test_the_budget_holds_from_the_step_after_an_outlier_on(outlier, step, off):
    noise = {}
    for has_it in (True, False):
        found = []
        for seed in range(8):
            generator = torch.Generator().manual_seed(seed)
            gate = UnbiasedGate(noise=0.3, generator=generator)
            for number in range(step + 11):
                exact = torch.randn(64, generator=generator, dtype=torch.float64).abs()
                used = exact * (off * torch.randn(64, generator=generator)).exp()
                if has_it and number == step:
                    exact[0], used[0] = outlier * (2 if off else 1), outlier
                truth, own, reported = draw(gate, exact, used)
                assert math.isfinite(reported)
                found += [(truth, own)] if number > step else []
            gate.load_state_dict(gate.state_dict())  # what it remembers is a sound state
        added, own = torch.tensor(found).view(8, 10, 2).sum(0).unbind(1)
        noise[has_it] = added / own  # of each of ten steps
    assert float(noise[True].mean() / noise[False].mean()) == pytest.approx(1, abs=0.2)
    if not off:
        assert bool(((noise[True] / 0.3 - 1).abs() < 0.25).all())


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
def test_a_budget_decides_alike_at_any_scale(scale):
    size = torch.rand(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain, scaled = (UnbiasedGate(noise=0.3) for _ in range(2))
    for _ in range(3):
        torch.testing.assert_close(scaled(size * scale).probability, plain(size).probability)


@pytest.mark.parametrize("kind", ["spread", "concentrated", "lognormal"])
def test_the_reported_noise_is_the_true_one(kind):
    generator = torch.Generator().manual_seed(0)
    for off in (0.0, 0.3):
        gate = UnbiasedGate(noise=0.3, generator=generator)
        found = []
        for _ in range(300):
            exact = sizes_of(kind, generator)
            truth, own, reported = draw(gate, exact, exact * (off * torch.randn(100, generator=generator)).exp())
            found.append((truth / own, reported))
        truth, reported = (sum(column) / len(found) for column in zip(*found, strict=True))
        assert reported == pytest.approx(truth, rel=0.1 if off else 1e-6)


def test_exact_sizes_given_as_known_change_nothing(generator):
    gate = UnbiasedGate(noise=0.3, generator=generator)
    for _ in range(50):
        exact = sizes_of("lognormal", generator)
        draw(gate, exact, exact)
    assert gate.state_dict()["allowance"] == pytest.approx(0, abs=1e-9)


def test_a_resumed_gate_decides_as_an_unbroken_one(generator):
    gate = UnbiasedGate(noise=0.3, generator=generator)
    for _ in range(20):
        exact = sizes_of("spread", generator)
        draw(gate, exact, exact * torch.randn(100, generator=generator).exp())
    other = UnbiasedGate(noise=0.3)
    size = torch.rand(50)
    fresh = other(size).probability
    other.load_state_dict(gate.state_dict())
    assert torch.equal(other(size).probability, gate(size).probability)
    assert not torch.equal(fresh, other(size).probability)


def test_the_ratio_is_one_where_nothing_tells_otherwise():
    assert noise_ratio(0, 0, 0, 0) == 1
    assert noise_ratio(2, 1, 1, 1) == 2
    assert math.isfinite(noise_ratio(1e-300, 1e300, 1, 1))
