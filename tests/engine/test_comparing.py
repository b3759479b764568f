"""The gated gradient beside the dense one: the figures are right, and the step is the one it would be without."""

import copy
import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from engine_cases import ROWS, SHAPES, make_case
from gates_of_users import BestOfAll
from processes import run_processes
from torch import nn

import sparkjoy as sj
from sparkjoy.engine.beside import WIDTH, Beside
from sparkjoy.engine.comparing import WINDOW, Comparisons
from sparkjoy.prices import RollingQuantile

GATES = {
    "hard": lambda: sj.KondoGate(rate=0.3),
    "rolling": lambda: sj.KondoGate(price=RollingQuantile(0.3)),
    "soft": lambda: sj.SoftGate(1.0, price=0.0, generator=torch.Generator().manual_seed(1)),
    "noise": lambda: sj.UnbiasedGate(noise=0.3, generator=torch.Generator().manual_seed(1)),
}


def flat(policy):
    return torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 2}, {"normalizer": "kept", "loss": sj.delightful()}])
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


def test_what_steps_in_a_hook_is_refused_before_grad_is_touched():
    policy, batch, advantages, _ = make_case("rows")
    next(policy.parameters()).register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(ValueError, match=r"compare_every: a parameter of shape .* has a hook"):
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
    beside = Beside([parameter])
    parameter.grad = left.clone()
    with beside.dense():
        parameter.grad.add_(right)
    gated, dense = beside.sketches(salt=0)
    assert float(gated @ dense) == pytest.approx(float(left @ right), abs=4 * 1.12 * 100_000 / math.sqrt(WIDTH))
    assert float(dense @ dense) == pytest.approx(float(right @ right), rel=0.1)


def together(gated, dense):
    """Comparisons of given gradients, (n, WIDTH) each, and what the last one found."""
    comparisons = Comparisons(1)
    for g, d in zip(gated, dense, strict=True):
        sums = torch.stack([g @ g, d @ d, g @ d, (g - d) @ (g - d)])
        found = comparisons.compared(sums, torch.stack([g, d]), 1, 1, 0.0)
    return found


def test_consistency_and_agreement_by_definition():
    generator = torch.Generator().manual_seed(0)
    gated, dense = torch.randn(2, WINDOW, WIDTH, generator=generator) + 0.02
    found = together(gated, dense)
    different = [(i, j) for i in range(WINDOW) for j in range(WINDOW) if i != j]
    squared = [float((rows @ rows.T).diagonal().mean()) for rows in (gated, dense)]
    products = (sum(float(left[i] @ dense[j]) for i, j in different) / len(different) for left in (dense, gated))
    consistency, agreement = products
    assert found.consistency == pytest.approx(consistency / squared[1], abs=1e-5)
    assert found.agreement == pytest.approx(agreement / math.sqrt(squared[0] * squared[1]), abs=1e-5)
    assert together(gated[:-1], dense[:-1]).consistency is None


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
    found = [arm(policy.log_probs, batch, advantages).comparison for arm in (step, other)]
    assert found[0].consistency == pytest.approx(1)  # the same batch and weights every time
    assert found[0].consistency == found[1].consistency
    assert found[0].agreement == found[1].agreement


@pytest.mark.slow
def test_several_processes_compare_as_one(tmp_path):
    said = run_processes(
        Path(__file__).with_name("comparing_worker.py"), 2, ["everything"], store=tmp_path / "store", timeout=120
    )
    for text in said:
        found = [json.loads(line[7:]) for line in text.splitlines() if line.startswith("RESULT ")]
        assert [result["kind"] for result in found] == ["ddp", "fsdp"]
        for result in found:
            assert result["untouched"], result
            assert result["several"] == pytest.approx(result["alone"], rel=1e-9), result
            assert result["rows"] == result["local"], result
            assert result["refused"] == (result["kind"] == "ddp"), result
