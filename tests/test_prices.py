import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparkjoy as sj
from sparkjoy.gates.budget import ONE_ROW
from sparkjoy.gates.soft import quantile
from sparkjoy.testing import TinyPolicy
from sparkjoy_lab.prices import RollingQuantile


def test_a_soft_gates_rate_is_torchs_quantile():
    score = torch.randn(101, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert quantile(score, 0.9).item() == pytest.approx(torch.quantile(score, 0.9).item())
    assert int((score > quantile(score, 0.9)).sum()) == 10


def test_prices_and_budgets_say_what_they_are():
    assert repr(sj.KondoGate(price=RollingQuantile(0.5))) == "KondoGate(price=RollingQuantile(0.5, window=1024))"
    assert repr(sj.BudgetGate(0.5)) == "BudgetGate(0.5, tolerance=0.015, window=1024)"


@pytest.mark.parametrize("batch", [1, 3, 40])
def test_a_rolling_quantile_is_that_of_the_last_scores(batch, generator):
    price = RollingQuantile(0.2, window=30)
    scores = torch.randn(120, generator=generator)
    for end in range(batch, 121, batch):
        expected = torch.quantile(scores[max(0, end - max(30, batch)) : end], 0.8)
        torch.testing.assert_close(price(scores[end - batch : end]), expected)


def test_a_rolling_quantile_holds_a_stationary_rate_row_by_row(generator):
    gate = sj.KondoGate(price=RollingQuantile(0.1, window=500))
    kept = [int(gate(torch.randn(1, generator=generator)).keep) for _ in range(4000)]
    assert abs(sum(kept[1000:]) / 3000 - 0.1) < 0.015


def stream(name, rows, generator):
    score = torch.randn(rows, generator=generator, dtype=torch.float64)
    time = torch.linspace(0, 1, rows, dtype=torch.float64)
    return {
        "stationary": score,
        "scale grows": score * 1000**time,
        "scale falls": score * 1000**-time,
        "mean rises": score + 20 * time,
        "mean falls": score - 20 * time,
        "Cauchy": score / torch.randn(rows, generator=generator, dtype=torch.float64).abs(),
        "jump": score * (1 + 999 * (time > 0.5)),
        "fall": score - 10 * (time > 0.9),
        "zeros": score * (torch.rand(rows, generator=generator) < 0.7),
    }[name]


def tokens(score, generator):
    """Answers of 20 to 60 tokens, and up to 3 times that the better they rank."""
    uniform = torch.rand(len(score), generator=generator, dtype=torch.float64)
    return (20 * (1 + 2 * uniform) * (1 + 2 * score.argsort().argsort() / len(score))).floor()


STREAMS = ["stationary", "scale grows", "scale falls", "mean rises", "mean falls", "Cauchy", "jump", "fall", "zeros"]


SIZES = [(1, 0.5), (8, 0.1), (8, 0.5), (64, 0.03), (64, 0.5)]


@pytest.mark.parametrize(
    ("name", "batch", "rate"),
    [(name, *SIZES[(2 * place + more) % 5]) for place, name in enumerate(STREAMS) for more in (0, 1)]
    + [("zeros", 1, 0.5)],  # row by row, which debt alone holds
)
def test_a_budget_is_held_within_2_percent_after_200_steps(name, batch, rate, generator):
    steps = 200 if batch > 1 else 1000
    score = stream(name, steps * batch, generator)
    cost = tokens(score, generator)
    budget = gate = sj.BudgetGate(rate)
    spent = 0.0
    for scores, costs in zip(score.split(batch), cost.split(batch), strict=True):
        spent += costs[gate(scores, costs).keep].sum().item()
    assert abs(spent / (rate * cost.sum().item()) - 1) < 0.02
    assert budget.achieved == pytest.approx(spent / cost.sum().item())


def test_a_budget_keeps_good_rows_not_just_enough(generator):
    score = torch.randn(400 * 64, generator=generator)
    gate = sj.BudgetGate(0.1)
    kept = torch.cat([part[gate(part).keep] for part in score.split(64)])
    best = score.topk(len(kept)).values.mean()
    assert best * 0.95 < kept.mean() < best


@given(
    rate=st.floats(0.01, 0.99),
    batches=st.lists(st.integers(1, 9), min_size=1, max_size=60),
    seed=st.integers(0, 1000),
    growth=st.sampled_from([0.5, 1.0, 2.0]),
)
def test_a_budgets_debt_never_leaves_its_limit(rate, batches, seed, growth):
    generator = torch.Generator().manual_seed(seed)
    budget = gate = sj.BudgetGate(rate)
    seen = kept = 0
    for step, batch in enumerate(batches):
        score = torch.randn(batch, generator=generator, dtype=torch.float64) * growth**step
        kept += int(gate(score).keep.sum())
        seen += batch
        limit = max(budget.tolerance * rate * seen, ONE_ROW)
        assert abs(kept - rate * seen) <= limit + 1e-9


def test_a_change_of_scale_changes_nothing(generator):
    gates = [sj.BudgetGate(0.1) for _ in range(2)]
    for _ in range(50):
        score = torch.randn(16, generator=generator)
        assert torch.equal(gates[0](score).keep, gates[1](1024 * score).keep)


def test_what_zeros_leave_unspent_is_forgotten_but_for_the_tolerance(generator):
    budget = gate = sj.BudgetGate(0.3)
    for _ in range(100):
        score = torch.zeros(20)
        score[:2] = torch.randn(2, generator=generator)
        assert gate(score).keep.tolist() == [True, True] + [False] * 18
    assert budget.achieved == pytest.approx(0.1)
    kept = sum(int(gate(torch.randn(20, generator=generator)).keep.sum()) for _ in range(100))
    assert 0.3 * 2000 <= kept <= 0.3 * 2000 + 2 * budget.tolerance * 0.3 * 4000


def test_a_batch_of_zeros_keeps_nothing_and_has_no_price():
    gate = sj.BudgetGate(0.5)
    for cost in (None, torch.zeros(4)):
        decision = gate(torch.zeros(4), cost)
        assert not decision.keep.any()
        assert decision.price is None


def test_equal_scores_are_paid_off_over_batches():
    budget = gate = sj.BudgetGate(0.1)
    kept = [int(gate(torch.ones(5)).keep.sum()) for _ in range(1000)]
    assert set(kept) == {0, 5}
    assert budget.achieved == pytest.approx(0.1, rel=0.02)


def test_a_budget_of_everything_keeps_everything_with_a_gradient():
    assert sj.BudgetGate(1)(torch.tensor([-1.0, 0.0, 2.0])).keep.tolist() == [True, False, True]


def rolling_gate(rate, window):
    return sj.KondoGate(price=RollingQuantile(rate, window=window))


@pytest.mark.parametrize("gate", [rolling_gate, sj.BudgetGate])
def test_a_resumed_run_decides_as_an_unbroken_one(gate, generator, tmp_path):
    policy = TinyPolicy(4, 3)

    def run(step, start, end):
        decisions = []
        for number in range(start, end):
            draws = torch.Generator().manual_seed(number)
            batch = {
                "state": torch.randn(6, 5, 4, generator=draws),
                "action": torch.randint(3, (6, 5), generator=draws),
            }
            mask = torch.arange(5) < torch.randint(1, 6, (6, 1), generator=draws)
            advantages = torch.randn(6, generator=draws)
            report = step(policy.log_probs, batch, advantages, mask=mask)
            decisions.append((report.decision.keep.tolist(), report.decision.price))
        return decisions

    def fresh():
        return sj.GatedBackward(gate(0.3, window=20))

    unbroken = run(fresh(), 0, 40)
    first = fresh()
    halves = run(first, 0, 17)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = fresh()
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert halves + run(second, 17, 40) == unbroken
    assert run(fresh(), 17, 40) != unbroken[17:]  # what is saved matters


def test_the_engine_passes_tokens_as_costs(generator):
    """Rows of 1 and of 9 tokens: a fifth of the tokens, not a fifth of the rows."""
    policy = TinyPolicy(4, 3)
    budget = sj.BudgetGate(0.2)
    step = sj.GatedBackward(budget)
    counted = total = 0
    for _ in range(200):
        batch = {
            "state": torch.randn(8, 9, 4, generator=generator),
            "action": torch.randint(3, (8, 9), generator=generator),
        }
        mask = torch.arange(9) < torch.tensor([1, 9] * 4).unsqueeze(1)
        known = policy.log_probs(batch).detach()  # a dense plan would differentiate more than is kept
        report = step(policy.log_probs, batch, torch.randn(8, generator=generator), log_probs=known, mask=mask)
        counted, total = counted + report.backward_tokens, total + int(mask.sum())
    assert counted / total == pytest.approx(0.2, rel=0.02)
    assert budget.achieved == pytest.approx(counted / total)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RollingQuantile(0), "rate is 0"),
        (lambda: RollingQuantile(0.1, window=0), "window is 0"),
        (lambda: RollingQuantile(0.1, window=2.5), "window is 2.5"),
        (lambda: sj.BudgetGate(1.5), "rate is 1.5"),
        (lambda: sj.BudgetGate(0.1, tolerance=0), "tolerance is 0"),
        (lambda: sj.BudgetGate(0.1, tolerance=math.nan), "tolerance is nan"),
        (lambda: sj.BudgetGate(0.1)(torch.ones(2), torch.ones(3)), r"cost has shape \(3,\)"),
        (lambda: sj.BudgetGate(0.1)(torch.ones(2), torch.tensor([1.0, -1.0])), "at least 0"),
        (lambda: sj.BudgetGate(0.1)(torch.ones(2), torch.tensor([1.0, math.inf])), "finite"),
        (lambda: sj.KondoGate(rate=0.1, price=sj.BudgetGate(0.1)), "is a gate of its own"),
    ],
)
def test_wrong_settings_and_costs_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
