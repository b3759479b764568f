"""A valid call of everything that runs a model: engine, drafts, `select`, `frontier`; and states that are loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from hostile_cases import POLICY, Arguments, Case, batch, loaded, log_probs, made, mask, of_tokens, per_row
from hostile_values import ACTIONS, TOKENS, WIDTH

import sparkjoy as sj
from sparkjoy.testing import TinyPolicy
from sparkjoy_lab import drafts, guards
from sparkjoy_lab.drafts.audit import Audit
from sparkjoy_lab.drafts.drafted import DraftedBackward
from sparkjoy_lab.policies.early_exit import EarlyExit
from sparkjoy_lab.policies.transformer import Transformer
from sparkjoy_lab.prices import RollingQuantile

LAYERS = Transformer(vocab_size=2, positions=7, layers=2)


def engine_arguments() -> Arguments:
    return {"log_prob_fn": POLICY.log_probs, "batch": batch(), "advantages": per_row(), "mask": mask()}


ENGINE_OPTIONS: dict[str, Callable[[], Any]] = {
    "loss": lambda: sj.reinforce,
    "score": lambda: sj.delight,
    "draft": lambda: sj.Draft(POLICY.log_probs),
    "normalizer": lambda: "batch",
    "micro_batch_size": lambda: 4,
    "micro_batch_tokens": lambda: 8,
    "trim": lambda: lambda rows, kept: (rows, slice(None)),
    "module": lambda: None,
    "backward": lambda: torch.Tensor.backward,
    "backward_over_forward": lambda: 2.0,
}


def draft_cases() -> Iterator[tuple[str, Case]]:
    """Of everything in `sparkjoy.drafts`."""
    rows = {"rows": lambda: batch(False)}

    def arguments(**makes: Callable[[], Any]) -> Callable[[], Arguments]:
        return lambda: {name: make() for name, make in {**makes, **rows}.items()}

    def key() -> Callable[[Any], torch.Tensor]:
        return lambda given: given["action"]

    own = ("log_prob_fn", "key", "size", "max_age")
    cached = arguments(log_prob_fn=lambda: POLICY.log_probs, key=key, size=lambda: 8, max_age=lambda: 2)
    yield "CachedLogProbs", Case(made(drafts.CachedLogProbs, *own), cached)
    yield (
        "StaleWeights",
        Case(made(drafts.StaleWeights, "policy", "every"), arguments(policy=lambda: POLICY, every=lambda: 2)),
    )
    lower = arguments(policy=lambda: POLICY, dtype=lambda: torch.bfloat16)
    yield "LowerPrecision", Case(made(drafts.LowerPrecision, "policy", "dtype"), lower)
    yield "AdvantageOnly", Case(made(drafts.AdvantageOnly, "actions"), arguments(actions=key))

    def distilled(seen: Any, **options: Any) -> Any:
        draft = drafts.DistilledDraft(**options)
        draft.learn(seen)
        return draft(batch())

    yield (
        "DistilledDraft",
        Case(
            distilled,
            lambda: {
                "student": TinyPolicy(WIDTH, ACTIONS),
                "learning_rate": 0.1,
                "every": 1,
                "mask": lambda given: mask(),
                "seen": [(batch(), log_probs())],
            },
        ),
    )
    prompts = {"prompts": torch.zeros(5, 4, dtype=torch.long), "answers": torch.ones(5, 4, dtype=torch.long)}
    yield (
        "EarlyExit",
        Case(lambda policy, layers: EarlyExit(policy, layers)(prompts), lambda: {"policy": LAYERS, "layers": 1}),
    )


def engine_cases() -> dict[str, Case]:
    """By name."""
    found: dict[str, Case] = {}
    found["select"] = Case(
        sj.select,
        lambda: {
            "gate": sj.KondoGate(rate=0.5),
            **of_tokens(),
            "mask": mask(),
            "loss": sj.reinforce,
            "score": sj.delight,
            "cost": mask().sum(1),
        },
    )
    found["select by sizes"] = Case(
        sj.select, lambda: {"gate": sj.UnbiasedGate(), **of_tokens(), "mask": mask(), "loss": sj.delightful()}
    )
    found["TrimRight"] = Case(
        lambda names, multiple, batch, mask: sj.TrimRight(names, multiple=multiple)(batch, mask),
        lambda: {"names": "action", "multiple": 2, "batch": batch(), "mask": mask() & (torch.arange(TOKENS) < 2)},
    )
    for option, make in ENGINE_OPTIONS.items():
        found[f"gated_backward {option}"] = Case(
            sj.gated_backward,
            lambda option=option, make=make: {**engine_arguments(), "gate": sj.KondoGate(rate=0.5), option: make()},
        )
    found["gated_backward known"] = Case(
        sj.gated_backward,
        lambda: {
            **engine_arguments(),
            "gate": sj.KondoGate(rate=0.5),
            "log_probs": log_probs(),
            "behavior_log_probs": log_probs() - 0.1,
            "loss": sj.clipped(),
        },
    )
    found["gated_backward of rows"] = Case(
        sj.gated_backward,
        lambda: {
            "log_prob_fn": POLICY.log_probs,
            "batch": batch(False),
            "advantages": per_row(),
            "log_probs": log_probs(False),
            "gate": sj.UnbiasedGate(),
        },
    )
    found["gated_backward dense"] = Case(
        sj.gated_backward,
        lambda: {"log_prob_fn": POLICY.log_probs, "batch": batch(False), "advantages": per_row(), "gate": None},
    )

    def late(gate: Any, known: Any, **given: Any) -> Any:
        """Functions that are used once before the given ones are."""

        def second(first: Any, then: Any) -> Any:
            use = iter([first])
            return lambda *arguments: next(use, then)(*arguments)

        given = {name: second(first, given.pop(name)) for name, first in firsts.items()} | given
        return sj.gated_backward(gate=gate, log_probs=known, batch=batch(), advantages=per_row(), mask=mask(), **given)

    firsts = {"log_prob_fn": POLICY.log_probs, "loss": sj.reinforce, "backward": torch.Tensor.backward}
    for name, gate, known in (
        ("hard", sj.KondoGate(rate=0.5), log_probs),
        ("noise", sj.UnbiasedGate(1e-6), log_probs),
        ("none", None, lambda: None),
    ):
        found[f"gated_backward late, {name}"] = Case(
            late,
            lambda gate=gate, known=known: {"gate": gate, "known": known(), "micro_batch_size": 1, **firsts},
        )

    def drafted(gate: Any, source: Any, verify: Any, draft_score: Any, **options: Any) -> Any:
        draft = sj.Draft(source, verify=verify, score=draft_score)
        return sj.GatedBackward(gate, draft=draft, **options)

    own = ("gate", "source", "verify", "draft_score", "score", "normalizer", "loss")
    found["Draft"] = Case(
        made(drafted, *own, *ENGINE_OPTIONS),
        lambda: {
            "gate": sj.KondoGate(rate=0.5),
            "source": POLICY.log_probs,
            "verify": 1.5,
            "draft_score": sj.delight,
            "score": sj.delight,
            "normalizer": "batch",
            "micro_batch_size": 4,
            **engine_arguments(),
        },
    )
    found["Draft known"] = Case(
        made(drafted, *own),
        lambda: {
            "gate": sj.KondoGate(rate=0.5),
            "source": None,
            "verify": None,
            "draft_score": None,
            **engine_arguments(),
            "log_probs": log_probs(),
            "behavior_log_probs": log_probs(),
        },
    )
    found["Audit"] = Case(Audit, lambda: {"every": 2, "rows": 4, "floor": 0.5, "window": 3})
    found["frontier"] = Case(
        sj.frontier,
        lambda: {
            **engine_arguments(),
            "gates": {"hard": sj.KondoGate(rate=0.5)},
            "log_probs": log_probs(),
            "behavior_log_probs": log_probs(),
            "loss": sj.reinforce,
            "normalizer": "batch",
            "micro_batch_size": 6,
            "parameters": list(POLICY.parameters()),
            "rounds": 1,
            "seconds": 0.01,
            "seed": 0,
            "progress": None,
        },
    )
    setting = sj.frontier(
        POLICY.log_probs, batch(), per_row(), gates={"soft": sj.UnbiasedGate()}, rounds=1, micro_batch_size=6
    )
    found["Frontier.recommend"] = Case(setting.recommend, lambda: {"noise": 0.3, "saving": 0.1})
    found.update(draft_cases())
    return found


def state_cases() -> dict[str, Case]:
    """Of everything that is saved and loaded."""
    found: dict[str, Case] = {}
    for name, make in {
        "KondoGate": lambda: sj.KondoGate(price=RollingQuantile(0.5)),
        "KondoGate of a rate": lambda: sj.KondoGate(rate=0.5),
        "SoftGate": lambda: sj.SoftGate(1.0, price=RollingQuantile(0.5)),
        "UnbiasedGate": sj.UnbiasedGate,
        "BudgetGate": lambda: sj.BudgetGate(0.5),
        "RollingQuantile": lambda: RollingQuantile(0.5),
        "RepeatedDraws": lambda: guards.RepeatedDraws(8),
        "GuardedDelight": lambda: guards.GuardedDelight(guards.RepeatedDraws(8)),
        "GatedBackward": lambda: sj.GatedBackward(sj.UnbiasedGate()),
        "DraftedBackward": lambda: DraftedBackward(
            sj.BudgetGate(0.5), drafts.StaleWeights(POLICY, 2), audit=Audit(every=1)
        ),
        "StaleWeights": lambda: drafts.StaleWeights(POLICY, 2),
        "DistilledDraft": lambda: drafts.DistilledDraft(TinyPolicy(WIDTH, ACTIONS)),
        "CachedLogProbs": lambda: drafts.CachedLogProbs(
            POLICY.log_probs, lambda rows: rows["action"].flatten()[: len(rows["action"])], 8, 2
        ),
    }.items():
        if name != "CachedLogProbs":
            found[f"{name}.load_state_dict"] = loaded(make)
    return found
