"""Numbers on their way through a pass: low precision, divided losses, densities, padding that is no number."""

import math
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from engine_cases import ROWS, SHAPES, make_case

import sparkjoy as sj
from sparkjoy.scores import advantage_score
from sparkjoy_lab.scores import absolute_advantage_score, surprisal_score

GATES = [None, sj.KondoGate(rate=0.4), sj.KondoGate(price=0), sj.KondoGate(rate=1), sj.UnbiasedGate(rate=0.4)]


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("how", ["method", "partial"])
@pytest.mark.parametrize("micro_batch_size", [None, 4])
def test_accelerates_division_is_undone(steps, how, micro_batch_size):
    policy, batch, advantages, _ = make_case("rows")
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps)
    backward = accelerator.backward if how == "method" else partial(accelerator.backward, retain_graph=False)
    losses, gradients = [], []
    for options in ({}, {"backward": backward}):
        policy.zero_grad()
        gate = sj.KondoGate(rate=0.5)
        report = sj.gated_backward(
            policy.log_probs, batch, advantages, gate, micro_batch_size=micro_batch_size, **options
        )
        losses.append(report.loss)
        gradients.append(policy.layer.weight.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(losses[1], losses[0])


def test_a_scaled_backward_stays_scaled():
    policy, batch, advantages, _ = make_case("rows")
    sj.gated_backward(policy.log_probs, batch, advantages, None)
    expected = 1024 * policy.layer.weight.grad
    policy.zero_grad()
    sj.gated_backward(policy.log_probs, batch, advantages, None, backward=lambda loss: (1024 * loss).backward())
    torch.testing.assert_close(policy.layer.weight.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gate", GATES, ids=repr)
@pytest.mark.parametrize("of_advantages", [torch.float16, torch.float32])
def test_sums_of_low_precision_are_float32s(dtype, gate, of_advantages):
    rows, tokens = 64, 2048
    weights = torch.zeros(rows, tokens, dtype=dtype, requires_grad=True)
    report = sj.gated_backward(
        lambda part: weights[part] - 1,
        torch.arange(rows),
        torch.ones(rows, dtype=of_advantages),
        gate,
        mask=torch.ones(rows, tokens),
        loss=lambda log_probs, advantages, behavior, mask: -500 * advantages[:, None] * log_probs,
        normalizer="kept" if isinstance(gate, sj.KondoGate) else "batch",
    )
    weight = report.decision.weight[report.decision.keep].sum().item() / (
        report.kept if "Kondo" in repr(gate) else rows
    )
    assert report.loss.item() == pytest.approx(500 * weight, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["given", "screened"])
@pytest.mark.parametrize("tokens", [(), (3,)])
def test_log_probs_are_above_zero_by_the_rounding_of_their_own_dtype(dtype, kind, tokens):
    rounding = 8 * torch.finfo(dtype).eps
    values = torch.full((4, *tokens), -1.0)
    values[1] = rounding
    weights = torch.zeros(4, *tokens, requires_grad=True)
    known = {"log_probs": values.to(dtype)} if kind == "given" else {}

    def log_prob_fn(rows):
        return (values[rows] + weights[rows]).to(dtype)

    gate = sj.KondoGate(rate=0.5)
    report = sj.gated_backward(log_prob_fn, torch.arange(4), torch.tensor([1.0, 1.0, 2.0, 3.0]), gate, **known)
    assert report.decision.keep.tolist() == [False, False, True, True]
    values[1] = 4 * rounding
    known = {"log_probs": values.to(dtype)} if kind == "given" else {}
    with pytest.raises(ValueError, match="discrete action"):
        sj.gated_backward(log_prob_fn, torch.arange(4), torch.ones(4), gate, **known)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_log_probs_may_have_been_converted_from_a_coarser_dtype(dtype):
    log_probs = torch.linspace(-3, 0, 64).to(dtype)
    log_probs[3] = rounding = 8 * torch.finfo(dtype).eps
    converted = log_probs.to(torch.float32)
    assert torch.equal(sj.surprisal(converted), -converted.clamp(max=0))
    assert torch.equal(sj.surprisal(log_probs.double()), -log_probs.double().clamp(max=0))
    converted[5] += 1e-5  # now they were computed in float32, whose rounding does not reach as far
    with pytest.raises(ValueError, match=f"a value of {rounding:g}"):
        sj.surprisal(converted)
    with pytest.raises(ValueError, match=r"a value of 0\.5"):
        sj.surprisal(torch.tensor([0.5, -1.0]))


class Gaussian(torch.nn.Module):
    """Actions near a learned mean: densities, above 1 where the policy is sharp."""

    def __init__(self, scale):
        super().__init__()
        self.mean, self.scale = torch.nn.Parameter(torch.zeros(())), scale

    def forward(self, actions):
        return torch.distributions.Normal(self.mean, self.scale).log_prob(actions)


DENSITY_CASES = {
    "known": (sj.KondoGate(rate=0.25), lambda policy, actions: {"log_probs": policy(actions).detach()}),
    "screened": (sj.KondoGate(rate=0.25), lambda policy, actions: {}),
    "signs": (sj.KondoGate(price=0), lambda policy, actions: {}),
    "signs, in micro-batches": (sj.KondoGate(price=0), lambda policy, actions: {"micro_batch_size": 5}),
    "signs, of kept": (sj.KondoGate(price=0), lambda policy, actions: {"normalizer": "kept"}),
    "signs, of some": (sj.KondoGate(rate=0.75), lambda policy, actions: {}),
    "everything": (sj.KondoGate(rate=1), lambda policy, actions: {}),
    "everything, known": (sj.KondoGate(rate=1), lambda policy, actions: {"log_probs": policy(actions).detach()}),
    "sampled": (sj.UnbiasedGate(rate=0.25), lambda policy, actions: {"score": sj.update_size}),
    "surprisal": (sj.KondoGate(rate=0.25), lambda policy, actions: {"score": surprisal_score}),
}


@pytest.mark.parametrize("name", DENSITY_CASES)
@pytest.mark.parametrize("tokens", [False, True])
def test_densities_are_refused_by_name_whatever_decides(name, tokens):
    gate, options = DENSITY_CASES[name]
    policy, actions = Gaussian(0.01), 0.01 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    log_prob_fn, mask = policy, {}
    if tokens:
        mask = {"mask": torch.tensor([[1, 0]]).expand(32, 2)}
        options = DENSITY_CASES[name][1]

        def log_prob_fn(rows):
            return torch.stack([policy(rows), torch.full_like(rows, 5.0)], dim=1)  # the second is padding

    advantages = torch.linspace(-1, 1, 32)
    with pytest.raises(ValueError, match=r"densities.*advantage_score"):
        sj.gated_backward(log_prob_fn, actions, advantages, gate, **options(log_prob_fn, actions), **mask)
    assert policy.mean.grad is None


@pytest.mark.parametrize("scale", [1.0, 0.1, 0.001])
def test_the_advised_score_keeps_successes_however_sharp_a_density(scale):
    policy, actions = Gaussian(scale), scale * torch.randn(32, generator=torch.Generator().manual_seed(0))
    advantages = torch.linspace(-1, 1, 32)
    report = sj.gated_backward(policy, actions, advantages, sj.KondoGate(rate=0.25), score=advantage_score)
    assert report.decision.keep.nonzero().flatten().tolist() == list(range(24, 32))
    assert policy.mean.grad is not None
    peak = Gaussian(scale)(torch.zeros(())).item()
    report = sj.gated_backward(
        policy,
        actions,
        advantages,
        sj.KondoGate(rate=0.25),
        score=lambda advantages, log_probs: advantages * (peak - log_probs),
    )
    assert bool((advantages[report.decision.keep] > 0).all())


@pytest.mark.parametrize(
    "options", [{"gate": None}, {"gate": sj.KondoGate(rate=0.5), "score": absolute_advantage_score}]
)
def test_densities_have_a_plain_policy_gradient(options):
    policy, actions = Gaussian(0.01), torch.tensor([0.01, -0.01, 0.02, 0.0])
    advantages = torch.tensor([1.0, 0.5, -1.0, 0.25])
    report = sj.gated_backward(policy, actions, advantages, **options)
    gradient = policy.mean.grad.clone()
    policy.zero_grad()
    (-(advantages * report.decision.keep) * policy(actions)).mean().backward()
    torch.testing.assert_close(gradient, policy.mean.grad)


def ragged_case():
    policy, batch, advantages, mask = make_case("ragged tokens")
    return policy, {**batch, "mask": mask}, advantages, mask


@pytest.mark.parametrize("gate", GATES, ids=repr)
@pytest.mark.parametrize("micro_batch_size", [None, 4])
@pytest.mark.parametrize("why", ["NaN states", "the log of a masked probability"])
def test_padding_that_would_turn_the_gradient_nan_is_refused_before_it_does(gate, micro_batch_size, why):
    policy, batch, advantages, mask = ragged_case()
    if why == "NaN states":
        batch["state"] = batch["state"].masked_fill(~mask.unsqueeze(2), math.nan)

    def log_prob_fn(rows):
        log_probs = policy.log_probs(rows)
        return log_probs if why == "NaN states" else (log_probs.exp() * rows["mask"]).log()

    with pytest.raises(ValueError, match="0 times NaN"):
        sj.gated_backward(log_prob_fn, batch, advantages, gate, mask=mask, micro_batch_size=micro_batch_size)
    assert all(parameter.grad is None for parameter in policy.parameters())


@pytest.mark.parametrize("gate", GATES[:-1], ids=repr)
@pytest.mark.parametrize("junk", [math.nan, -math.inf])
def test_padding_overwritten_afterwards_changes_nothing(gate, junk):
    policy, batch, advantages, mask = ragged_case()
    found = []
    for padding in (0.0, junk):
        policy.zero_grad()
        report = sj.gated_backward(
            lambda rows, padding=padding: policy.log_probs(rows).where(rows["mask"], padding),
            batch,
            advantages,
            gate,
            mask=mask,
        )
        found.append((report.loss, report.backward_rows, report.backward_tokens, policy.layer.weight.grad))
    assert found[0][:3] == found[1][:3]
    assert torch.equal(found[0][3], found[1][3])


def test_padding_that_cannot_be_tried_is_refused():
    policy, batch, advantages, mask = ragged_case()

    class Once(torch.autograd.Function):
        """As a compiled graph with donated buffers: differentiated once, and never with retain_graph."""

        @staticmethod
        def forward(ctx, log_probs, mask):
            ctx.save_for_backward(mask)
            return log_probs.where(mask, math.nan)

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("this graph cannot be differentiated twice")

    with pytest.raises(ValueError, match="mask is 0"):
        sj.gated_backward(
            lambda rows: Once.apply(policy.log_probs(rows), rows["mask"]), batch, advantages, None, mask=mask
        )
    assert policy.layer.weight.grad is None


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gate", GATES[:-1], ids=repr)
@pytest.mark.parametrize("micro_batch_size", [None, 5])
def test_a_function_may_write_into_its_rows(shape, gate, micro_batch_size):
    policy, batch, advantages, mask = make_case(shape)
    before = {name: tensor.clone() for name, tensor in batch.items()}

    def normalises(rows):
        rows["state"].sub_(1).mul_(0.5)
        rows["action"].add_(1).remainder_(6)
        return policy.log_probs(rows)

    report = sj.gated_backward(normalises, batch, advantages, gate, mask=mask, micro_batch_size=micro_batch_size)
    assert all(torch.equal(batch[name], before[name]) for name in batch)
    gradient = policy.layer.weight.grad.clone()
    policy.zero_grad()
    changed = {"state": (batch["state"] - 1) / 2, "action": (batch["action"] + 1) % 6}
    log_probs = policy.log_probs(changed)
    valid = torch.ones_like(log_probs) if mask is None else mask.to(log_probs.dtype)
    keep = report.decision.keep.to(log_probs.dtype)
    terms = -(advantages.view(ROWS, -1) * keep.view(ROWS, 1)) * log_probs.view(ROWS, -1) * valid.view(ROWS, -1)
    (terms.sum() / valid.sum()).backward()
    torch.testing.assert_close(gradient, policy.layer.weight.grad)


class Counting:
    """Counts what it accumulates, and divides nothing."""

    gradient_accumulation_steps = 4

    def backward(self, loss):
        loss.backward()


class Halving(Accelerator):
    """With a backward of its own, so that what it divides by is not known."""

    def backward(self, loss, **options):
        super().backward(2 * loss, **options)


@pytest.mark.parametrize(
    ("make", "factor"), [(Counting, 1), (partial(Halving, cpu=True, gradient_accumulation_steps=4), 0.5)]
)
def test_a_backward_that_is_not_accelerates_own_is_left_alone(make, factor):
    policy, batch, advantages, _ = make_case("rows")
    gradients = []
    for backward in (torch.Tensor.backward, make().backward):
        sj.gated_backward(policy.log_probs, batch, advantages, None, backward=backward)
        gradients.append(policy.layer.weight.grad)
        policy.zero_grad()
    torch.testing.assert_close(gradients[1], factor * gradients[0])
