"""Wrong input is refused with a sentence, before any gradient is touched."""

import math
import warnings

import pytest
import torch
from engine_cases import ACTIONS, ROWS, make_case
from gates_of_users import BestOfAll

import sparkjoy as sj
from sparkjoy.scores import advantage_score


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
    "complex advantages": (wrong("advantages", lambda a: a * 1j), "real numbers"),
    "no advantages": (wrong("advantages", None), "advantages is a NoneType that no tensor"),
    "advantages of three dimensions": (wrong("advantages", lambda a: a.view(-1, 1, 1)), r"expected \(B,\) or \(B, T\)"),
    "short advantages": (wrong("advantages", lambda a: a[:-1]), r"batch\['state'\] has shape"),
    "empty batch": (wrong("advantages", lambda a: a[:0]), "the batch is empty"),
    "a batch of lists": (wrong("batch", {"state": [1, 2]}), r"a list of 2; expected one of 13"),
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


@pytest.mark.parametrize("gate", [sj.KondoGate(price=0), sj.KondoGate(rate=0.3), None])
def test_advantages_may_be_what_reward_functions_return(gate):
    policy, batch, _, _ = make_case("rows", dtype=torch.float32)
    signs = torch.arange(ROWS) % 3 - 1
    gradients = []
    for advantages in (signs.float(), signs, signs.tolist(), signs.numpy(), signs.double().tolist()):
        sj.gated_backward(policy.log_probs, batch, advantages, gate)
        gradients.append(policy.layer.weight.grad)
        policy.zero_grad()
    assert gradients[0].abs().sum() > 0
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


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


def test_log_probs_of_every_action_are_told_from_those_of_tokens():
    policy, batch, advantages, _ = make_case("rows")

    def ungathered(rows):
        return policy(rows["state"])

    def of_a_fresh_head(rows):
        return 0 * policy(rows["state"]) - math.log(ACTIONS)

    with pytest.warns(UserWarning, match=r"add up to 1 in every row.*gather"):
        sj.gated_backward(ungathered, batch, advantages, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sj.gated_backward(ungathered, batch, advantages, None, mask=torch.ones(ROWS, ACTIONS))
        sj.gated_backward(lambda rows: ungathered(rows) * 1.01, batch, advantages, None)
        sj.gated_backward(of_a_fresh_head, batch, advantages, None)


def test_a_draft_of_the_wrong_shape_is_named():
    policy, batch, advantages, _ = make_case("rows")
    step = sj.GatedBackward(sj.KondoGate(rate=0.3), draft=sj.Draft(lambda rows: policy.log_probs(rows)[:-1], verify=2))
    with pytest.raises(ValueError, match=r"^the draft returned shape"):
        step(policy.log_probs, batch, advantages)
    step = sj.GatedBackward(sj.KondoGate(rate=0.3), draft=sj.Draft(lambda rows: 2 * policy(rows["state"]), verify=2))
    with pytest.raises(ValueError, match=r"^the log-prob function returned rows of"):
        step(policy.log_probs, batch, advantages)


def test_a_draft_of_what_no_score_reads_is_refused():
    policy, *_ = make_case("rows")
    with pytest.raises(ValueError, match="reads no log-probs, the function advantage_score"):
        sj.GatedBackward(sj.KondoGate(rate=0.3), score=advantage_score, draft=sj.Draft(policy.log_probs))


def test_a_later_nan_names_its_micro_batch():
    policy, batch, advantages, _ = make_case("rows")
    batch["state"][7] = math.nan
    with pytest.raises(ValueError, match="micro-batch 2 of 3"):
        sj.gated_backward(policy.log_probs, batch, advantages, None, micro_batch_size=5)


@pytest.mark.parametrize("shape", [(), (3,)])
def test_a_function_that_is_wrong_for_one_row_is_told_what_to_do(shape):
    weights = torch.zeros(ROWS, *shape, requires_grad=True)
    norm = torch.nn.BatchNorm1d(4)
    functions = {
        r"write .squeeze\(1\)": lambda rows: weights[rows["index"]].squeeze() - 1,
        r"BatchNorm in training mode refuses: .* eval\(\)": lambda rows: (
            weights[rows["index"]] - 1 + 0 * norm(rows["x"])[0, 0]
        ),
    }
    batch = {"index": torch.arange(ROWS), "x": torch.randn(ROWS, 4)}
    for message, log_prob_fn in functions.items():
        with pytest.raises(ValueError, match=message):
            sj.gated_backward(log_prob_fn, batch, torch.rand(ROWS) + 1, sj.KondoGate(rate=0.01))
    assert weights.grad is None


@pytest.mark.parametrize(
    "given", [{"log_probs": -torch.ones(6)}, {"log_probs": -torch.ones(6, 3)}, {"mask": torch.ones(6, 3)}]
)
def test_advantages_of_one_column_are_told_what_to_do(given):
    message = r"advantages has shape \(6, 1\).*advantages.squeeze\(-1\)"
    with pytest.raises(ValueError, match=message):
        sj.select(sj.KondoGate(rate=0.5), torch.ones(6, 1), **given)
    with pytest.raises(ValueError, match=message):
        sj.gated_backward(lambda rows: rows, torch.ones(6), torch.ones(6, 1), sj.KondoGate(rate=0.5), **given)


LATE = {
    "another shape": lambda log_probs: log_probs[:, None],
    "a list": torch.Tensor.tolist,
    "no graph": torch.Tensor.detach,
    "whole numbers": torch.Tensor.long,
    "no rows": lambda log_probs: log_probs[:0],
    "NaN": lambda log_probs: log_probs * math.nan,
    "above 0, found last": lambda log_probs: -log_probs,
}


@pytest.mark.parametrize("late", LATE)
@pytest.mark.parametrize("first", [1, 2])
def test_an_error_says_whether_grad_has_changed(late, first):
    policy, batch, advantages, _ = make_case("rows")
    known, passes = policy.log_probs(batch).detach(), 0

    def log_prob_fn(rows):
        nonlocal passes
        passes += 1
        return LATE[late](policy.log_probs(rows)) if passes >= first else policy.log_probs(rows)

    step = sj.GatedBackward(sj.UnbiasedGate(1e-6), micro_batch_size=3)
    with pytest.raises(ValueError, match=r"log-prob|log_prob") as raised:
        step(log_prob_fn, batch, advantages, log_probs=known)
    changed = any(parameter.grad is not None for parameter in policy.parameters())
    assert changed == (".grad: zero it" in str(raised.value)) == (first == 2 or late.startswith("above 0"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalizer": "tokens"}, "normalizer is 'tokens'"),
        ({"normalizer": 0}, "normalizer is 0"),
        ({"normalizer": "kept", "gate": sj.UnbiasedGate()}, r"several times the dense one. Take 'batch'"),
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
    with pytest.raises((ValueError, TypeError), match=message):
        sj.gated_backward(policy.log_probs, batch, advantages, **options)
    assert all(parameter.grad is None for parameter in policy.parameters())


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


def test_rows_of_another_length_than_the_screened_ones_are_refused():
    policy, batch, advantages, _ = make_case("tokens")

    def trimming(rows):
        return policy.log_probs(rows)[:, : 2 + len(rows["state"]) // 7]

    with pytest.raises(ValueError, match="pad all rows"):
        sj.gated_backward(trimming, batch, advantages, sj.KondoGate(rate=0.3))


def test_a_gate_that_does_not_look_is_not_given_what_is_no_number():
    """One of a user's own with a rule, which decides on known log-probs."""
    policy, batch, advantages, _ = make_case("rows")
    advantages[1] = torch.nan
    with pytest.raises(ValueError, match="advantages has 1 of 13 values NaN or infinite"):
        sj.gated_backward(
            policy.log_probs, batch, advantages, BestOfAll(0.3), log_probs=policy.log_probs(batch).detach()
        )


def test_a_step_takes_no_attribute_that_would_change_nothing():
    step = sj.GatedBackward(sj.KondoGate(rate=0.3))
    for name, value in {"normalizer": 3.0, "gate": sj.UnbiasedGate()}.items():
        with pytest.raises(AttributeError):
            setattr(step, name, value)
    assert step.gate.rate == 0.3
