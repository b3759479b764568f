"""The master test: the engine's gradient is that of the masked full batch, at the cost of the kept rows."""

import copy
import itertools
import math

import pytest
import torch
from engine_cases import ACTIONS, ROWS, SHAPES, TOKENS, WIDTH, make_case
from reference import masked_gradient

import sparkjoy as sj
from sparkjoy.testing import TinyPolicy, assert_backward_rows
from sparkjoy_lab import scores as compared

GATES = {
    "rate": lambda: sj.KondoGate(rate=0.3),
    "price": lambda: sj.KondoGate(price=0.0),
    "rate and price": lambda: sj.KondoGate(rate=0.2, price=0.1),
    "soft": lambda: sj.SoftGate(1.0, price=0.0, generator=torch.Generator().manual_seed(1)),
    "rate 0.9": lambda: sj.KondoGate(rate=0.9),
    "reweighting": lambda: Reweighting(),
    "none": lambda: None,
}


class Reweighting:
    """A gate of one's own: keeps every third row, each at a weight of its own, and does not look at the scores."""

    def __call__(self, score, cost=None):
        keep = torch.arange(len(score)) % 3 == 0
        return sj.Decision(
            keep, score.new_zeros(()), torch.full_like(score, 1 / 3), 1 + torch.arange(len(score)).to(score)
        )


def denominator(normalizer, keep, mask, shape):
    tokens = 1 if shape == "rows" else TOKENS
    if normalizer == "samples":
        return ROWS
    if normalizer == "batch":
        return ROWS * tokens if mask is None else int(mask.sum())
    if normalizer == "kept":
        return int(keep.sum()) * tokens if mask is None else int(mask[keep].sum())
    return normalizer


def every_pair():
    """Each gate on each shape under each normalizer, with micro-batches and dtypes in turn: any two values meet."""
    normalizers, sizes, dtypes = (
        ("batch", "samples", "kept", 7.5, 0.25),
        (None, 1, 3, 100),
        (torch.float64, torch.float32),
    )
    for turn, (gate, shape, normalizer) in enumerate(itertools.product(GATES, SHAPES, normalizers)):
        yield gate, shape, sizes[turn % 4], normalizer, dtypes[turn // 4 % 2]


@pytest.mark.parametrize(("gate", "shape", "micro_batch_size", "normalizer", "dtype"), [*every_pair()])
def test_gradient_equals_the_masked_full_batch(gate, shape, micro_batch_size, normalizer, dtype):
    policy, batch, advantages, mask = make_case(shape, dtype)
    parameters = list(policy.parameters())
    for known, loss in itertools.product((False, True), (sj.reinforce, sj.delightful())):
        policy.zero_grad()
        report = sj.gated_backward(
            policy.log_probs,
            batch,
            advantages,
            GATES[gate](),
            log_probs=policy.log_probs(batch).detach() if known else None,
            mask=mask,
            loss=loss,
            micro_batch_size=micro_batch_size,
            normalizer=normalizer,
        )
        keep, weight = report.decision.keep, report.decision.weight
        assert 0 < report.kept == int(keep.sum())
        assert (report.kept == ROWS) == (gate == "none")
        of_tokens = advantages if mask is None or advantages.dim() == 1 else advantages.where(mask, 0)
        teaches = of_tokens.view(ROWS, -1).any(dim=1) & (True if mask is None else mask.any(dim=1))
        assert gate == "none" or bool(teaches[keep].all())
        expected = masked_gradient(
            policy.log_probs,
            loss,
            batch,
            advantages,
            mask,
            keep,
            weight,
            denominator(normalizer, keep, mask, shape),
            parameters,
        )
        for parameter, reference in zip(parameters, expected, strict=True):
            error = (parameter.grad - reference).norm() / reference.norm()
            assert error < (1e-6 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("micro_batch_size", [None, 2])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gate", GATES)
def test_hooks_see_exactly_the_reported_rows(gate, shape, known, micro_batch_size):
    policy, batch, advantages, mask = make_case(shape)
    batch["state"].requires_grad_()  # torch's backward hooks ask for an input with a gradient
    log_probs = policy.log_probs(batch).detach() if known else None
    forwards = []
    policy.layer.register_forward_hook(lambda module, inputs, output: forwards.append(len(output)))
    seen = []
    policy.layer.register_full_backward_hook(lambda module, inputs, outputs: seen.append(len(outputs[0])))
    step = sj.GatedBackward(GATES[gate](), micro_batch_size=micro_batch_size)
    report = step(policy.log_probs, batch, advantages, log_probs=log_probs, mask=mask)
    assert sum(seen) == report.backward_rows
    assert sum(forwards) == report.forward_rows
    assert report.forward_rows == report.screened_rows + report.backward_rows
    teaching = int((advantages != 0).sum()) if advantages.dim() == 1 else ROWS
    assert report.plan == "known" or gate == "none" or report.screened_rows <= teaching
    if report.plan == "dense":
        assert report.screened_rows == 0
        assert report.kept <= report.backward_rows
    else:
        assert report.backward_rows == report.kept
    valid = torch.ones(ROWS, 1 if shape == "rows" else TOKENS) if mask is None else mask
    if report.plan != "dense":
        assert report.backward_tokens == int(valid[report.decision.keep].sum())
    assert report.forward_tokens - report.backward_tokens == report.screened_tokens


def test_assert_backward_rows_fails_on_another_number():
    policy, batch, advantages, _ = make_case("rows")
    with pytest.raises(AssertionError, match="4 rows passed backward"), assert_backward_rows(policy.layer, 5):
        sj.gated_backward(policy.log_probs, batch, advantages, sj.KondoGate(rate=0.3))


def test_plans_by_counts_and_what_is_known():
    policy, batch, advantages, _ = make_case("rows")

    def plan(gate, **options):
        return sj.gated_backward(policy.log_probs, batch, advantages, gate, **options).plan

    known = policy.log_probs(batch).detach()
    assert plan(sj.KondoGate(rate=0.8), log_probs=known) == "known"
    assert plan(sj.KondoGate(rate=0.3)) == "screen"
    assert plan(sj.KondoGate(rate=0.8)) == "dense"
    assert plan(sj.KondoGate(rate=0.8), micro_batch_size=4) == "screen"
    assert plan(sj.KondoGate(rate=0.8), draft=sj.Draft(policy.log_probs)) == "draft"
    assert plan(None) == plan(sj.KondoGate(rate=1)) == "dense"


def test_a_draft_decides_but_is_not_differentiated():
    policy, batch, advantages, _ = make_case("rows")
    draft = TinyPolicy(WIDTH, ACTIONS, seed=9, dtype=torch.float64)
    report = sj.gated_backward(
        policy.log_probs, batch, advantages, sj.KondoGate(rate=0.3), draft=sj.Draft(draft.log_probs)
    )
    by_draft = sj.KondoGate(rate=0.3)(sj.delight(advantages, draft.log_probs(batch)))
    assert torch.equal(report.decision.keep, by_draft.keep)
    successes = int((advantages > 0).sum())
    assert (report.screened_rows, report.forward_rows, report.backward_rows) == (successes, 4, 4)
    assert all(parameter.grad is None for parameter in draft.parameters())


@pytest.mark.parametrize(
    "options", [{}, {"compare_every": 1}, {"draft": True}, {"micro_batch_size": 5}], ids=lambda options: str(options)
)
def test_no_random_number_is_drawn_twice(options):
    """Threads that draw meanwhile would draw it again too, so the random state is never put back."""
    policy, batch, advantages, _ = make_case("rows")
    drawn = []

    def drawing(rows):
        drawn.extend(torch.randint(2**62, (4,)).tolist())
        return policy.log_probs(rows)

    draft = sj.Draft(drawing, verify=2) if options.pop("draft", False) else None
    report = sj.GatedBackward(sj.KondoGate(rate=0.3), draft=draft, **options)(drawing, batch, advantages)
    assert report.plan in ("screen", "draft")
    drawing(batch)
    assert len(drawn) >= 12
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("micro_batch_size", [None, 4])
def test_rate_one_is_the_plain_loop_bit_for_bit(micro_batch_size):
    gated_policy, batch, advantages, _ = make_case("rows", torch.float32)
    plain_policy = copy.deepcopy(gated_policy)
    gated_adam = torch.optim.Adam(gated_policy.parameters(), 1e-2)
    plain_adam = torch.optim.Adam(plain_policy.parameters(), 1e-2)
    step = sj.GatedBackward(sj.KondoGate(rate=1.0), micro_batch_size=micro_batch_size)
    size = micro_batch_size or ROWS
    for _ in range(20):
        gated_adam.zero_grad()
        report = step(gated_policy.log_probs, batch, advantages)
        gated_adam.step()
        plain_adam.zero_grad()
        for start in range(0, ROWS, size):
            rows = {key: value[start : start + size] for key, value in batch.items()}
            loss = -(advantages[start : start + size] * plain_policy.log_probs(rows)).sum() / ROWS
            loss.backward()
        plain_adam.step()
        assert (report.kept, report.backward_rows, report.screened_rows) == (ROWS, ROWS, 0)
    for gated, plain in zip(gated_policy.parameters(), plain_policy.parameters(), strict=True):
        assert torch.equal(gated, plain)


def test_no_survivors_touch_nothing():
    policy, batch, advantages, _ = make_case("rows")
    report = sj.gated_backward(policy.log_probs, batch, -advantages.abs(), sj.KondoGate(price=0))
    assert (report.kept, report.backward_rows, report.loss.item()) == (0, 0, 0)
    assert report.decision.price is None
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_zero_advantage_rows_are_dropped_below_rate_one_whatever_the_score():
    policy, batch, _, _ = make_case("rows")
    advantages = torch.zeros(ROWS, dtype=torch.float64)
    advantages[[1, 5]] = torch.tensor([1.0, -1.0], dtype=torch.float64)
    for score in (compared.uniform_score(torch.Generator().manual_seed(0)), compared.surprisal_score):
        report = sj.gated_backward(policy.log_probs, batch, advantages, sj.KondoGate(rate=0.9), score=score)
        assert report.decision.keep.nonzero().flatten().tolist() == [1, 5]
    assert sj.gated_backward(policy.log_probs, batch, advantages, None).kept == ROWS


def test_whatever_stands_under_the_mask_changes_nothing():
    policy, batch, advantages, mask = make_case("ragged tokens, an advantage each")
    log_probs = policy.log_probs(batch).detach()

    def with_junk(junk):
        return lambda rows: policy.log_probs(rows).where(rows["mask"], junk)

    reports = []
    for junk in (0.0, math.nan, math.inf):
        policy.zero_grad()
        dirty = [tensor.masked_fill(~mask, junk) for tensor in (advantages, log_probs)]
        report = sj.gated_backward(
            with_junk(junk),
            {**batch, "mask": mask},
            dirty[0],
            sj.KondoGate(rate=0.5),
            log_probs=dirty[1],
            mask=mask.long(),
        )
        reports.append((report.loss.item(), policy.layer.weight.grad.clone()))
    for loss, gradient in reports[1:]:
        assert loss == reports[0][0]
        assert torch.equal(gradient, reports[0][1])


def test_the_behavior_log_probs_reach_the_loss_for_the_kept_rows():
    policy, batch, advantages, _ = make_case("rows")
    given = -torch.arange(1.0, ROWS + 1, dtype=torch.float64)
    received = {}

    def loss(log_probs, advantages, behavior_log_probs, mask):
        received["behavior"] = behavior_log_probs
        return sj.reinforce(log_probs, advantages)

    gate = sj.KondoGate(rate=0.2)
    report = sj.gated_backward(policy.log_probs, batch, advantages, gate, loss=loss, behavior_log_probs=given)
    assert torch.equal(received["behavior"], given[report.decision.keep])
    sampler = policy.log_probs(batch).detach() - 0.1
    report = sj.gated_backward(policy.log_probs, batch, advantages, gate, loss=loss, log_probs=sampler)
    assert torch.equal(received["behavior"], sampler[report.decision.keep])
    report = sj.gated_backward(policy.log_probs, batch, advantages, gate, loss=loss)
    torch.testing.assert_close(received["behavior"], policy.log_probs(batch).detach()[report.decision.keep])


def test_gradients_add_up_and_a_backward_of_ones_own_is_called():
    policy, batch, advantages, _ = make_case("rows")
    calls = []

    def backward(loss):
        calls.append(loss.item())
        loss.backward()

    sj.gated_backward(policy.log_probs, batch, advantages, None)
    once = policy.layer.weight.grad.clone()
    report = sj.gated_backward(policy.log_probs, batch, advantages, None, backward=backward, micro_batch_size=6)
    torch.testing.assert_close(policy.layer.weight.grad, 2 * once)
    assert len(calls) == 3
    assert report.loss.item() == pytest.approx(sum(calls))


def test_a_resumed_step_plans_as_an_unbroken_one():
    policy, batch, _, _ = make_case("rows")
    step = sj.GatedBackward(sj.KondoGate(price=1e-3))
    step.backward_over_forward = 1.0  # a single layer: its input needs no gradient
    step(policy.log_probs, batch, torch.ones(ROWS, dtype=torch.float64))
    resumed = sj.GatedBackward(sj.KondoGate(price=1e-3))
    resumed.load_state_dict(step.state_dict())
    plans = [s(policy.log_probs, batch, torch.ones(ROWS, dtype=torch.float64)).plan for s in (step, resumed)]
    assert plans == ["dense", "dense"]  # everything was kept last time


def test_a_batch_of_masked_tokens_only_has_no_gradient():
    policy, batch, advantages, _ = make_case("tokens")
    mask = torch.zeros(ROWS, TOKENS)
    report = sj.gated_backward(policy.log_probs, batch, advantages, sj.KondoGate(rate=0.5), mask=mask)
    assert (report.kept, report.backward_rows) == (0, 0)
    report = sj.gated_backward(policy.log_probs, batch, advantages, None, mask=mask)
    assert (report.kept, report.backward_tokens, report.loss.item()) == (ROWS, 0, 0)
    assert policy.layer.weight.grad.abs().sum() == 0


@pytest.mark.parametrize("rate", [0.3, 0.9])
def test_a_subclass_of_the_gate_keeps_its_weights_in_every_plan(rate):
    class Heavier:
        def __init__(self, rate):
            self.gate = sj.KondoGate(rate=rate)
            self.rule = self.gate.rule

        def __call__(self, score, cost=None):
            decision = self.gate(score, cost)
            return sj.Decision(decision.keep, decision.price, decision.probability, 10 * decision.weight)

    policy, batch, advantages, _ = make_case("rows")
    gradients = []
    for gate in (sj.KondoGate(rate=rate), Heavier(rate=rate)):
        policy.zero_grad()
        sj.gated_backward(policy.log_probs, batch, advantages, gate)
        gradients.append(policy.layer.weight.grad.clone())
    torch.testing.assert_close(gradients[1], 10 * gradients[0])


def test_low_precision_answers_are_ranked_in_float32():
    log_probs = torch.full((2, 512), -1.0)
    log_probs[1, :2] = -1.5  # 513 nats against 512, which bfloat16 cannot tell apart
    parameter = torch.zeros(2, 512, requires_grad=True)
    report = sj.gated_backward(
        lambda rows: parameter[rows] + log_probs[rows],
        torch.arange(2),
        torch.ones(2, dtype=torch.bfloat16),
        sj.KondoGate(rate=0.5),
        log_probs=log_probs.bfloat16(),
    )
    assert report.decision.keep.tolist() == [False, True]
    assert report.decision.price.item() == 513


def test_a_loss_is_of_the_tokens_that_count():
    """A clipped term is -U where the policy is the one that sampled, and none at all where the mask is 0."""
    policy, batch, advantages, mask = make_case("ragged tokens")
    report = sj.gated_backward(policy.log_probs, batch, advantages, None, loss=sj.clipped(0.2), mask=mask)
    expected = -(advantages.view(ROWS, -1) * mask).sum() / mask.sum()
    assert report.loss.item() == pytest.approx(expected.item())
