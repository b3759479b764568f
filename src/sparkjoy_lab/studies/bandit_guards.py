"""Guards against gambling, tried one by one: what each rescues, and what each costs where nobody gambles.

A guard replaces a row's advantage, in the score only, by a number built from the repeated draws of its key. What the
kept rows teach is untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparkjoy.gates import KondoGate
from sparkjoy.scores import delight
from sparkjoy_lab.guards import GuardedDelight, RepeatedDraws
from sparkjoy_lab.studies.bandit_gambling import (
    SOLVED,
    BatchWeight,
    Learning,
    Record,
    batch_weight,
    curve_record,
    keep_best,
    learn,
    plot_final,
)
from sparkjoy_lab.tasks.gambling import Gambling

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rule = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""`(advantages, rewards, mean, deviation, count)` of each row and of its key -> guarded advantages (B,)."""

RULES: dict[str, Rule] = {
    # U divided by what its key's rewards scatter: keeps the sign, so at price zero it cannot change a decision.
    "divided": lambda advantages, rewards, mean, deviation, count: advantages / (1 + deviation),
    # U less the standard error of its key's mean: vanishes as the draws repeat, while one draw's luck does not.
    "minus_error": lambda advantages, rewards, mean, deviation, count: advantages - deviation / count.sqrt(),
    # U less one standard deviation: a draw must beat its own noise.
    "minus_deviation": lambda advantages, rewards, mean, deviation, count: advantages - deviation,
    # U shrunk to the key's mean by how much of its square is noise.
    "shrunk": lambda advantages, rewards, mean, deviation, count: (
        advantages
        + (mean - rewards) * deviation**2 / (deviation**2 + (advantages + mean - rewards) ** 2).clamp(min=1e-300)
    ),
    # A lower confidence bound: the key's mean less its standard error.
    "lower_bound": lambda advantages, rewards, mean, deviation, count: (
        advantages + mean - rewards - deviation / count.sqrt()
    ),
}


def guard_weight(
    name: str,
    keys: int,
    memory: int | None = None,
    key: Callable[[Tensor], Tensor] | None = None,
    rate: float | None = None,
) -> BatchWeight:
    """The gate on a guarded score: "none", "mean" (`GuardedDelight`), "group", or one of RULES.

    Args:
        name: the guard; "group" is "mean" over the draws of one batch, without memory.
        keys: number of keys over all runs.
        memory: draws an average looks back over.
        key: actions (R, B) -> keys (R, B); None: one key per run and arm of two.
        rate: of the gate; None: price zero.
    """
    gate = KondoGate(price=0)
    draws = RepeatedDraws(keys, memory)
    guard = GuardedDelight(draws)

    def weight(actions: Tensor, rewards: Tensor, advantages: Tensor, log_probs: Tensor) -> Tensor:
        runs = torch.arange(len(actions)).unsqueeze(1)
        flat = (runs * 2 + actions if key is None else key(actions)).flatten()
        reward, advantage, log_prob = (x.flatten() for x in (rewards, advantages, log_probs))
        if name == "none":
            score = delight(advantage, log_prob)
        elif name == "mean":
            guard.observe(flat, reward)
            score = guard(advantage, log_prob)
        elif name == "group":
            batch = GuardedDelight(RepeatedDraws(keys))
            batch.observe(flat, reward)
            score = batch(advantage, log_prob)
        else:
            draws.update(flat, reward)
            statistics = (draws.mean[flat], draws.deviation[flat], draws.count[flat])
            score = delight(RULES[name](advantage, reward, *statistics), log_prob)
        if rate is not None:
            return keep_best(score.view_as(advantages), rate)
        return gate(score).keep.double().view_as(advantages)

    return weight


GUARDS = ("none", "mean", "group", *RULES)


def guard_records(
    tasks: Sequence[Gambling], learning: Learning, guard: str, memory: int | None = None, rate: float | None = None
) -> list[Record]:
    """One record per task: how the gate, at price zero or at a rate, learned under `guard`."""
    method = "kondo" if rate is None else "kondo_rate"
    curves = learn(tasks, learning, guard_weight(guard, 2 * len(tasks) * learning.seeds, memory, rate=rate))
    return [
        {
            **curve_record(task, method, curves.p[i], curves.backward[i], learning.batch),
            "guard": guard,
            "memory": memory,
            "rate": rate,
            "batch": learning.batch,
        }
        for i, task in enumerate(tasks)
    ]


def repeat_records(task: Gambling, learning: Learning, batches: Sequence[int]) -> list[Record]:
    """The limit of repetition: PG, the gate and the guarded gate with fewer draws of a key at each step."""
    records = []
    for batch in batches:
        fewer = replace(learning, batch=batch)
        curves = learn([task], fewer, batch_weight("pg", 1.0, 1.0))
        plain = curve_record(task, "pg", curves.p[0], curves.backward[0], batch)
        records += [{**plain, "guard": None, "memory": None, "batch": batch}]
        records += [record for guard in ("none", "mean") for record in guard_records([task], fewer, guard)]
    return records


def swap_record(gap: float, learning: Learning, guard: str, memory: int | None) -> Record:
    """The cost of memory: no noise, and the arms change places halfway. Steps to p = 0.9 of the new good arm."""
    swap_at = learning.steps // 2
    weight = guard_weight(guard, keys=2 * learning.seeds, memory=memory)
    p = learn([Gambling(0.0, gap)], learning, weight, swap_at=swap_at).p[0]
    after = 1 - p[:, swap_at:].mean(0)
    back = (after >= SOLVED).nonzero()
    return {
        "cost": "swap",
        "guard": guard,
        "memory": memory,
        "steps_to_90": int(back[0]) if len(back) else None,
        "final_p": float(after[-1]),
    }


def contexts_record(learning: Learning, guard: str, coarse: bool, contexts: int = 10) -> Record:
    """The cost of a coarse key: `contexts` contexts and as many arms, one right in each, no noise.

    With coarse keys the guard's history is per arm, over all contexts, in which every arm is right in one of them.
    """
    generator = torch.Generator().manual_seed(learning.seed)
    runs, batch = learning.seeds, learning.batch
    logits = torch.zeros(runs, contexts, contexts, dtype=torch.float64)
    state: dict[str, Tensor] = {}
    run = torch.arange(runs).unsqueeze(1)

    def key(actions: Tensor) -> Tensor:
        return run * contexts + actions if coarse else (run * contexts + state["context"]) * contexts + actions

    weight = guard_weight(guard, keys=runs * contexts * (1 if coarse else contexts), key=key)
    curve = []
    for _ in range(learning.steps):
        state["context"] = torch.randint(contexts, (runs, batch), generator=generator)
        policy = logits.log_softmax(-1)
        rows = policy[run, state["context"]]
        actions = torch.multinomial(rows.exp().flatten(0, 1), 1, generator=generator).view(runs, batch)
        rewards = (actions == state["context"]).double()
        chance = rows.gather(2, state["context"].unsqueeze(2)).squeeze(2).exp()
        weights = weight(actions, rewards, rewards - chance, rows.gather(2, actions.unsqueeze(2)).squeeze(2))
        terms = (weights * (rewards - chance)).unsqueeze(2) * (
            torch.nn.functional.one_hot(actions, contexts) - rows.exp()
        )
        # Each context's logits take the mean over its own share of the batch.
        logits = logits.index_put(
            (run, state["context"]), terms * (learning.learning_rate * contexts / batch), accumulate=True
        )
        curve.append(float(logits.softmax(-1).diagonal(dim1=1, dim2=2).mean()))
    reached = [step for step, value in enumerate(curve) if value >= SOLVED]
    return {
        "cost": "coarse keys" if coarse else "contexts",
        "guard": guard,
        "memory": None,
        "final_p": curve[-1],
        "steps_to_90": reached[0] if reached else None,
    }


def cost_records(gap: float, learning: Learning, guard: str, memory: int) -> list[Record]:
    """What a guard costs where nothing is noisy: arms that swap, several contexts, keys too coarse for them."""
    with_memory = [] if guard in ("none", "group") else [swap_record(gap, learning, guard, memory)]
    return [
        swap_record(gap, learning, guard, None),
        *with_memory,
        *(contexts_record(learning, guard, coarse) for coarse in (False, True)),
    ]


REST = "0.75"
"""Of guards that have no name in the figure: five can be told apart."""
COLORS = dict(zip(GUARDS, ("#c0392b", "#1e8449", "#7d3c98", REST, REST, REST, "#48c9b0", "#2e86c1"), strict=True))


def plot_guards(records: Sequence[Record], costs: Sequence[Record], repeats: Sequence[Record]) -> Figure:
    """Final p by guard and noise; what a guard costs without noise; how many repeated draws it needs."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(14, 9), layout="constrained")
    for axis, noise in zip(axes[0], ("bad", "all"), strict=True):
        groups = {
            (guard if color != REST else f"_{guard}", color): [
                r for r in records if (r["noise"], r["guard"], r["memory"], r["rate"]) == (noise, guard, None, None)
            ]
            for guard, color in COLORS.items()
        }
        plot_final(axis, groups)
        axis.set_title(
            "noise on the bad arm: what each guard rescues" if noise == "bad" else "the same noise on both arms"
        )
    axes[0, 0].legend(fontsize=9, title="guard", loc="lower left")
    _plot_costs(axes[1, 0], costs)
    for method, guard, label, color in (
        ("pg", None, "PG", "#444444"),
        ("kondo", "none", "gate, price 0", COLORS["none"]),
        ("kondo", "mean", "gate, guard: mean", COLORS["mean"]),
    ):
        rows = [r for r in repeats if (r["method"], r["guard"]) == (method, guard)]
        axes[1, 1].plot([r["batch"] for r in rows], [r["final_p"] for r in rows], ".-", color=color, label=label)
    ratio = repeats[0]["sigma"] / repeats[0]["gap"] if repeats else 0
    axes[1, 1].set(xscale="log", xlabel="draws per step", ylabel="final p (mean over seeds)", ylim=(-0.03, 1.03))
    axes[1, 1].set_title(f"σ/Δ = {ratio:g} on the bad arm: fewer repeated draws")
    axes[1, 1].legend()
    axes[1, 1].grid(alpha=0.3)
    figure.suptitle(
        "Judging an arm by its mean reward ends gambling; it costs where the key hides what changed", fontsize=13
    )
    return figure


def _plot_costs(axis: Axes, costs: Sequence[Record]) -> None:
    settings = sorted({(r["cost"], r["memory"]) for r in costs}, key=str)
    width = 0.8 / len(GUARDS)
    for i, guard in enumerate(GUARDS):
        rows = [
            (place, r["final_p"])
            for place, s in enumerate(settings)
            for r in costs
            if (r["cost"], r["memory"], r["guard"]) == (*s, guard)
        ]
        if rows:
            places, values = zip(*rows, strict=True)
            axis.bar(
                [place + (i - len(GUARDS) / 2 + 0.5) * width for place in places], values, width, color=COLORS[guard]
            )
    names = [f"{cost}\nmemory {memory}" if memory else cost for cost, memory in settings]
    axis.set_xticks(range(len(settings)), names)
    axis.set(ylabel="final p of the right arm", ylim=(0, 1.03))
    axis.set_title("no noise: what each guard costs (colours as above, gray: others)")
    axis.grid(alpha=0.3, axis="y")
