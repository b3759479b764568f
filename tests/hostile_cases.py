"""A valid call of every formula and gate, and how such calls are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hostile_values import ACTIONS, ROWS, TOKENS, WIDTH

import sparkjoy as sj
from sparkjoy import baselines, losses, scores
from sparkjoy.prices import EffectiveSize
from sparkjoy.testing import TinyPolicy
from sparkjoy_lab import guards
from sparkjoy_lab import scores as compared
from sparkjoy_lab.baselines import expected_confidence_advantage, good_and_bad_advantage
from sparkjoy_lab.drafts.drafted import DraftedBackward
from sparkjoy_lab.losses import weighted_by
from sparkjoy_lab.prices import Nucleus, RollingQuantile

POLICY = TinyPolicy(WIDTH, ACTIONS)
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A call, and fresh valid arguments for it.

    Args:
        call: takes the arguments by name, and goes on until each has been used.
        valid: makes them.
    """

    call: Callable[..., Any]
    valid: Callable[[], Arguments]


def per_row() -> torch.Tensor:
    return torch.tensor([1.0, -1.0, 0.5, 0.0, 2.0, -0.5])


def mask() -> torch.Tensor:
    return torch.arange(TOKENS) < torch.tensor([[3], [1], [2], [3], [2], [3]])


def log_probs(tokens: bool = True) -> torch.Tensor:
    return -torch.linspace(0.1, 3, ROWS * TOKENS).view(ROWS, TOKENS)[:, : TOKENS if tokens else 1].squeeze(-1)


def batch(tokens: bool = True) -> dict[str, torch.Tensor]:
    shape = (ROWS, TOKENS) if tokens else (ROWS,)
    return {"state": torch.linspace(-1, 1, WIDTH).expand(*shape, WIDTH), "action": torch.ones(shape, dtype=torch.long)}


def of_rows() -> Arguments:
    """What losses and scores take, one of each row."""
    return {"log_probs": log_probs(False), "advantages": per_row()}


def of_tokens() -> Arguments:
    """Likewise with tokens."""
    return {"log_probs": log_probs(), "advantages": per_row()}


def loss_arguments() -> Arguments:
    return {**of_tokens(), "behavior_log_probs": log_probs() - 0.1, "mask": mask()}


def made(make: Callable[..., Any], *own: str) -> Callable[..., Any]:
    """Makes an object of the arguments named, and calls it with the others."""

    def call(**given: Any) -> Any:
        mine = {name: given.pop(name) for name in list(given) if name in own}
        return make(**mine)(**given)

    return call


def loaded(make: Callable[[], Any]) -> Case:
    """Loads the state of an object that was used into a fresh one, which is used."""

    def valid() -> Arguments:
        used = make()
        use(used)
        return {"state": used.state_dict()}

    def use(what: Any) -> Any:
        if hasattr(what, "update"):
            return what.update(torch.tensor([0, 1]), torch.tensor([1.0, 2.0]))
        if isinstance(what, sj.GatedBackward | DraftedBackward):
            return what(POLICY.log_probs, batch(), per_row(), mask=mask())
        if hasattr(what, "observe"):
            return what.observe(torch.tensor([0, 1]), torch.tensor([1.0, 2.0]))
        if hasattr(what, "learn") and not hasattr(what, "weighted"):
            return what.learn([(batch(), log_probs())])
        return what(per_row())

    def call(state: Any) -> Any:
        fresh = make()
        fresh.load_state_dict(state)
        return use(fresh)

    return Case(call, valid)


def formula_cases() -> dict[str, Case]:
    """By name."""
    scored = {"score": per_row, "cost": lambda: mask().sum(1)}
    found: dict[str, Case] = {}

    def gate(kind: Any, **options: Any) -> Case:
        return Case(
            made(kind, *options, "generator"), lambda: {**options, **{name: make() for name, make in scored.items()}}
        )

    for name in ("group_mean_advantage", "leave_one_out_advantage", "group_standardised_advantage"):
        found[name] = Case(getattr(baselines, name), lambda: {"rewards": per_row(), "group_size": 3})
    found["good_and_bad_advantage"] = Case(good_and_bad_advantage, lambda: {"advantages": per_row(), "alpha": 0.5})
    found["expected_confidence_advantage"] = Case(
        expected_confidence_advantage,
        lambda: {"rewards": per_row(), "probabilities": torch.full((ROWS, ACTIONS), 1 / ACTIONS)},
    )
    found["KondoGate"] = gate(sj.KondoGate, rate=0.5, price=None, negative_share=0.0)
    found["KondoGate with a price"] = gate(sj.KondoGate, rate=None, price=0.0, negative_share=0.25)
    found["SoftGate"] = gate(sj.SoftGate, temperature=1.0, rate=0.5, price=None, generator=None)
    found["SoftGate with a price"] = gate(sj.SoftGate, temperature=1.0, rate=None, price=0.1, generator=None)
    found["UnbiasedGate"] = gate(sj.UnbiasedGate, noise=0.3, rate=None, floor=0.0, generator=None)
    found["UnbiasedGate with a rate"] = gate(sj.UnbiasedGate, noise=None, rate=0.5, floor=0.1, generator=None)
    found["BudgetGate"] = gate(sj.BudgetGate, rate=0.5, tolerance=0.1, window=4)
    for kind, options in (
        (RollingQuantile, {"rate": 0.5, "window": 4}),
        (EffectiveSize, {"fraction": 0.5}),
        (Nucleus, {"share": 0.5}),
    ):
        found[kind.__name__] = Case(made(kind, *options), lambda options=options: {**options, "score": per_row()})

    def own_gate(**parts: Any) -> Any:
        return sj.select(lambda score, cost=None: sj.Decision(**parts), per_row(), log_probs(False))

    found["Decision"] = Case(
        own_gate,
        lambda: {"keep": per_row() > 0, "price": None, "probability": per_row().sign(), "weight": per_row().abs()},
    )
    found["reinforce"] = Case(sj.reinforce, loss_arguments)
    found["clipped"] = Case(made(sj.clipped, "epsilon"), lambda: {"epsilon": 0.2, **loss_arguments()})
    found["delightful"] = Case(
        made(sj.delightful, "temperature", "unit"), lambda: {"temperature": 1.0, "unit": "sample", **loss_arguments()}
    )
    found["weighted_by"] = Case(
        made(weighted_by, "score", "temperature"),
        lambda: {"score": lambda a, p: a, "temperature": 1.0, **loss_arguments()},
    )
    found["delightful_weight"] = Case(
        losses.delightful_weight, lambda: {**of_tokens(), "mask": mask(), "temperature": 1.0, "unit": "sample"}
    )
    for function in (
        sj.delight,
        scores.advantage_score,
        compared.absolute_advantage_score,
        compared.surprisal_score,
        sj.update_size,
        scores.policy_gradient_size,
        scores.advantage_size,
    ):
        found[function.__name__] = Case(function, of_tokens)
        found[f"{function.__name__} of rows"] = Case(function, of_rows)
    found["surprisal"] = Case(sj.surprisal, lambda: {"log_probs": log_probs()})
    found["sequence_delight"] = Case(sj.sequence_delight, lambda: {**of_tokens(), "mask": mask()})
    found["additive_score"] = Case(made(compared.additive_score, "alpha"), lambda: {"alpha": 0.5, **of_tokens()})
    found["uniform_score"] = Case(made(compared.uniform_score, "generator"), lambda: {"generator": None, **of_rows()})
    found["noisy_score"] = Case(
        made(compared.noisy_score, "score", "level", "kind", "generator"),
        lambda: {"score": sj.delight, "level": 0.5, "kind": "additive", "generator": None, **of_rows()},
    )
    found["RepeatedDraws"] = Case(
        lambda size, keys, rewards, memory, device: guards.RepeatedDraws(size, memory, device).update(keys, rewards),
        lambda: {"size": 8, "keys": torch.arange(ROWS), "rewards": per_row(), "memory": 3, "device": None},
    )

    def guarded(draws: Any, keys: Any, rewards: Any, advantages: Any, log_probs: Any) -> Any:
        guard = guards.GuardedDelight(draws)
        guard.observe(keys, rewards)
        return guard(advantages, log_probs)

    found["GuardedDelight"] = Case(
        guarded,
        lambda: {
            "draws": guards.RepeatedDraws(8),
            "keys": torch.arange(ROWS),
            "rewards": per_row(),
            **of_rows(),
        },
    )
    return found
