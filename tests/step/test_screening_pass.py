import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

import sparkjoy as sj

ROWS = 32
PARAMETRIZED = {
    "weight norm": weight_norm,
    "orthogonal": orthogonal,
    "spectral norm": lambda layer: spectral_norm(layer).eval(),  # in training every reading of the weight changes it
}
PLANS = {  # the rate, the advantages' signs, r, and whether log-probs are given
    "known": (0.25, 1, None, True),
    "signs": (0.5, 0, None, False),
    "screen": (0.25, 1, None, False),
    "dense": (0.9, 1, None, False),
}


def make_policy(parametrized=weight_norm):
    torch.manual_seed(0)
    net = nn.Sequential(parametrized(nn.Linear(6, 16)), nn.Tanh(), nn.Linear(16, 4)).double()
    batch = {"states": torch.randn(ROWS, 6).double(), "actions": torch.randint(4, (ROWS,))}

    def log_prob_fn(rows):
        return net(rows["states"]).log_softmax(1).gather(1, rows["actions"][:, None]).squeeze(1)

    return net, batch, log_prob_fn


def gradients(net):
    found = {name: parameter.grad for name, parameter in net.named_parameters()}
    net.zero_grad()
    return found


def assert_equal_gradients(found, expected):
    for name, gradient in expected.items():
        assert found[name] is not None, name
        assert (found[name] - gradient).abs().max() < 1e-12, name


@pytest.mark.parametrize("parametrized", PARAMETRIZED)
@pytest.mark.parametrize(
    ("plan", "micro_batch_size"),
    [*((plan, None) for plan in PLANS), *((plan, 5) for plan in PLANS if plan != "dense")],
)
def test_weights_cached_around_a_step_get_their_gradients(parametrized, plan, micro_batch_size):
    net, batch, log_prob_fn = make_policy(PARAMETRIZED[parametrized])
    rate, sign, ratio, known = PLANS[plan]
    advantages = torch.rand(ROWS).double() + 0.1
    if sign == 0:
        advantages[ROWS // 2 :] *= 0
    log_probs = log_prob_fn(batch).detach() if known else None
    step = sj.GatedBackward(sj.KondoGate(rate=rate), micro_batch_size=micro_batch_size, backward_over_forward=ratio)
    with parametrize.cached():
        report = step(log_prob_fn, batch, advantages, log_probs=log_probs)
    assert report.plan == plan
    found = gradients(net)
    (-(advantages * report.decision.keep) * log_prob_fn(batch)).mean().backward()
    assert_equal_gradients(found, gradients(net))


def test_a_draft_and_its_verification_leave_cached_weights_alone():
    net, batch, log_prob_fn = make_policy()
    advantages = torch.randn(ROWS).double()
    step = sj.GatedBackward(sj.KondoGate(rate=0.25), draft=sj.Draft(log_prob_fn, verify=2))
    with parametrize.cached():
        report = step(log_prob_fn, batch, advantages)
    found = gradients(net)
    (-(advantages * report.decision.keep) * log_prob_fn(batch)).mean().backward()
    assert_equal_gradients(found, gradients(net))


@pytest.mark.parametrize("kept", [0, 8])
def test_what_the_caller_cached_is_still_there_after_a_step(kept):
    """A term of the caller's own, read before the step and differentiated after it, and another one after it."""
    net, batch, log_prob_fn = make_policy()
    gate = sj.KondoGate(price=1e6) if kept == 0 else sj.KondoGate(rate=kept / ROWS)
    advantages = torch.ones(ROWS).double()
    with parametrize.cached():
        before = net(batch["states"]).square().mean()
        weight = net[0].weight
        report = sj.GatedBackward(gate)(log_prob_fn, batch, advantages)
        assert net[0].weight is weight
        after = net(batch["states"]).abs().mean()
        (before + after).backward()
    assert report.kept == kept
    found = gradients(net)
    loss = (-(advantages * report.decision.keep) * log_prob_fn(batch)).mean()
    (loss + net(batch["states"]).square().mean() + net(batch["states"]).abs().mean()).backward()
    assert_equal_gradients(found, gradients(net))


def test_a_failing_function_leaves_the_callers_cache():
    net, batch, _ = make_policy()

    def failing(rows):
        net(rows["states"])
        raise KeyError("reward")

    with parametrize.cached():
        weight = net[0].weight
        with pytest.raises(KeyError, match="reward"):
            sj.GatedBackward(sj.KondoGate(rate=0.25))(failing, batch, torch.ones(ROWS).double())
        assert net[0].weight is weight


class Casts(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket is torch.ops.aten._to_copy
        return func(*args, **(kwargs or {}))


def test_screening_leaves_nothing_in_the_cache_of_autocast():
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    states = torch.randn(ROWS, 6, dtype=torch.bfloat16)

    def log_prob_fn(rows):
        return layer(rows).float().log_softmax(1)[:, 0]

    def casts():
        with torch.no_grad(), Casts() as count:
            layer(states)
        return count.count

    with torch.autocast("cpu", torch.bfloat16):
        assert (casts(), casts()) == (2, 0)  # weight and bias, once
        report = sj.GatedBackward(sj.KondoGate(price=1e6))(log_prob_fn, states, torch.ones(ROWS))
        assert (report.screened_rows, report.kept) == (ROWS, 0)
        assert casts() == 2


@pytest.mark.parametrize("where", ["around the step", "in the function", "both"])
@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_gradients_under_autocast_are_those_of_the_masked_loop(where, micro_batch_size):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    states, advantages = torch.randn(ROWS, 6), torch.rand(ROWS)

    def plain(rows):
        return net(rows).float().log_softmax(1)[:, 0]

    def casting(rows):
        with torch.autocast("cpu", torch.bfloat16):
            return plain(rows)

    log_prob_fn = plain if where == "around the step" else casting
    with torch.autocast("cpu", torch.bfloat16, enabled=where != "in the function"):
        report = sj.GatedBackward(sj.KondoGate(rate=0.25), micro_batch_size=micro_batch_size)(
            log_prob_fn, states, advantages
        )
    found = gradients(net)
    (-(advantages * report.decision.keep) * casting(states)).mean().backward()
    for name, expected in gradients(net).items():
        assert found[name] is not None, name
        assert (found[name] - expected).norm() <= 0.02 * expected.norm(), name  # rounding to bfloat16
