"""The engine's step that a run's settings ask for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparkjoy.gates import BudgetGate, Gate, KondoGate, SoftGate, UnbiasedGate
from sparkjoy.losses import Loss, clipped, delightful, reinforce
from sparkjoy.prices import EffectiveSize
from sparkjoy.scores import ScoreFunction, advantage_score, delight, reads_log_probs
from sparkjoy.step.backward import GatedBackward
from sparkjoy_lab.drafts.audit import Audit
from sparkjoy_lab.drafts.drafted import DraftedBackward
from sparkjoy_lab.flops import CountedFlops
from sparkjoy_lab.losses import importance_weighted, weighted_by
from sparkjoy_lab.prices import Nucleus, RollingQuantile
from sparkjoy_lab.scores import absolute_advantage_score, additive_score, noisy_score, surprisal_score, uniform_score
from sparkjoy_lab.token_gate import TokenGatedBackward
from sparkjoy_lab.training.method_settings import MethodSettings
from sparkjoy_lab.training.processes import WHOLE, Share

if TYPE_CHECKING:  # settings are checked by building their step
    from sparkjoy_lab.training.settings import Settings


def build_step(
    settings: Settings,
    generator: torch.Generator,
    trim: Callable[[Any, int], Any] | None = None,
    source: Callable[[Any], Tensor] | None = None,
    share: Share = WHOLE,
    module: Any = None,
    flops: CountedFlops | None = None,
) -> GatedBackward | TokenGatedBackward | DraftedBackward:
    """The step of a method, whole samples or tokens, drafted or not.

    Args:
        settings: of the run.
        generator: source of the gate's draws.
        trim: shortens answers, where tokens are gated.
        source: the draft's log-probs, where this run has a draft.
        share: this process's part of a batch.
        module: what averages the gradients of several processes.
        flops: counts those of its backward passes and of its draft; None: nobody does.

    Raises:
        ValueError: a number outside its range, or what several processes cannot do.
    """
    if share.count > 1 and (settings.unit == "token" or settings.drafted or settings.score_noise):
        raise ValueError(
            "--unit token, --screen, --verify and --score-noise run in one process; start it without torchrun."
        )
    loss = _loss(settings, generator)
    gate = _gate(settings, generator) if settings.gated else None
    backward = torch.Tensor.backward if flops is None else flops.backward
    if gate is not None and settings.unit == "token":
        return TokenGatedBackward(gate, loss=loss, trim=trim, backward=backward)
    score = _score(settings, generator, share)
    noisy = _noisy(score, settings, generator) if gate is not None and score is not None else score
    options: dict[str, Any] = {
        "loss": loss,
        "micro_batch_size": settings.micro_batch_size,
        "backward": backward,
        "compare_every": settings.compare_every,
    }
    if not settings.drafted:
        return GatedBackward(gate, score=noisy, module=module if share.count > 1 else None, **options)
    if score is not None and not reads_log_probs(score):
        raise ValueError(f"--score {settings.score} reads no log-probs, so that --screen and --verify have no use.")
    assert gate is not None  # the settings saw to it
    return DraftedBackward(
        gate,
        source,
        flops=flops,
        verify=settings.verify,
        score=score,
        drafted_score=noisy,
        audit=Audit(settings.audit_every, floor=settings.recall_floor),
        rate=settings.gate_rate,
        **options,
    )


def _loss(method: MethodSettings, generator: torch.Generator) -> Loss:
    if method.method in ("dg", "unbiased"):
        return (
            weighted_by(_noisy(delight, method, generator)) if method.score_noise else delightful(unit=method.dg_unit)
        )
    if method.method in ("ppo", "grpo"):
        return clipped(method.clip)
    return importance_weighted if method.method == "importance" else reinforce


def _gate(method: MethodSettings, generator: torch.Generator) -> Gate:
    rate = method.gate_rate
    if method.method == "unbiased":
        return UnbiasedGate(method.gate_noise, rate, method.floor, generator)
    if rate is not None and method.price_kind == "budget":
        return BudgetGate(rate)
    prices = {"rolling": RollingQuantile, "effective": EffectiveSize, "nucleus": Nucleus}
    if rate is not None and method.price_kind in prices:
        return KondoGate(price=prices[method.price_kind](rate), negative_share=method.negative_share)
    if method.temperature:
        return SoftGate(method.temperature, rate, method.price, generator)
    return KondoGate(rate, method.price, method.negative_share)


def _score(method: MethodSettings, generator: torch.Generator, share: Share) -> ScoreFunction | None:
    """What the gate ranks by; None for unbiased, which goes by the size of a row in the loss."""
    draw = uniform_score(generator)

    def uniform(advantages: Tensor, log_probs: Tensor) -> Tensor:
        """The draws for all processes' rows, of which this one's count."""
        total = share.count * len(advantages)
        return draw(advantages.new_empty(total), log_probs)[share.rows(total)]

    scores: dict[str, ScoreFunction] = {
        "delight": delight,
        "advantage": advantage_score,
        "absolute-advantage": absolute_advantage_score,
        "surprisal": surprisal_score,
        "additive": additive_score(method.alpha),
        "uniform": uniform,
    }
    if method.method == "unbiased":
        return None
    return scores["uniform" if method.method == "uniform" else method.score]


def _noisy(score: ScoreFunction, method: MethodSettings, generator: torch.Generator) -> ScoreFunction:
    if not method.score_noise:
        return score
    return noisy_score(score, method.score_noise, method.score_noise_kind, generator)
