import threading
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.utils.checkpoint import checkpoint

import sparkjoy as sj

ROWS = 32


def make_policy(optimizer=None, seed=1):
    """A policy whose parameters step by themselves, and forget their gradients, as soon as these are there."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    steps = []
    if optimizer is not None:
        each = {parameter: optimizer([parameter]) for parameter in net.parameters()}

        def hook(parameter):
            steps.append(parameter)
            each[parameter].step()
            each[parameter].zero_grad()

        for parameter in net.parameters():
            parameter.register_post_accumulate_grad_hook(hook)

    def log_prob_fn(rows):
        return net(rows["states"]).log_softmax(1).gather(1, rows["actions"][:, None]).squeeze(1)

    return net, log_prob_fn, steps


def make_batch():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(ROWS, 6, generator=generator).double()
    return {"states": states, "actions": torch.randint(4, (ROWS,), generator=generator)}


def weights(net):
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


FEW = -torch.rand(ROWS, generator=torch.Generator().manual_seed(0)).double()
FEW[:4] *= -1
STEPPING = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.1),
    "adam": lambda parameters: torch.optim.Adam(parameters, 1e-2),
}


@pytest.mark.parametrize("optimizer", STEPPING)
@pytest.mark.parametrize("advantages", [FEW.abs(), FEW], ids=["positive", "few positive"])
@pytest.mark.parametrize("rate", [0.5, 0.95, 1.0])
@pytest.mark.parametrize("micro_batch_size", [None, ROWS])
def test_one_pass_is_one_step(optimizer, advantages, rate, micro_batch_size):
    net, log_prob_fn, steps = make_policy(STEPPING[optimizer])
    step = sj.GatedBackward(sj.KondoGate(rate=rate), micro_batch_size=micro_batch_size)
    report = step(log_prob_fn, make_batch(), advantages)
    assert len(steps) == 4  # each parameter once
    plain, plain_log_probs, _ = make_policy(STEPPING[optimizer])
    (-(advantages * report.decision.keep) * plain_log_probs(make_batch())).mean().backward()
    assert (weights(net) - weights(plain)).abs().max() < 1e-12


@pytest.mark.parametrize(
    "options",
    [
        {"micro_batch_size": 5},
        {"micro_batch_size": ROWS - 1},
        {"micro_batch_size": ROWS - 1, "gate": None},
        {"micro_batch_size": 5, "gate": sj.UnbiasedGate(rate=0.5)},
        {"micro_batch_size": 30, "gate": sj.KondoGate(rate=0.9), "advantages": FEW.clamp(min=0)},
    ],
)
def test_several_passes_are_refused_before_the_first(options):
    net, log_prob_fn, steps = make_policy(STEPPING["sgd"])
    before = weights(net)
    options = {"gate": sj.KondoGate(rate=0.1), "advantages": FEW.abs(), **options}
    with pytest.raises(ValueError, match="hook that runs as soon as its gradient has arrived"):
        sj.gated_backward(log_prob_fn, make_batch(), **options)
    assert torch.equal(weights(net), before)
    assert not steps
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_dense_plan_is_refused_as_a_screened_one_would_be():
    _, log_prob_fn, steps = make_policy(STEPPING["sgd"])
    advantages = FEW.abs()
    advantages[20:] = 0
    options = {"micro_batch_size": 24, "backward_over_forward": 0.01}
    plain = make_policy()[1]
    assert sj.gated_backward(plain, make_batch(), advantages, sj.KondoGate(rate=0.5), **options).plan == "dense"
    with pytest.raises(ValueError, match="hook"):
        sj.gated_backward(log_prob_fn, make_batch(), advantages, sj.KondoGate(rate=0.5), **options)
    assert not steps


def test_tokens_divide_too():
    torch.manual_seed(0)
    table = nn.Parameter(torch.zeros(6, 3))
    table.register_post_accumulate_grad_hook(lambda parameter: None)
    tokens, mask = torch.randint(3, (6, 4)), torch.ones(6, 4)

    def log_prob_fn(rows):
        return table.log_softmax(1)[rows["index"]].gather(1, rows["tokens"])

    batch = {"index": torch.arange(6), "tokens": tokens}
    with pytest.raises(ValueError, match="micro_batch_tokens"):
        sj.gated_backward(log_prob_fn, batch, torch.ones(6), None, mask=mask, micro_batch_tokens=8)
    sj.gated_backward(log_prob_fn, batch, torch.ones(6), None, mask=mask, micro_batch_tokens=24)
    assert table.grad is not None


def test_torchs_own_optimizers_in_the_backward_pass_are_found():
    net, log_prob_fn, _ = make_policy()
    _apply_optimizer_in_backward(torch.optim.SGD, net.parameters(), {"lr": 0.1})
    before = weights(net)
    with pytest.raises(ValueError, match="hook"):
        sj.gated_backward(log_prob_fn, make_batch(), FEW.abs(), None, micro_batch_size=5)
    with pytest.raises(ValueError, match="hook"):
        sj.frontier(log_prob_fn, make_batch(), FEW.abs(), rounds=1)
    assert torch.equal(weights(net), before)


@pytest.mark.parametrize("measure", ["micro-batches", "compare_every", "frontier"])
def test_what_steps_inside_of_a_reentrant_checkpoint_is_refused_before_it_does(measure):
    net, _, steps = make_policy(STEPPING["sgd"])
    before = weights(net)

    def log_prob_fn(rows):
        logits = checkpoint(net, rows["states"].clone().requires_grad_(), use_reentrant=True)
        return logits.log_softmax(1).gather(1, rows["actions"][:, None]).squeeze(1)

    calls = {
        "micro-batches": sj.GatedBackward(sj.KondoGate(rate=0.5), micro_batch_size=5),
        "compare_every": sj.GatedBackward(sj.KondoGate(rate=0.5), compare_every=1),
        "frontier": partial(sj.frontier, rounds=1),
    }
    with pytest.raises(ValueError, match="hook that runs as soon as its gradient has arrived"):
        calls[measure](log_prob_fn, make_batch(), FEW.abs())
    assert torch.equal(weights(net), before)
    assert not steps
    assert torch.autograd.backward.__module__ == "torch.autograd"


def test_backward_passes_of_other_threads_are_not_looked_at():
    net = make_policy()[0]
    other = make_policy(STEPPING["sgd"])[0]

    def elsewhere():
        states = make_batch()["states"].requires_grad_()
        checkpoint(other, states, use_reentrant=True).sum().backward()

    def checkpointed(rows):
        def inner(states):
            if torch.is_grad_enabled():  # in the backward pass
                thread = threading.Thread(target=elsewhere)
                thread.start()
                thread.join()
            return net(states)

        logits = checkpoint(inner, rows["states"].clone().requires_grad_(), use_reentrant=True)
        return logits.log_softmax(1).gather(1, rows["actions"][:, None]).squeeze(1)

    before = weights(other)
    report = sj.GatedBackward(sj.KondoGate(rate=0.5), compare_every=1)(checkpointed, make_batch(), FEW.abs())
    assert report.comparison.cosine is not None
    assert not torch.equal(weights(other), before)  # its own optimizer has stepped


def test_hooks_are_found_behind_a_compiled_function():
    torch._dynamo.reset()
    net, _, steps = make_policy(STEPPING["sgd"])
    compiled = torch.compile(net, backend="aot_eager")

    def log_prob_fn(rows):
        return compiled(rows["states"]).log_softmax(1)[:, 0]

    with pytest.raises(ValueError, match="hook"):
        sj.gated_backward(log_prob_fn, make_batch(), FEW.abs(), None, micro_batch_size=5)
    assert not steps


def test_hooks_of_parameters_that_get_no_gradient_are_no_matter():
    net, log_prob_fn, _ = make_policy()
    other = nn.Linear(2, 2)
    other.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    net[0].weight.register_post_accumulate_grad_hook(lambda parameter: None)
    net[0].requires_grad_(False)
    report = sj.gated_backward(log_prob_fn, make_batch(), FEW.abs(), None, micro_batch_size=5)
    assert report.backward_rows == ROWS
