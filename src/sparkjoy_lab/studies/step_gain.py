"""What a step of the gate costs beside a step of DG as problems grow and backward passes get dearer.

One thing at a time is changed from the papers' token reversal: the prompt's length, the vocabulary, the model's width,
or what a backward pass costs (blocks checkpointed, or a frozen body). The two updates take turns on the same rollouts
within one process; how many steps each method needs is another study's business.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from sparkjoy.gates import KondoGate
from sparkjoy.losses import delightful
from sparkjoy.step.backward import GatedBackward
from sparkjoy.step.report import BackwardReport
from sparkjoy_lab.bench.timing import collect, median, ratio, timed, turns
from sparkjoy_lab.flops import FlopCount
from sparkjoy_lab.policies.adapters import add_adapters
from sparkjoy_lab.policies.transformer import Transformer
from sparkjoy_lab.tasks.reversal import ReversalConfig, ReversalTask
from sparkjoy_lab.tasks.rollouts import Rollout

Record = dict[str, Any]
Body = Literal["written out", "plain", "checkpointed", "adapters", "head only"]
BODIES: dict[Body, str] = {
    "written out": "all weights, the backward pass written out",
    "plain": "all weights, autograd's backward pass",
    "checkpointed": "all weights, autograd, blocks run a second time",
    "adapters": "a frozen body with adapters of rank 4",
    "head only": "a frozen body, only the output layer learns",
}
ADAPTER_RANK = 4
WARM_UP_ROUNDS = 3


@dataclass(frozen=True)
class StepGainStudy:
    """Which sizes and bodies; the base is the papers' H = 10, M = 2, width 64."""

    prompt_lengths: tuple[int, ...] = (5, 10, 20, 40)
    """H."""
    vocab_sizes: tuple[int, ...] = (2, 10, 100, 1000)
    """M."""
    widths: tuple[int, ...] = (32, 64, 128, 256)
    """Width of the model; its feed-forward parts are twice as wide."""
    bodies: tuple[Body, ...] = tuple(BODIES)
    """What learns, and how its backward pass runs."""
    body_width: int = 128
    """Width at which the bodies are compared."""
    rate: float = 0.03
    """The gate's."""
    rounds: int = 20
    """Rounds, in each of which every step is timed once."""

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"--rounds {self.rounds}: expected at least 1.")
        unknown = [body for body in self.bodies if body not in BODIES]
        if unknown:
            raise ValueError(f"--bodies {unknown[0]!r}: expected some of {', '.join(BODIES)}.")
        KondoGate(rate=self.rate)
        self.cases()  # raises on sizes outside their range

    def cases(self) -> list[tuple[str, Any, ReversalConfig, Body]]:
        """What is changed, to what, and the task and body that makes."""
        base = ReversalConfig()
        wide = replace(base, width=self.body_width, feed_forward=2 * self.body_width)
        cases: list[tuple[str, Any, ReversalConfig, Body]] = []
        cases += [("H", n, replace(base, prompt_length=n), "written out") for n in self.prompt_lengths]
        cases += [("M", n, replace(base, vocab_size=n), "written out") for n in self.vocab_sizes]
        cases += [("width", n, replace(base, width=n, feed_forward=2 * n), "written out") for n in self.widths]
        cases += [("body", body, wide, body) for body in self.bodies]
        return cases


def run(study: StepGainStudy, advance: Callable[[float, str], None]) -> list[Record]:
    """One record a case; `advance` is told the fraction done and what comes next."""
    records = []
    cases = study.cases()
    for number, (changed, value, config, body) in enumerate(cases):
        advance(number / len(cases), f"{changed} {value}")
        records.append({"changed": changed, "value": value, **measure(config, body, study.rate, study.rounds)})
    advance(1.0, "")
    return records


def measure(config: ReversalConfig, body: Body, rate: float, rounds: int) -> Record:
    """Medians over rounds: CPU milliseconds of sampling and of each update, and how many times the gate's DG's is.

    Args:
        config: the task.
        body: what learns.
        rate: the gate's.
        rounds: how often each is timed.

    Returns:
        sample, dg and kondo in milliseconds; training_gain and total_gain, the ratios of DG's step to the gate's
        without and with sampling, and the same of what was counted in FLOPs; flops_ratio and seconds_ratio of DG's
        backward to its forward pass.
    """
    task = ReversalTask(config)
    torch.manual_seed(0)
    policy = task.policy()
    make_body(policy, body)
    # A learning rate of 0 costs what any other does, and every round is about the same policy.
    learning = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(learning, lr=0.0, fused=True)
    engines = {"dg": GatedBackward(None, loss=delightful()), "kondo": GatedBackward(KondoGate(rate=rate))}
    generator = torch.Generator().manual_seed(0)
    sampled: list[tuple[float, Rollout]] = []  # a round each

    def rollout() -> Rollout:
        return task.rollout(policy, generator, graph=False)

    def sample(number: int, _: str) -> None:
        if len(sampled) == number + WARM_UP_ROUNDS:
            sampled.append(timed(rollout, time.process_time))

    def update(engine: GatedBackward) -> BackwardReport:
        _, drawn = sampled[-1]
        report = engine(policy.log_probs, drawn.batch, drawn.advantages, log_probs=drawn.log_probs)
        optimizer.step()
        optimizer.zero_grad()
        return report

    with FlopCount() as count:
        drawn = rollout()
    forward, *updates = (_flops(work, policy, drawn) for work in (None, *engines.values()))
    arms = {name: partial(update, engine) for name, engine in engines.items()}
    taken = turns(arms, rounds, warm_up=WARM_UP_ROUNDS, clock=time.process_time, before=sample)
    seconds, reports = collect(taken)
    sample_ms = 1000 * np.array([spent for spent, _ in sampled[WARM_UP_ROUNDS:]])
    dg, kondo = (1000 * np.array(seconds[name]) for name in ("dg", "kondo"))
    dense = reports["dg"]
    return {
        "sample": median(sample_ms),
        "dg": median(dg),
        "kondo": median(kondo),
        "training_gain": ratio(dg, kondo),
        "total_gain": ratio(sample_ms + dg, sample_ms + kondo),
        "training_gain_flops": updates[0] / updates[1],
        "total_gain_flops": (count.flops + updates[0]) / (count.flops + updates[1]),
        "flops_ratio": updates[0] / forward - 1,
        "seconds_ratio": median([each.seconds["backward"] / each.seconds["forward"] for each in dense]),
    }


def _flops(engine: GatedBackward | None, policy: Transformer, drawn: Rollout) -> int:
    """FLOPs of an update, or of a forward pass alone."""
    with FlopCount() as count:
        if engine is None:
            policy.log_probs(drawn.batch)
        else:
            engine(policy.log_probs, drawn.batch, drawn.advantages, log_probs=drawn.log_probs)
    policy.zero_grad()
    return count.flops


def make_body(policy: Transformer, body: Body) -> None:
    """Set what of a policy learns, and how its backward pass runs."""
    policy.fused = body in ("written out", "head only")
    policy.checkpointed = body == "checkpointed"
    if body == "adapters":
        add_adapters(policy, ADAPTER_RANK)
    if body == "head only":
        policy.requires_grad_(False)
        policy.head.requires_grad_(True)
