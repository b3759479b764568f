"""The master test: the engine's gradient is that of the masked full batch, at the cost of the kept rows."""

import copy
import itertools
import math

import pytest
import torch
from reference import masked_gradient

import sparkjoy as sj
from sparkjoy import scores
from sparkjoy.testing import TinyPolicy, assert_backward_rows

ROWS, TOKENS, WIDTH, ACTIONS = 13, 5, 4, 6

GATES = {
    "rate": lambda: sj.KondoGate(rate=0.3),
    "price": lambda: sj.KondoGate(price=0.0),
    "rate and price": lambda: sj.KondoGate(rate=0.2, price=0.1),
    "soft": lambda: sj.KondoGate(price=0.0, temperature=1.0, generator=torch.Generator().manual_seed(1)),
    "rate 0.9": lambda: sj.KondoGate(rate=0.9),
    "reweighting": lambda: Reweighting(),
    "none": lambda: None,
}


class Reweighting:
    """A gate of one's own: keeps every third row, at three times its weight."""

    def __call__(self, score, cost=None):
        keep = torch.arange(len(score)) % 3 == 0
        return sj.Decision(keep, score.new_zeros(()), torch.full_like(score, 1 / 3), torch.full_like(score, 3.0))


def make_case(shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    policy = TinyPolicy(WIDTH, ACTIONS, dtype=dtype)
    size = (ROWS,) if shape == "rows" else (ROWS, TOKENS)
    batch = {
        "state": torch.randn(*size, WIDTH, generator=generator, dtype=dtype),
        "action": torch.randint(ACTIONS, size, generator=generator),
    }
    per_token = shape == "ragged tokens, an advantage each"
    advantages = torch.randn(size if per_token else ROWS, generator=generator, dtype=dtype)
    advantages[2] = 0  # a row that teaches nothing
    mask = None
    if shape.startswith("ragged"):
        lengths = torch.randint(0, TOKENS + 1, (ROWS,), generator=generator)
        mask = torch.arange(TOKENS) < lengths.unsqueeze(1)
    return policy, batch, advantages, mask


SHAPES = ("rows", "tokens", "ragged tokens", "ragged tokens, an advantage each")


def denominator(normalizer, keep, mask, shape):
    tokens = 1 if shape == "rows" else TOKENS
    if normalizer == "samples":
        return ROWS
    if normalizer == "batch":
        return ROWS * tokens if mask is None else int(mask.sum())
    if normalizer == "kept":
        return int(keep.sum()) * tokens if mask is None else int(mask[keep].sum())
    return normalizer


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("normalizer", ["batch", "samples", "kept", 7.5, 0.25])
@pytest.mark.parametrize("micro_batch_size", [None, 1, 3, 100])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gate", GATES)
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
    if report.plan == "dense":
        assert (report.forward_rows, report.screened_rows, report.backward_rows) == (ROWS, 0, ROWS)
    else:
        screened = 0 if known else ROWS
        assert (report.screened_rows, report.forward_rows) == (screened, screened + report.kept)
        assert report.backward_rows == report.kept
    valid = torch.ones(ROWS, 1 if shape == "rows" else TOKENS) if mask is None else mask
    if report.plan != "dense":
        assert report.backward_tokens == int(valid[report.decision.keep].sum())
    assert (
        report.forward_tokens - report.backward_tokens
        == report.screened_tokens
        == (valid.sum() * bool(report.screened_rows))
    )


def test_assert_backward_rows_fails_on_another_number():
    policy, batch, advantages, _ = make_case("rows")
    with pytest.raises(AssertionError, match="4 rows passed backward"), assert_backward_rows(policy.layer, 5):
        sj.gated_backward(policy.log_probs, batch, advantages, sj.KondoGate(rate=0.3))


def test_plans_by_counts_and_what_is_known():
    policy, batch, advantages, _ = make_case("rows")

    def plan(gate, **options):
        return sj.gated_backward(policy.log_probs, batch, advantages, gate, **options).plan

    known = policy.log_probs(batch).detach()
    assert plan(sj.KondoGate(rate=0.9), log_probs=known) == "known"
    assert plan(sj.KondoGate(rate=0.3)) == "screen"
    assert plan(sj.KondoGate(rate=0.9)) == "dense"
    assert plan(sj.KondoGate(rate=0.9), micro_batch_size=4) == "screen"
    assert plan(sj.KondoGate(rate=0.9), screen=policy.log_probs) == "screen"
    assert plan(None) == plan(sj.KondoGate(rate=1)) == "dense"


def test_a_screen_of_its_own_decides_but_is_not_differentiated():
    policy, batch, advantages, _ = make_case("rows")
    draft = TinyPolicy(WIDTH, ACTIONS, seed=9, dtype=torch.float64)
    report = sj.gated_backward(policy.log_probs, batch, advantages, sj.KondoGate(rate=0.3), screen=draft.log_probs)
    by_draft = sj.KondoGate(rate=0.3)(sj.delight(advantages, draft.log_probs(batch)))
    assert torch.equal(report.decision.keep, by_draft.keep)
    assert (report.screened_rows, report.forward_rows, report.backward_rows) == (ROWS, 4, 4)
    assert all(parameter.grad is None for parameter in draft.parameters())


def test_screening_leaves_the_random_stream_alone():
    policy, batch, advantages, _ = make_case("rows")
    dropout = torch.nn.Dropout(0.5)

    def noisy(rows):
        return policy.log_probs({**rows, "state": dropout(rows["state"])})

    keep = sj.KondoGate(rate=0.3)
    torch.manual_seed(0)
    sj.gated_backward(noisy, batch, advantages, keep)
    after_screening = torch.rand(1)
    torch.manual_seed(0)
    sj.gated_backward(noisy, batch, advantages, keep, log_probs=policy.log_probs(batch).detach())
    assert torch.equal(after_screening, torch.rand(1))


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
    for score in (scores.uniform_score(torch.Generator().manual_seed(0)), scores.surprisal_score):
        report = sj.gated_backward(policy.log_probs, batch, advantages, sj.KondoGate(rate=0.9), score=score)
        assert report.decision.keep.nonzero().flatten().tolist() == [1, 5]
    assert sj.gated_backward(policy.log_probs, batch, advantages, None).kept == ROWS


def test_whatever_stands_under_the_mask_changes_nothing():
    policy, batch, advantages, mask = make_case("ragged tokens, an advantage each")
    log_probs = policy.log_probs(batch).detach()
    reports = []
    for junk in (0.0, math.nan, math.inf):
        policy.zero_grad()
        dirty = [tensor.masked_fill(~mask, junk) for tensor in (advantages, log_probs)]
        report = sj.gated_backward(
            lambda rows: policy.log_probs(rows).where(rows["mask"], junk),  # noqa: B023
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


def test_flops_count_what_ran():
    policy, batch, advantages, _ = make_case("rows")
    step = sj.GatedBackward(sj.KondoGate(rate=0.3))
    linear = 2 * WIDTH * ACTIONS  # one matrix product a row forward; the input needs no gradient, so one back
    for _ in range(2):
        report = step(policy.log_probs, batch, advantages)
        assert report.forward_flops == linear * (ROWS + 4)
        assert report.backward_flops == linear * 4
        assert report.flops == linear * (ROWS + 8)
    assert sj.gated_backward(policy.log_probs, batch, advantages, None).flops is None


def test_a_resumed_step_plans_as_an_unbroken_one():
    policy, batch, _, _ = make_case("rows")
    step = sj.GatedBackward(sj.KondoGate(price=0))
    step(policy.log_probs, batch, torch.ones(ROWS, dtype=torch.float64))
    resumed = sj.GatedBackward(sj.KondoGate(price=0))
    resumed.load_state_dict(step.state_dict())
    plans = [s(policy.log_probs, batch, torch.ones(ROWS, dtype=torch.float64)).plan for s in (step, resumed)]
    assert plans == ["dense", "dense"]  # everything was kept last time


def wrong(name, value):
    return lambda case: {**case, name: value(case[name]) if callable(value) else value}


WRONG_INPUTS = {
    "NaN advantage": (
        wrong("advantages", lambda a: a.index_fill(0, torch.tensor([3]), math.nan)),
        "advantages has 1 of 13",
    ),
    "infinite advantage": (
        wrong("advantages", lambda a: a.index_fill(0, torch.tensor([3]), math.inf)),
        "advantages has 1",
    ),
    "integer advantages": (wrong("advantages", lambda a: a.long()), "floating-point"),
    "no advantages": (wrong("advantages", [1.0] * ROWS), "no tensor"),
    "short advantages": (wrong("advantages", lambda a: a[:-1]), r"batch\['state'\] has shape"),
    "empty batch": (wrong("advantages", lambda a: a[:0]), "the batch is empty"),
    "a batch of lists": (wrong("batch", {"state": [1, 2]}), "is a list"),
    "NaN known log-probs": (
        wrong("log_probs", lambda p: p.index_fill(0, torch.tensor([0]), math.nan)),
        "log_probs has 1",
    ),
    "positive known log-probs": (wrong("log_probs", lambda p: -p), "at most 0"),
    "short known log-probs": (wrong("log_probs", lambda p: p[:-1]), "same B"),
    "a mask without tokens": (wrong("mask", torch.ones(ROWS)), "mask"),
    "a mask of halves": (wrong("mask", torch.full((ROWS, 2), 0.5)), "mask|log_probs"),
}


@pytest.mark.parametrize("name", WRONG_INPUTS)
def test_wrong_input_is_refused_before_any_gradient(name):
    change, message = WRONG_INPUTS[name]
    policy, batch, advantages, _ = make_case("rows")
    case = change(
        {"batch": batch, "advantages": advantages, "log_probs": policy.log_probs(batch).detach(), "mask": None}
    )
    with pytest.raises(ValueError, match=message):
        sj.gated_backward(policy.log_probs, gate=sj.KondoGate(rate=0.3), **case)
    assert all(parameter.grad is None for parameter in policy.parameters())


@pytest.mark.parametrize(
    ("log_prob_fn", "message"),
    [
        (lambda policy: lambda rows: policy(rows["state"]), "returned shape"),
        (lambda policy: lambda rows: policy.log_probs(rows).detach(), "without a graph"),
        (lambda policy: lambda rows: policy.log_probs(rows) * math.nan, "NaN or infinite"),
        (lambda policy: lambda rows: policy.log_probs(rows).tolist(), "returned a list"),
        (lambda policy: lambda rows: policy.log_probs(rows)[:-1], "returned shape"),
    ],
)
def test_a_wrong_log_prob_function_is_refused_before_any_gradient(log_prob_fn, message):
    policy, batch, advantages, mask = make_case("rows")
    if "shape" in message:
        mask = torch.ones(ROWS, 2)
    with pytest.raises(ValueError, match=message):
        sj.gated_backward(log_prob_fn(policy), batch, advantages, sj.KondoGate(rate=0.3), mask=mask)
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_a_later_nan_names_its_micro_batch():
    policy, batch, advantages, _ = make_case("rows")
    batch["state"][7] = math.nan
    with pytest.raises(ValueError, match="micro-batch 2 of 3"):
        sj.gated_backward(policy.log_probs, batch, advantages, None, micro_batch_size=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalizer": "tokens"}, "normalizer is 'tokens'"),
        ({"normalizer": 0}, "normalizer is 0"),
        ({"micro_batch_size": 0}, "micro_batch_size is 0"),
        ({"gate": 0.03}, "gate is 0.03"),
        ({"loss": lambda p, a, b, m: (a * p).sum()}, "the loss has shape"),
        ({"score": lambda a, p: a.sum()}, "the score has shape"),
        ({"gate": lambda s, cost=None: sj.Decision(s, None, s, s)}, "the gate's keep"),
    ],
)
def test_wrong_options_are_refused(options, message):
    policy, batch, advantages, _ = make_case("rows")
    options = {"gate": sj.KondoGate(rate=0.3), **options}
    with pytest.raises(ValueError, match=message):
        sj.gated_backward(policy.log_probs, batch, advantages, **options)
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_a_batch_of_masked_tokens_only_has_no_gradient():
    policy, batch, advantages, _ = make_case("tokens")
    mask = torch.zeros(ROWS, TOKENS)
    report = sj.gated_backward(policy.log_probs, batch, advantages, sj.KondoGate(rate=0.5), mask=mask)
    assert (report.kept, report.backward_rows) == (0, 0)
    report = sj.gated_backward(policy.log_probs, batch, advantages, None, mask=mask)
    assert (report.kept, report.backward_tokens, report.loss.item()) == (ROWS, 0, 0)
    assert policy.layer.weight.grad.abs().sum() == 0


def test_a_gate_of_ones_own_is_checked():
    policy, batch, advantages, _ = make_case("rows")
    ones = torch.ones(ROWS, dtype=torch.float64)
    wrong_gates = {
        "returned a Tensor": lambda score, cost=None: score > 0,
        "the gate's weight": lambda score, cost=None: sj.Decision(score > 0, None, ones, ones.unsqueeze(1)),
    }
    for message, gate in wrong_gates.items():
        with pytest.raises(ValueError, match=message):
            sj.gated_backward(policy.log_probs, batch, advantages, gate)
    assert policy.layer.weight.grad is None


@pytest.mark.parametrize("rate", [0.3, 0.9])
def test_a_subclass_of_the_gate_keeps_its_weights_in_every_plan(rate):
    class Heavier(sj.KondoGate):
        def __call__(self, score, cost=None):
            decision = super().__call__(score, cost)
            return sj.Decision(decision.keep, decision.price, decision.probability, 10 * decision.weight)

    policy, batch, advantages, _ = make_case("rows")
    gradients = []
    for gate in (sj.KondoGate(rate=rate), Heavier(rate=rate)):
        policy.zero_grad()
        sj.gated_backward(policy.log_probs, batch, advantages, gate)
        gradients.append(policy.layer.weight.grad.clone())
    torch.testing.assert_close(gradients[1], 10 * gradients[0])


def test_rows_of_another_length_than_the_screened_ones_are_refused():
    policy, batch, advantages, _ = make_case("tokens")

    def trimming(rows):
        return policy.log_probs(rows)[:, : 2 + len(rows["state"]) // ROWS]

    with pytest.raises(ValueError, match="pad all rows"):
        sj.gated_backward(trimming, batch, advantages, sj.KondoGate(rate=0.3))


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
