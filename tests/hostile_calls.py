"""A valid call of every public name, and what may stand wrongly in the place of its arguments.

python tests/hostile_calls.py 30000    # how many of so many calls end in an unclear error, and which
"""

from __future__ import annotations

import random
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hostile_values import ACTIONS, ROWS, TOKENS, WIDTH, hostile_values

import sparkjoy as sj
from sparkjoy import baselines, drafts, losses, prices, scores, sizes, testing
from sparkjoy.baselines import expected_confidence_advantage, good_and_bad_advantage
from sparkjoy.drafts.audit import Audit
from sparkjoy.lab import guards
from sparkjoy.lab.policies.early_exit import EarlyExit
from sparkjoy.lab.policies.transformer import Transformer
from sparkjoy.logprobs import token_log_probs
from sparkjoy.prices import FixedPrice, RollingQuantile
from sparkjoy.testing import TinyPolicy

SOURCE = str(Path(sj.__file__).parent)
POLICY = TinyPolicy(WIDTH, ACTIONS)
LAYERS = Transformer(vocab_size=2, positions=7, layers=2)
SAID_AS = {
    "draft_score": "the score",
    "log_prob_fn": "log-prob function|score",
    "output_layer": "output layer|weight",
    "hidden": "hidden",
    "value": "price",
    "keys": "keys|key",
    "size": "keys",
    "source": "log-prob function",
    "rows": "log-prob function|actions|cache's keys",
    "batch": "batch|log-prob function",
    "seen": "log_probs",
}
"""How messages call an argument where they do not by its name."""

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
        if isinstance(what, sj.GatedBackward):
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
    "count_flops": lambda: False,
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


def cases() -> dict[str, Case]:
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
    found["FixedPrice"] = gate(FixedPrice, value=0.5)
    found["RollingQuantile"] = gate(RollingQuantile, rate=0.5, window=4)
    found["BatchQuantile"] = gate(prices.BatchQuantile, rate=0.5)
    found["EffectiveSize"] = gate(prices.EffectiveSize, fraction=0.5)
    found["Nucleus"] = gate(prices.Nucleus, share=0.5)

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
        made(losses.weighted_by, "score", "temperature"),
        lambda: {"score": lambda a, p: a, "temperature": 1.0, **loss_arguments()},
    )
    found["delightful_weight"] = Case(
        losses.delightful_weight, lambda: {**of_tokens(), "mask": mask(), "temperature": 1.0, "unit": "sample"}
    )
    for function in (
        sj.delight,
        scores.advantage_score,
        scores.absolute_advantage_score,
        scores.surprisal_score,
        sj.update_size,
        sizes.policy_gradient_size,
        sizes.advantage_size,
    ):
        found[function.__name__] = Case(function, of_tokens)
        found[f"{function.__name__} of rows"] = Case(function, of_rows)
    found["surprisal"] = Case(sj.surprisal, lambda: {"log_probs": log_probs()})
    found["sequence_delight"] = Case(sj.sequence_delight, lambda: {**of_tokens(), "mask": mask()})
    found["additive_score"] = Case(made(scores.additive_score, "alpha"), lambda: {"alpha": 0.5, **of_tokens()})
    found["uniform_score"] = Case(made(scores.uniform_score, "generator"), lambda: {"generator": None, **of_rows()})
    found["noisy_score"] = Case(
        made(scores.noisy_score, "score", "level", "kind", "generator"),
        lambda: {"score": sj.delight, "level": 0.5, "kind": "additive", "generator": None, **of_rows()},
    )
    found["token_log_probs"] = Case(
        token_log_probs,
        lambda: {
            "hidden": torch.ones(ROWS, TOKENS, WIDTH),
            "output_layer": torch.eye(ACTIONS, WIDTH),
            "targets": torch.ones(ROWS, TOKENS, dtype=torch.long),
            "bias": torch.zeros(ACTIONS),
            "mask": mask(),
            "chunk_tokens": 4,
            "temperature": 0.7,
        },
    )
    found["token_log_probs of a layer"] = Case(
        token_log_probs,
        lambda: {
            "hidden": torch.ones(ROWS, TOKENS, WIDTH),
            "output_layer": lambda hidden: POLICY.layer(hidden),
            "targets": torch.ones(ROWS, TOKENS, dtype=torch.long),
            "chunk_tokens": 4,
        },
    )
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

    def drafted(gate: Any, source: Any, verify: Any, audit: Any, draft_score: Any, **options: Any) -> Any:
        draft = sj.Draft(source, verify=verify, audit=audit, score=draft_score)
        return sj.GatedBackward(gate, draft=draft, **options)

    own = ("gate", "source", "verify", "audit", "draft_score", "score", "normalizer", "count_flops", "loss")
    found["Draft"] = Case(
        made(drafted, *own, *ENGINE_OPTIONS),
        lambda: {
            "gate": sj.KondoGate(rate=0.5),
            "source": POLICY.log_probs,
            "verify": 1.5,
            "audit": Audit(every=1, rows=4),
            "draft_score": sj.delight,
            "score": sj.delight,
            "normalizer": "batch",
            "count_flops": False,
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
            "audit": None,
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
    found["RepeatedDraws"] = Case(
        lambda keys, rewards, **given: guards.RepeatedDraws(**given).update(keys, rewards),
        lambda: {"rewards": per_row(), "memory": 3, "device": None, "keys": torch.arange(ROWS)},
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
    for name, make in {
        "KondoGate": lambda: sj.KondoGate(price=RollingQuantile(0.5)),
        "KondoGate of a rate": lambda: sj.KondoGate(rate=0.5),
        "SoftGate": lambda: sj.SoftGate(1.0, price=RollingQuantile(0.5)),
        "UnbiasedGate": sj.UnbiasedGate,
        "BudgetGate": lambda: sj.BudgetGate(0.5),
        "RollingQuantile": lambda: RollingQuantile(0.5),
        "FixedPrice": lambda: FixedPrice(0.5),
        "RepeatedDraws": lambda: guards.RepeatedDraws(8),
        "GuardedDelight": lambda: guards.GuardedDelight(guards.RepeatedDraws(8)),
        "GatedBackward": lambda: sj.GatedBackward(sj.UnbiasedGate(), count_flops=True),
        "GatedBackward with a draft": lambda: sj.GatedBackward(
            sj.BudgetGate(0.5), draft=sj.Draft(drafts.StaleWeights(POLICY, 2), audit=Audit(every=1))
        ),
        "StaleWeights": lambda: drafts.StaleWeights(POLICY, 2),
        "DistilledDraft": lambda: drafts.DistilledDraft(TinyPolicy(WIDTH, ACTIONS)),
        "CachedLogProbs": lambda: drafts.CachedLogProbs(
            POLICY.log_probs, lambda rows: rows["action"].flatten()[: len(rows["action"])], 8, 2
        ),
    }.items():
        if name != "CachedLogProbs":
            found[f"{name}.load_state_dict"] = loaded(make)
    found.update(draft_cases())
    return found


@dataclass(frozen=True)
class Outcome:
    """What came of a call.

    Args:
        case: its name.
        changed: arguments, and what stood there.
        kind: "fine"; "clear", a ValueError or TypeError of ours that names an argument that was changed; "own", an
            error in a function that the caller gave, called as it said it would be; else "unclear".
        error: what it raised.
        where: file and line that raised.
        touched: whether it changed `.grad` although it failed.
    """

    case: str
    changed: dict[str, str]
    kind: str
    error: str
    where: str
    touched: bool


def outcome(name: str, case: Case, changed: dict[str, tuple[str, Any]]) -> Outcome:
    """Call, with some arguments changed, and see."""
    arguments = {**case.valid(), **{argument: value for argument, (_, value) in changed.items()}}
    before = [torch.full_like(parameter, 3.0) for parameter in POLICY.parameters()]
    for parameter, gradient in zip(POLICY.parameters(), before, strict=True):
        parameter.grad = gradient.clone()
    labels = {argument: label for argument, (label, _) in changed.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.call(**arguments)
        return Outcome(name, labels, "fine", "", "", False)
    except Exception as error:
        now = [parameter.grad for parameter in POLICY.parameters()]
        touched = any(grad is None or not torch.equal(grad, old) for grad, old in zip(now, before, strict=True))
        frames = traceback.extract_tb(error.__traceback__)
        frame, text = frames[-1], str(error)
        said = any(
            word in text for argument in changed for word in (argument, *SAID_AS.get(argument, "").split("|")) if word
        )
        clear = isinstance(error, ValueError | TypeError) and frame.filename.startswith(SOURCE) and said
        kind = "clear" if clear else "own" if raised_by_callers_function(frames) else "unclear"
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        return Outcome(name, labels, kind, f"{type(error).__name__}: {text[:300]}", where, touched)


def raised_by_callers_function(frames: traceback.StackSummary) -> bool:
    """Whether it was in a function that we were given, of which these here and modules are."""
    begun = False
    for frame in frames:
        ours = frame.filename.startswith(SOURCE) and not frame.filename.endswith(("testing.py", "transformer.py"))
        if begun and (frame.filename in (__file__, testing.__file__) or "torch/nn/modules" in frame.filename):
            return True
        begun = begun or ours
    return False


def calls(seed: int, count: int) -> Iterator[tuple[str, Case, dict[str, tuple[str, Any]]]]:
    """So many calls with one argument changed, or, in one of four, two: of each case as many."""
    draw, table = random.Random(seed), cases()
    names = sorted(table)
    for number in range(count):
        name = names[number % len(names)]
        valid = table[name].valid()
        chosen = draw.sample(sorted(valid), min(len(valid), 1 + (draw.random() < 0.25)))
        changed = {}
        for argument in chosen:
            values = hostile_values(argument, valid[argument])
            label = draw.choice(sorted(values))
            changed[argument] = (label, values[label])
        yield name, table[name], changed


def main(count: int, seed: int = 0, accepted: bool = False) -> None:
    """Make the calls, and print what came of them; `accepted` ones too."""
    kinds: Counter[str] = Counter()
    found: dict[tuple[str, str], list[Outcome]] = {}
    touched = []
    for call in calls(seed, count):
        seen = outcome(*call)
        kinds[seen.kind] += 1
        if seen.touched:
            touched.append(seen)
        if accepted and seen.kind == "fine":
            print(f"accepted: {seen.case} {seen.changed}")
        if seen.kind == "unclear":
            found.setdefault((seen.where, seen.error.split(":")[0]), []).append(seen)
    for (where, _), group in sorted(found.items(), key=lambda pair: -len(pair[1])):
        example = group[0]
        print(f"{len(group):6} {where}: {example.case} {example.changed}: {example.error[:160]}")
    for example in touched[:20]:
        print(f".grad touched: {example}")
    print(f"{count} calls, seed {seed}: {dict(kinds)}, unclear {kinds['unclear'] / count:.2%}; touched {len(touched)}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0, "accepted" in sys.argv)
