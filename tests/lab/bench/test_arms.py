"""On real decoder shapes, every plan's gradient is the masked full batch's; and the rivals do what they say."""

import itertools
from typing import get_args

import pytest
import torch
from reference import masked_gradient

import sparkjoy as sj
from sparkjoy_lab.bench.arms import WITHOUT_RATE, Arm, flops_ratio, greatest_variance, step_of
from sparkjoy_lab.bench.models import Workload, build

TINY = {"rows": 6, "length": 5, "vocabulary": 30}


@pytest.mark.parametrize(
    ("model", "checkpointing", "train_only"),
    [
        ("gpt2-2m", False, "everything"),
        ("gpt2-2m", True, "lora"),
        ("llama-2m", True, "everything"),
        ("llama-2m", False, "lora"),
    ],
)
def test_every_plan_on_a_decoder_has_the_masked_gradient(model, checkpointing, train_only):
    problem = build(Workload(model=model, checkpointing=checkpointing, train_only=train_only, **TINY))
    problem.module.double()
    advantages = problem.advantages.double()
    mask = torch.arange(5) < torch.tensor([5, 3, 1, 4, 0, 2]).unsqueeze(1)
    parameters = [parameter for parameter in problem.module.parameters() if parameter.requires_grad]
    with torch.no_grad():
        known = problem.log_prob_fn(problem.batch)
    plans = set()
    for rate, log_probs, size in itertools.product((0.2, 0.5, 0.7, 1.0), (None, known), (None, 2)):
        problem.module.zero_grad()
        report = sj.gated_backward(
            problem.log_prob_fn,
            problem.batch,
            advantages,
            sj.KondoGate(rate=rate),
            log_probs=log_probs,
            mask=mask,
            micro_batch_size=size,
            micro_batch_tokens=None if size is None else 8,
            trim=None if size is None else sj.TrimRight("tokens"),
        )
        plans.add(report.plan)
        keep, weight = report.decision.keep, report.decision.weight
        expected = masked_gradient(
            problem.log_prob_fn,
            sj.reinforce,
            problem.batch,
            advantages,
            mask,
            keep,
            weight,
            int(mask.sum()),
            parameters,
        )
        assert report.kept > 0
        for parameter, reference in zip(parameters, expected, strict=True):
            assert (parameter.grad - reference).norm() <= 1e-6 * max(reference.norm(), 1e-9)
    assert plans == {"known", "signs", "screen", "dense"}


def test_checkpointing_and_frozen_bodies_change_the_measured_ratio():
    ratios = {}
    for name, options in {
        "plain": {},
        "checkpointing": {"checkpointing": True},
        "lora": {"train_only": "lora"},
    }.items():
        problem = build(Workload(**TINY, **options))
        ratios[name] = flops_ratio(problem)
        assert all(parameter.grad is None for parameter in problem.module.parameters())
    assert ratios["plain"] == pytest.approx(2, abs=0.1)
    assert ratios["checkpointing"] > 2.5
    assert ratios["lora"] < 1.3


@pytest.mark.parametrize("arm", get_args(Arm))
def test_every_arm_passes_the_rows_it_says(arm):
    problem = build(Workload(zero=0.5, positive=1 / 3, **TINY))  # two successes, one failure, three of zero
    _, rows = step_of(arm, 0.25, 2, problem)()
    assert rows == {"dense": 6, "shared": 6, "kondo-gate": 6, "non-zero": 3, "positive": 2}.get(arm, 2)
    assert any(parameter.grad is not None for parameter in problem.module.parameters())
    assert arm in WITHOUT_RATE or arm in ("uniform", "pods", "kondo-gate", "known", "screened", "noise")


def test_known_and_screened_arms_add_the_same_gradient_as_a_plain_loop_over_their_rows():
    gradients = []
    for arm in ("known", "screened"):
        problem = build(Workload(**TINY))
        step_of(arm, 0.4, 2, problem)()
        gradients.append(next(problem.module.parameters()).grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("model", ["gpt2-2m", "llama-2m"])
def test_the_shared_arm_adds_the_dense_gradient(model):
    gradients = []
    for arm in ("dense", "shared"):
        problem = build(Workload(model=model, prompt=9, group=3, **TINY))
        step_of(arm, 1.0, 6, problem)()
        gradients.append(next(problem.module.parameters()).grad)
    assert (gradients[1] - gradients[0]).norm() < 1e-5 * gradients[0].norm()


def test_pods_picks_the_subset_of_greatest_variance():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        rewards = torch.rand(7, generator=generator)
        picked = rewards[greatest_variance(rewards, 3)].var(correction=0)
        best = max(rewards[list(rows)].var(correction=0) for rows in itertools.combinations(range(7), 3))
        assert picked == pytest.approx(best.item())


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"positive": 0.8, "zero": 0.3}, {"length": 0}])
def test_wrong_workloads_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        Workload(**wrong)
