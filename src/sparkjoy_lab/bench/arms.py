"""What one could do with a batch in one step: an arm each, which adds to `.grad` and says what it took."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from sparkjoy.gates import Gate, KondoGate, UnbiasedGate
from sparkjoy.gradients import Gradients
from sparkjoy.signs import rate_count
from sparkjoy.step.backward import GatedBackward
from sparkjoy.step.inputs import LogProbFunction
from sparkjoy_lab.bench.models import Problem, Workload, build
from sparkjoy_lab.bench.timing import Laps
from sparkjoy_lab.flops import FlopCount
from sparkjoy_lab.scores import uniform_score

Arm = Literal["dense", "non-zero", "positive", "uniform", "pods", "kondo-gate", "known", "screened", "noise", "shared"]
"""Ways to take a step.

dense: a plain loop over all rows. non-zero: over those of non-zero advantage (dynamic sampling's filter). positive:
over those of positive advantage. uniform: rows at random, through the engine. pods: a plain loop over the subset of
greatest reward variance (PODS, arXiv 2504.13818). kondo-gate: the PyPI package of that name, which multiplies the loss
by the gate. known: sparkjoy's gate on log-probs that the sampler recorded. screened: on an exact forward pass without a
graph. noise: the noise budget, on recorded log-probs; where the others have a rate it has a noise. shared: a plain loop
over all rows, in which a prompt is computed once for the answers to it.
"""
Seconds = dict[str, float]
Step = Callable[[], tuple[Seconds, int]]
"""Adds one step's gradient to `.grad`; gives the seconds by phase, and the rows that passed backward."""

PHASES = ("screen", "gather", "forward", "backward")
"""Of a step, as a report's seconds are named."""
WITHOUT_RATE: tuple[Arm, ...] = ("dense", "non-zero", "positive", "shared")


def step_of(arm: Arm, rate: float, micro_batch_size: int, problem: Problem) -> Step:
    """One arm, ready to be called again and again.

    Args:
        arm: which.
        rate: fraction of the rows to keep, or the budget of "noise"; arms without a rate do not read it.
        micro_batch_size: rows per forward and backward pass.
        problem: model and batch.
    """
    rows = len(problem.advantages)
    if arm == "kondo-gate":
        return _kondo_gate(rate, micro_batch_size, problem)
    if arm in ("known", "screened", "uniform", "noise"):
        generator = torch.Generator().manual_seed(0)
        gate: Gate = UnbiasedGate(noise=rate, generator=generator) if arm == "noise" else KondoGate(rate)
        score = uniform_score(generator) if arm == "uniform" else None
        # What a backward pass costs in this model, frozen or checkpointed as it may be, tells which plan is cheapest.
        ratio = flops_ratio(problem) if arm == "screened" else None
        gated = GatedBackward(gate, score=score, micro_batch_size=micro_batch_size, backward_over_forward=ratio)
        log_probs = problem.log_probs if arm in ("known", "noise") else None

        def engine_step() -> tuple[Seconds, int]:
            report = gated(problem.log_prob_fn, problem.batch, problem.advantages, log_probs=log_probs)
            return report.seconds, report.backward_rows

        return engine_step
    kept = torch.arange(rows, device=problem.advantages.device)
    if arm == "non-zero":
        kept = problem.advantages.nonzero().squeeze(1)
    elif arm == "positive":
        kept = (problem.advantages > 0).nonzero().squeeze(1)
    elif arm == "pods":
        kept = greatest_variance(problem.advantages, rate_count(rate, rows)).sort().values
    return _plain(kept, micro_batch_size, problem, problem.sharing if arm == "shared" else problem.log_prob_fn)


def flops_ratio(problem: Problem) -> float:
    """r: FLOPs of a row's backward pass over those of its forward pass."""
    rows = {"tokens": problem.batch["tokens"][:1]}
    with FlopCount() as forward:
        log_probs = problem.log_prob_fn(rows)
    with Gradients("", problem.module.parameters()).set_aside(), FlopCount() as backward:
        log_probs.sum().backward()
    return backward.flops / forward.flops


def prepare(workload: Workload, arm: Arm, rate: float, micro_batch_size: int) -> Callable[[], object]:
    """The arm in a process of its own, for measuring memory: a step that keeps its gradients' memory."""
    problem = build(workload)
    step = step_of(arm, rate, micro_batch_size, problem)

    def with_kept_gradients() -> None:
        problem.module.zero_grad(set_to_none=False)
        step()

    return with_kept_gradients


def greatest_variance(rewards: Tensor, count: int) -> Tensor:
    """Indices of the `count` rewards of greatest variance: some of the greatest and the rest of the smallest.

    >>> greatest_variance(torch.tensor([0.1, 1.0, 0.2, 0.0, 0.9]), 2).tolist()
    [3, 1]

    Xu et al., Not All Rollouts are Useful (PODS), arXiv 2504.13818.
    """
    order = rewards.argsort()
    return max(
        (torch.cat([order[:low], order[len(order) - (count - low) :]]) for low in range(count + 1)),
        key=lambda rows: float(rewards[rows].var(correction=0)),
    )


def _plain(kept: Tensor, micro_batch_size: int, problem: Problem, log_prob_fn: LogProbFunction) -> Step:
    """What a careful user writes: gather the rows once, then one forward and backward pass per micro-batch."""
    rows, tokens = len(problem.advantages), problem.log_probs.numel()

    def step() -> tuple[Seconds, int]:
        laps = Laps(*PHASES)
        for part in kept.split(micro_batch_size):
            part_rows = slice(int(part[0]), int(part[-1]) + 1) if len(kept) == rows else part
            batch = {"tokens": problem.batch["tokens"][part_rows]}
            laps.lap("gather")
            log_probs = log_prob_fn(batch)
            loss = -(problem.advantages[part_rows].unsqueeze(1) * log_probs).sum() / tokens
            laps.lap("forward")
            loss.backward()
            laps.lap("backward")
        return laps.seconds, len(kept)

    return step


def _kondo_gate(rate: float, micro_batch_size: int, problem: Problem) -> Step:
    try:
        from kondo_gate import KondoGate as Package
        from kondo_gate import KondoGateConfig
    except ImportError:
        raise ValueError('the arm kondo-gate needs that package: pip install "sparkjoy[bench]".') from None
    gate = Package(KondoGateConfig(gate_rate=rate))

    def step() -> tuple[Seconds, int]:
        laps = Laps(*PHASES)
        rows = len(problem.advantages)
        for begin in range(0, rows, micro_batch_size):
            taken = slice(begin, min(begin + micro_batch_size, rows))
            tokens = problem.batch["tokens"][taken]
            logits = problem.module(tokens[:, :-1], use_cache=False).logits
            advantages = problem.advantages[taken].unsqueeze(1).expand(-1, tokens.shape[1] - 1)
            output = gate(logits, tokens[:, 1:], advantages, attention_mask=torch.ones_like(advantages))
            loss = output.gated_policy_loss * len(tokens) / rows
            laps.lap("forward")
            loss.backward()
            laps.lap("backward")
        return laps.seconds, rows

    return step
