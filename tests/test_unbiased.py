"""The unbiased gate: probabilities that sum to the rate, weights that undo them, and DG's own gradient on average."""

import pytest
import torch
from engine_cases import SHAPES, make_case

from sparkjoy import GatedBackward, KondoGate, UnbiasedGate, clipped, delightful, reinforce, select, update_size
from sparkjoy.gates.unbiased import inclusion_probabilities
from sparkjoy.scores import advantage_size


def test_probabilities_are_proportional_up_to_one_and_sum_to_the_count(generator):
    for expected in (0.5, 1, 3, 7.3, 19, 20):
        size = torch.rand(20, generator=generator).exp().pow(6)
        probability, price = inclusion_probabilities(size, expected)
        assert float(probability.sum()) == pytest.approx(expected)
        torch.testing.assert_close(probability, (size.double() / price).clamp(max=1))


def test_fewer_than_asked_for_are_kept_for_certain():
    probability, _ = inclusion_probabilities(torch.tensor([0.0, 2.0, 0.0, 1e-9]), 3)
    assert probability.tolist() == [0, 1, 0, 1]
    decision = UnbiasedGate(rate=0.5)(torch.zeros(4))
    assert not decision.keep.any()
    assert select(UnbiasedGate(rate=0.5), torch.zeros(4)).decision.price is None


def test_each_is_kept_as_often_as_its_probability_says(generator):
    score = torch.tensor([5.0, -3.0, 1.0, -1.0, 0.5, 0.0, 0.2, -0.1])
    gate = UnbiasedGate(rate=0.375, generator=generator)
    draws = [gate(score) for _ in range(4000)]
    often = torch.stack([draw.keep.float() for draw in draws]).mean(0)
    error = (draws[0].probability * (1 - draws[0].probability) / 4000).sqrt()
    assert bool(((often - draws[0].probability).abs() <= 4 * error).all())
    for draw in draws[:10]:
        torch.testing.assert_close(draw.weight, draw.keep / draw.probability.clamp(min=1e-9))
    assert {int(draw.keep.sum()) for draw in draws} == {3}


LOSSES = {"reinforce": reinforce, "dg": delightful(), "dg of answers": delightful(unit="sample"), "clipped": clipped()}
SOURCES = ("exact", "known", "stale", "advantages only")


def flat_gradient(policy):
    flat = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in policy.parameters()])
    policy.zero_grad(set_to_none=True)
    return flat


BUDGETS = [(shape, loss, source, {"noise": 1.0}) for shape in SHAPES for loss in LOSSES for source in SOURCES]
OTHERS = [
    (shape, "dg", source, options)
    for shape in ("rows", "ragged tokens")
    for source in ("exact", "stale")
    for options in ({"rate": 0.3}, {"noise": 1.0, "floor": 0.1})
]


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "loss", "source", "gate_options"), [*BUDGETS, *OTHERS], ids=str)
def test_the_mean_gradient_is_the_dense_one(shape, loss, source, gate_options, generator):
    policy, batch, advantages, mask = make_case(shape)
    behavior = policy.log_probs(batch).detach()
    drift = 0.3 * torch.randn(behavior.shape, generator=generator, dtype=behavior.dtype)
    known = {"exact": None, "known": behavior, "stale": (behavior + drift).clamp(max=-1e-3)}.get(source)
    score = advantage_size if source == "advantages only" else None

    def gradient(gate):
        options = {"score": score} if gate is not None else {}
        step = GatedBackward(gate, loss=LOSSES[loss], **options)
        step(policy.log_probs, batch, advantages, log_probs=known, behavior_log_probs=behavior, mask=mask)
        return flat_gradient(policy)

    dense = gradient(None)
    gate = UnbiasedGate(**gate_options, generator=generator)
    draws = torch.stack([gradient(gate) for _ in range(100)])
    error = draws.std(dim=0) / len(draws) ** 0.5
    assert bool(((draws.mean(0) - dense).abs() <= 4 * error + 1e-9).all())
    assert float(draws.std(dim=0).max()) > 0  # it does skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("floor", "own", "unbiased"), [(0.0, False, False), (0.1, False, True), (0.0, True, True)], ids=str
)
def test_an_injected_discovery_is_not_lost(floor, own, unbiased, generator):
    """A right answer that was not sampled is recorded at log-prob 0: by that, nothing could be learnt from it."""
    policy, batch, advantages, mask = make_case("tokens")
    current = policy.log_probs(batch).detach()
    found, advantages = torch.tensor([0, 5]), advantages.clone()
    advantages[found] = 2.0
    recorded = current.index_fill(0, found, 0.0)
    known = {"behavior_log_probs": recorded} if own else {"log_probs": recorded}

    def gradient(gate):
        GatedBackward(gate, loss=delightful())(policy.log_probs, batch, advantages, mask=mask, **known)
        return flat_gradient(policy)

    dense = gradient(None)
    gate = UnbiasedGate(noise=1.0, floor=floor, generator=generator)
    draws = torch.stack([gradient(gate) for _ in range(200)])
    error = draws.std(dim=0) / len(draws) ** 0.5
    within = (draws.mean(0) - dense).abs() <= 4 * error + 1e-9
    assert bool(within.all()) == unbiased


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_with_noise_so_small_that_all_are_kept_it_is_the_dense_step_to_the_bit(shape, known):
    policy, batch, advantages, mask = make_case(shape)
    keep = (advantages != 0) if advantages.dim() == 1 else (advantages != 0).any(dim=1)
    keep = keep if mask is None else keep & mask.any(dim=1)
    batch, advantages = {name: rows[keep] for name, rows in batch.items()}, advantages[keep]
    mask = None if mask is None else mask[keep]
    log_probs = policy.log_probs(batch).detach() if known else None
    gradients = []
    for gate in (None, UnbiasedGate(noise=1e-30)):
        report = GatedBackward(gate, loss=delightful())(
            policy.log_probs, batch, advantages, log_probs=log_probs, mask=mask
        )
        assert report.kept == report.total
        gradients.append(flat_gradient(policy))
    assert torch.equal(*gradients)


def test_sizes_of_tokens_add_up_whatever_their_signs():
    parameter = torch.full((2, 2), -1.0, requires_grad=True)
    advantages = torch.tensor([[1.0, -1.0], [1.0, 1.0]])
    report = GatedBackward(UnbiasedGate(noise=0.3))(
        lambda rows: parameter[rows], torch.arange(2), advantages, mask=torch.ones(2, 2)
    )
    first, second = report.decision.probability.tolist()
    assert first == pytest.approx(second)


@pytest.mark.parametrize("known", ["exact", "stale"])
def test_the_reported_noise_is_what_brute_force_finds(known, generator):
    """Every row has logits of its own, so that rows' gradients are orthogonal and squares add up."""
    rows = 200
    logits = (2 * torch.randn(rows, 2, generator=generator, dtype=torch.float64)).requires_grad_()
    actions = torch.randint(2, (rows,), generator=generator)
    advantages = torch.randn(rows, generator=generator, dtype=torch.float64)

    def log_prob_fn(part):
        return logits[part].log_softmax(1).gather(1, actions[part].unsqueeze(1)).squeeze(1)

    current = log_prob_fn(torch.arange(rows)).detach()
    drift = 0.3 * torch.randn(rows, generator=generator, dtype=torch.float64)
    given = current if known == "exact" else (current * drift.exp()).clamp(max=-1e-6)

    def gradient(gate):
        step = GatedBackward(gate, loss=delightful())
        report = step(log_prob_fn, torch.arange(rows), advantages, log_probs=given)
        found = torch.zeros_like(logits) if logits.grad is None else logits.grad.clone()
        logits.grad = None
        return found, report.noise

    dense, nothing = gradient(None)
    assert nothing is None
    errors, reported = [], []
    for _ in range(300):
        gate = UnbiasedGate(noise=0.3, generator=generator)  # anew, so that no correction moves the price
        found, noise = gradient(gate)
        errors.append(float((found - dense).square().sum()))
        reported.append(noise)
    truth = sum(errors) / len(errors) / float(dense.square().sum())
    assert sum(reported) / len(reported) == pytest.approx(truth, rel=0.1)


def test_systematic_draws_vary_less(generator):
    advantages = torch.randn(100, generator=generator)
    log_probs = -1 - torch.randn(100, generator=generator).abs()
    score, value = update_size(advantages, log_probs), -torch.sigmoid(-advantages * log_probs) * advantages
    gate = UnbiasedGate(rate=0.1, generator=generator)
    systematic = [gate(score).weight for _ in range(500)]
    chance = gate(score).probability
    independent = [(torch.rand(100, generator=generator) < chance) / chance for _ in range(500)]
    spread = [torch.stack([(weight * value).sum() for weight in draws]).std() for draws in (systematic, independent)]
    assert spread[0] < 0.7 * spread[1]


def test_update_size_bounds_the_gradient_at_the_logits(generator):
    logits = torch.randn(50, 6, generator=generator)
    actions = torch.randint(6, (50,), generator=generator)
    advantages = torch.randn(50, generator=generator)
    probabilities = logits.softmax(1)
    taken = probabilities.gather(1, actions[:, None]).squeeze(1).log()
    residual = torch.nn.functional.one_hot(actions, 6) - probabilities
    exact = (torch.sigmoid(-advantages * taken) * advantages).abs() * residual.norm(dim=1)
    size = update_size(advantages, taken)
    assert torch.equal(size.sign(), advantages.sign())
    assert bool((size.abs() <= exact * (1 + 1e-5)).all() & (exact <= 2**0.5 * size.abs() * (1 + 1e-5)).all())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rate": 0}, "rate is 0"),
        ({"noise": 0}, "noise is 0; expected a number above 0"),
        ({"noise": -1.0}, "noise is -1.0"),
        ({"noise": float("nan")}, "noise is nan"),
        ({"noise": "0.3"}, "noise is '0.3'"),
        ({"noise": True}, "noise is True"),
        ({"noise": 0.3, "rate": 0.1}, "expected one of them"),
        ({"noise": 0.3, "floor": 1.0}, "floor is 1.0; expected a probability"),
    ],
)
def test_wrong_options_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        UnbiasedGate(**options)


def test_a_score_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="score has 1 of 2 values NaN"):
        UnbiasedGate(rate=0.5)(torch.tensor([1.0, torch.nan]))


@pytest.mark.parametrize("known", [True, False])
def test_a_score_that_is_0_where_the_gradient_is_not_is_refused(known):
    policy, batch, advantages, _ = make_case("rows")
    log_probs = policy.log_probs(batch).detach()

    def gains_only(advantages, log_probs):
        return advantages.clamp(min=0)

    for floor in (0.0, 0.1):
        step = GatedBackward(UnbiasedGate(noise=1.0, floor=floor), score=gains_only)
        if floor:
            assert step(policy.log_probs, batch, advantages, log_probs=log_probs if known else None).kept
            continue
        with pytest.raises(ValueError, match=r"the score is 0 for \d+ rows that have an advantage.*a floor"):
            step(policy.log_probs, batch, advantages, log_probs=log_probs if known else None)
        with pytest.raises(ValueError, match="the score is 0 for"):
            select(step.gate, advantages, log_probs, score=gains_only)
    assert GatedBackward(KondoGate(rate=0.3), score=gains_only)(policy.log_probs, batch, advantages).kept


def test_sizes_of_a_rows_tokens_add_as_squares():
    policy, batch, advantages, mask = make_case("ragged tokens")
    known = policy.log_probs(batch).detach()
    report = GatedBackward(UnbiasedGate(noise=0.3))(policy.log_probs, batch, advantages, log_probs=known, mask=mask)
    of_tokens = (advantages.abs().view(len(advantages), -1) * (1 - known.exp())).where(mask, 0)
    cost = mask.sum(dim=1)
    expected = UnbiasedGate(noise=0.3)(of_tokens.square().sum(dim=1).sqrt(), cost).probability
    torch.testing.assert_close(report.decision.probability, expected)
