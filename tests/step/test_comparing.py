"""The gated gradient beside the dense one: the figures are right, and the step is the one it would be without."""

import copy
import json
import math
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from engine_cases import ACTIONS, ROWS, SHAPES, make_case
from engine_cases import WIDTH as WIDTH_OF_STATES
from gates_of_users import BestOfAll
from launching import run_processes
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparkjoy as sj
from sparkjoy.gradients import WIDTH, WINDOW, Comparisons, Gradients, sketches
from sparkjoy_lab.prices import RollingQuantile

BACKWARD = torch.autograd.backward
GATES = {
    "hard": lambda: sj.KondoGate(rate=0.3),
    "rolling": lambda: sj.KondoGate(price=RollingQuantile(0.3)),
    "soft": lambda: sj.SoftGate(1.0, price=0.0, generator=torch.Generator().manual_seed(1)),
    "noise": lambda: sj.UnbiasedGate(noise=0.3, generator=torch.Generator().manual_seed(1)),
}


def flat(policy):
    return torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 2}, {"normalizer": "samples", "loss": sj.delightful()}])
@pytest.mark.parametrize("gate", GATES)
def test_a_compared_step_is_to_the_bit_the_one_it_would_be(gate, options):
    policy, batch, advantages, mask = make_case("ragged tokens", dtype=torch.float32)
    left = []
    for every in (None, 2):
        model, dropout = copy.deepcopy(policy), nn.Dropout(0.2)
        step = sj.GatedBackward(GATES[gate](), compare_every=every, **options)

        def log_prob_fn(rows, model=model, dropout=dropout):
            return model.log_probs({**rows, "state": dropout(rows["state"])})

        reports = []
        for seed in range(4):  # .grad adds up over all
            torch.manual_seed(seed)  # the dense passes draw masks of their own
            reports.append(step(log_prob_fn, batch, advantages, mask=mask))
        assert [report.comparison is not None for report in reports] == [every and n % 2 == 1 for n in range(4)] or [
            report.comparison for report in reports
        ] == [None] * 4
        state = step.state_dict()
        left.append((model, state["gate"], state["kept_fraction"], reports))
    (plain, state, fraction, first), (compared, same_state, same_fraction, second) = left
    for one, other in zip(plain.parameters(), compared.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    assert str(state) == str(same_state)
    assert fraction == same_fraction
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.decision.keep, other.decision.keep)
        assert (one.forward_rows, one.backward_rows) == (other.forward_rows, other.backward_rows)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("normalizer", ["batch", "kept"])
@pytest.mark.parametrize("before", [False, True])
def test_figures_are_those_of_the_two_gradients(shape, normalizer, before):
    policy, batch, advantages, mask = make_case(shape)
    found = {}
    for name, gate in (("gated", sj.KondoGate(rate=0.3)), ("dense", None)):
        policy.zero_grad()
        sj.gated_backward(policy.log_probs, batch, advantages, gate, mask=mask, normalizer=normalizer)
        found[name] = flat(policy)
    policy.zero_grad()
    if before:
        for parameter in policy.parameters():
            parameter.grad = torch.ones_like(parameter)
    step = sj.GatedBackward(sj.KondoGate(rate=0.3), normalizer=normalizer, compare_every=1)
    comparison = step(policy.log_probs, batch, advantages, mask=mask).comparison
    gated, dense = found["gated"], found["dense"]
    cosine = float(gated @ dense / (gated.norm() * dense.norm()))
    assert comparison.cosine == pytest.approx(cosine, rel=1e-9)
    assert comparison.relative_error == pytest.approx(float((gated - dense).norm() / dense.norm()), rel=1e-9)
    assert comparison.norm_ratio == pytest.approx(float(gated.norm() / dense.norm()), rel=1e-9)
    assert (comparison.forward_rows, comparison.backward_rows) == (ROWS, ROWS)
    assert comparison.seconds > 0


def test_a_gate_that_keeps_all_has_the_dense_gradient():
    policy, batch, advantages, _ = make_case("rows")
    step = sj.GatedBackward(BestOfAll(1.0, says_its_rule=False), compare_every=1)
    comparison = step(policy.log_probs, batch, advantages).comparison
    assert comparison.cosine == pytest.approx(1, abs=1e-12)
    assert comparison.relative_error == pytest.approx(0, abs=1e-12)
    for gate in (None, sj.KondoGate(rate=1.0)):  # known without a pass
        assert sj.GatedBackward(gate, compare_every=1)(policy.log_probs, batch, advantages).comparison is None


def test_steps_that_keep_everything_are_counted():
    policy, batch, advantages, _ = make_case("rows")
    step = sj.GatedBackward(sj.KondoGate(rate=0.3), compare_every=3)
    compared = []
    for rate in (1, 1, 0.3, 0.3, 1, 1):
        step.gate.rate = rate
        compared.append(step(policy.log_probs, batch, advantages).comparison is not None)
    assert compared == [False, False, True, False, False, False]
    assert step.state_dict()["comparisons"]["steps"] == 6


def test_a_scaled_loss_changes_no_figure():
    policy, batch, advantages, _ = make_case("rows")
    found = []
    for scale in (1.0, 1024.0):

        def backward(loss, scale=scale):
            (loss * scale).backward()

        step = sj.GatedBackward(sj.KondoGate(rate=0.3), backward=backward, compare_every=1)
        comparison = step(policy.log_probs, batch, advantages).comparison
        found.append((comparison.cosine, comparison.relative_error, comparison.norm_ratio))
        policy.zero_grad()
    assert found[0] == pytest.approx(found[1], rel=1e-12)


def test_with_nothing_kept_the_gradient_stays_none():
    policy, batch, advantages, _ = make_case("rows")
    step = sj.GatedBackward(sj.KondoGate(price=1e9), compare_every=1)
    report = step(policy.log_probs, batch, advantages)
    assert report.kept == 0
    assert all(parameter.grad is None for parameter in policy.parameters())
    comparison = report.comparison
    assert (comparison.cosine, comparison.relative_error, comparison.norm_ratio) == (None, 1.0, 0.0)


def test_where_the_dense_gradient_is_zero_or_overflows_there_is_nothing_to_compare_with():
    policy, batch, advantages, _ = make_case("rows")
    step = sj.GatedBackward(sj.KondoGate(price=1.0), compare_every=1)
    assert step(policy.log_probs, batch, torch.zeros_like(advantages)).comparison.relative_error is None
    found = Comparisons(1).compared(torch.tensor([1.0, math.inf, 1.0, 1.0]), torch.zeros(2, WIDTH), 1, 1, 0.0)
    assert (found.cosine, found.relative_error, found.norm_ratio) == (None, None, None)


def test_sparse_gradients_are_compared_and_left_alone():
    embedding = nn.Embedding(6, 3, sparse=True)
    rows, advantages = torch.arange(6), torch.tensor([1.0, -1.0, 2.0, 0.5, -2.0, 1.0])
    step = sj.GatedBackward(sj.KondoGate(rate=0.3), compare_every=1)
    comparison = step(lambda rows: embedding(rows).log_softmax(1)[:, 0], rows, advantages).comparison
    assert embedding.weight.grad.is_sparse
    kept = int(embedding.weight.grad.to_dense().abs().sum(dim=1).count_nonzero())
    assert (kept, 0 < comparison.cosine < 1) == (2, True)


def test_parameters_that_only_skipped_rows_reach_are_compared_too():
    first, second = (torch.zeros(2, requires_grad=True) for _ in range(2))

    def log_prob_fn(rows):  # a mixture whose second half only rows of 1 wake up
        found = first.log_softmax(0)[0].expand(len(rows))
        return found + second.log_softmax(0)[0] * rows if bool(rows.any()) else found

    step = sj.GatedBackward(sj.KondoGate(rate=0.5), compare_every=1)
    known = torch.tensor([-1.0, -1.0])
    comparison = step(log_prob_fn, torch.tensor([0.0, 1.0]), torch.tensor([2.0, 1.0]), log_probs=known).comparison
    assert second.grad is None
    assert comparison.cosine == pytest.approx(6 / math.sqrt(4 * 10))  # (2, 0) beside (3, 1), times (-1, 1) / 4 each


class Recurrent(nn.Module):
    """With complex parameters, as linear recurrent units have."""

    def __init__(self):
        super().__init__()
        self.into = nn.Parameter(torch.randn(ACTIONS, WIDTH_OF_STATES, dtype=torch.complex128))

    def forward(self, state):
        return (state.to(self.into.dtype) @ self.into.T).real.log_softmax(1)


def checkpointed(reentrant):
    """Of modules and tensors in a closure, a checkpoint inside of another, after an input that wants a gradient."""
    body, raw = nn.Linear(WIDTH_OF_STATES, 5).double(), torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    head = nn.Linear(5, ACTIONS).double()

    def inner(hidden):
        return (hidden @ raw).tanh()

    def log_prob_fn(rows):
        inside = rows["state"].clone().requires_grad_()

        def outer(state):
            return checkpoint(inner, body(state).tanh(), use_reentrant=reentrant)

        hidden = checkpoint(outer, inside, use_reentrant=reentrant)
        return head(hidden).log_softmax(1).gather(1, rows["action"][:, None]).squeeze(1)

    return log_prob_fn, [*body.parameters(), raw, *head.parameters()]


def complex_policy():
    net = Recurrent()
    return lambda rows: net(rows["state"]).gather(1, rows["action"][:, None]).squeeze(1), list(net.parameters())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of a checkpoint in a checkpoint
@pytest.mark.parametrize("make", [complex_policy, partial(checkpointed, False), partial(checkpointed, True)])
@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 2}])
def test_parameters_that_the_graph_does_not_show_or_that_are_complex(make, options):
    _, batch, advantages, _ = make_case("rows")
    torch.manual_seed(0)
    log_prob_fn, parameters = make()
    gate = sj.KondoGate(rate=0.3)
    found = {}
    for name, step in {
        "dense": sj.GatedBackward(None, **options),
        "gated": sj.GatedBackward(gate, **options),
        "compared": sj.GatedBackward(gate, compare_every=1, **options),
    }.items():
        report = step(log_prob_fn, batch, advantages)
        found[name] = torch.cat([torch.view_as_real(p.grad + 0j).flatten() for p in parameters])
        for parameter in parameters:
            parameter.grad = None
    assert torch.equal(found["gated"], found["compared"])
    expected = [
        float(nn.functional.cosine_similarity(found["gated"], found["dense"], dim=0)),
        float((found["gated"] - found["dense"]).norm() / found["dense"].norm()),
    ]
    assert [report.comparison.cosine, report.comparison.relative_error] == pytest.approx(expected)
    assert torch.autograd.backward is BACKWARD
    measured = sj.frontier(log_prob_fn, batch, advantages, gates={"hard": gate}, rounds=1, micro_batch_size=2)
    assert [measured.settings[1].cosine, measured.settings[1].error] == pytest.approx(expected)
    assert measured.dense.error < 1e-6
    assert all(parameter.grad is None for parameter in parameters)


@pytest.mark.parametrize("kept", [True, False])
def test_a_comparison_that_fails_leaves_the_steps_own_gradient_and_says_so(kept):
    policy, batch, advantages, _ = make_case("rows")
    gate = sj.KondoGate(rate=0.3) if kept else sj.KondoGate(price=1e9)
    sj.gated_backward(policy.log_probs, batch, advantages, gate)
    expected = [parameter.grad for parameter in policy.parameters()]
    policy.zero_grad()

    def log_prob_fn(rows):
        if torch.is_grad_enabled() and len(rows["state"]) == ROWS:
            raise torch.OutOfMemoryError("out of memory")
        return policy.log_probs(rows)

    with pytest.raises(torch.OutOfMemoryError) as raised:
        sj.GatedBackward(gate, compare_every=1)(log_prob_fn, batch, advantages)
    assert (".grad: zero it" in str(raised.value)) == kept
    for parameter, own in zip(policy.parameters(), expected, strict=True):
        assert parameter.grad is own is None or torch.equal(parameter.grad, own)


def test_what_steps_in_a_hook_is_refused_before_grad_is_touched():
    policy, batch, advantages, _ = make_case("rows")
    next(policy.parameters()).register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(ValueError, match=r"a parameter of shape .* has a hook .*compare_every"):
        sj.GatedBackward(sj.KondoGate(rate=0.3), compare_every=1)(policy.log_probs, batch, advantages)
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_refusals():
    for given in (0, -3, 1.5, "often"):
        with pytest.raises(ValueError, match="expected a whole number of steps, at least 1"):
            sj.GatedBackward(None, compare_every=given)


def test_sketches_keep_inner_products():
    torch.manual_seed(0)
    left, right = torch.randn(2, 100_000)
    right = right + 0.5 * left
    parameter = torch.zeros(100_000, requires_grad=True)
    gradients = Gradients("", [parameter])
    parameter.grad = left.clone()
    added = gradients.snapshot()
    with gradients.set_aside():
        parameter.grad.add_(right)
        gated, dense = sketches(gradients.pairs_with(added))
    assert float(gated @ dense) == pytest.approx(float(left @ right), abs=4 * 1.12 * 100_000 / math.sqrt(WIDTH))
    assert float(dense @ dense) == pytest.approx(float(right @ right), rel=0.1)


def together(gated, dense):
    """Comparisons of given gradients, (n, WIDTH) each, and what the last one found."""
    comparisons = Comparisons(1)
    for g, d in zip(gated, dense, strict=True):
        sums = torch.stack([g @ g, d @ d, g @ d, (g - d) @ (g - d)])
        found = comparisons.compared(sums, torch.stack([g, d]), 1, 1, 0.0)
    return found


def test_it_warns_by_the_mean_cosines_of_different_comparisons():
    generator = torch.Generator().manual_seed(0)
    gated, dense = torch.randn(2, WINDOW, WIDTH, generator=generator) + torch.tensor([0.02, 2.0]).view(2, 1, 1)
    different = [(i, j) for i in range(WINDOW) for j in range(WINDOW) if i != j]
    squared = [float((rows @ rows.T).diagonal().mean()) for rows in (gated, dense)]
    products = (sum(float(left[i] @ dense[j]) for i, j in different) / len(different) for left in (dense, gated))
    consistency, agreement = (
        product / math.sqrt(squared[1] * own) for product, own in zip(products, squared[::-1], strict=True)
    )
    with pytest.warns(UserWarning, match=f"cosine of {consistency:.2f}, a gated and a dense one of {agreement:.2f}"):
        together(gated, dense)
    together(gated[:-1], dense[:-1])  # not yet


def test_it_warns_only_where_the_dense_gradient_is_sure_and_the_gated_one_elsewhere():
    generator = torch.Generator().manual_seed(0)
    noise, other = torch.randn(2, WINDOW, WIDTH, generator=generator)
    one_way = torch.randn(WIDTH, generator=generator).expand(WINDOW, -1)
    with pytest.warns(UserWarning, match=r"does not follow the dense gradient.*UnbiasedGate\(noise=0.3\)"):
        together(noise, one_way + 0.3 * other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        together(noise, other)  # the dense gradient says nothing either
        together(noise + 0.5 * one_way, one_way)  # noisy, but it follows


def test_a_resumed_step_compares_as_the_unbroken_one():
    policy, batch, advantages, _ = make_case("rows")
    step = sj.GatedBackward(sj.KondoGate(rate=0.3), compare_every=2)
    for _ in range(2 * WINDOW - 1):
        step(policy.log_probs, batch, advantages)
    other = sj.GatedBackward(sj.KondoGate(rate=0.3), compare_every=2)
    other.load_state_dict(copy.deepcopy(step.state_dict()))
    for arm in (step, other):
        arm(policy.log_probs, batch, advantages)
    states = [arm.state_dict()["comparisons"] for arm in (step, other)]
    assert states[0]["seen"] == WINDOW
    assert str(states[0]) == str(states[1])
    assert torch.equal(states[0]["window"], states[1]["window"])


@pytest.mark.slow
def test_several_processes_compare_as_one(tmp_path):
    said = run_processes(
        Path(__file__).parents[1] / "processes" / "comparing_worker.py",
        2,
        ["everything"],
        store=tmp_path / "store",
        timeout=120,
    )
    for text in said:
        found = [json.loads(line[7:]) for line in text.splitlines() if line.startswith("RESULT ")]
        assert [result["kind"] for result in found] == ["ddp", "fsdp"]
        for result in found:
            assert result["untouched"], result
            assert result["several"] == pytest.approx(result["alone"], rel=1e-9), result
            assert result["rows"] == result["local"], result
            assert result["refused"] == (result["kind"] == "ddp"), result
