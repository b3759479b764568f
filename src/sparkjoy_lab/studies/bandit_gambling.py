"""Gambling: a noisy bad arm has lucky draws, and a gate that keeps what went well keeps them.

How often (against the normal tail), and what that does to learning: PG, DG, the gate at price zero and at a rate, with
noise on the bad arm and the same noise on both. Many runs (noise levels × seeds) learn side by side in one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from sparkjoy.gates import KondoGate
from sparkjoy.scores import delight
from sparkjoy.signs import rate_count
from sparkjoy_lab.tasks.bandit import Method, method_weight
from sparkjoy_lab.tasks.gambling import Gambling, Noise, draw_actions, draw_rewards, tipping_sigma

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = dict[str, Any]
CurveMethod = Literal["pg", "dg", "kondo", "kondo_rate"]
METHODS: tuple[CurveMethod, ...] = ("pg", "dg", "kondo", "kondo_rate")
BatchWeight = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""`(actions, rewards, advantages, log_probs)`, each (R, B) -> what each draw's gradient is multiplied by (R, B)."""
SOLVED = 0.9
CURVE_POINTS = 30


@dataclass(frozen=True)
class Learning:
    """How a run learns.

    Args:
        seeds: runs per setting.
        steps: updates.
        batch: draws per update.
        learning_rate: of plain gradient ascent on the two logits.
        start: p before the first update.
        seed: of all draws; every method sees the same ones.
    """

    seeds: int = 50
    steps: int = 300
    batch: int = 32
    learning_rate: float = 1.0
    start: float = 0.5
    seed: int = 0


@dataclass(frozen=True)
class Curves:
    """p before and after each step (settings, seeds, steps + 1), and the backward passes of each (settings, steps)."""

    p: Tensor
    backward: Tensor


def lucky_records(sigmas: Sequence[float], gap: float, chances: Sequence[float], draws: int, seed: int) -> list[Record]:
    """Pr(U > 0 | bad arm) at baseline E[R] = pΔ: what the public gate keeps of bad draws, beside Φ(−pΔ/σ)."""
    generator = torch.Generator().manual_seed(seed)
    gate = KondoGate(price=0)
    records = []
    for sigma in sigmas:
        task = Gambling(sigma, gap)
        for p in chances:
            bad = torch.ones(1, draws, dtype=torch.long)
            rewards = draw_rewards(bad, torch.tensor([task.arm_sigmas], dtype=torch.float64), gap, generator)[0]
            log_probs = torch.full((draws,), math.log(1 - p), dtype=torch.float64)
            kept = gate(delight(rewards - p * gap, log_probs)).keep
            records.append(
                {
                    "sigma": sigma,
                    "gap": gap,
                    "baseline": "E[R]",
                    "p": p,
                    "lucky_measured": float(kept.double().mean()),
                    "lucky_predicted": task.lucky_probability(p),
                    "draws": draws,
                }
            )
    return records


def threshold_records(gap: float, chances: Sequence[float], temperature: float) -> list[Record]:
    """By formula: the noise, in gaps, at which the expected step at p starts to lead away from the good arm."""
    methods: tuple[Method, ...] = ("pg", "dg", "kondo")
    noises: tuple[Noise, ...] = ("bad", "all")
    records = []
    for noise in noises:
        for p in chances:
            for method in methods:
                sigma = tipping_sigma(p, gap, method, temperature, noise)
                tipping = None if sigma is None else sigma / gap
                records.append({"noise": noise, "p": p, "method": method, "tipping_sigma_over_gap": tipping})
    return records


def learn(tasks: Sequence[Gambling], learning: Learning, weight: BatchWeight, swap_at: int | None = None) -> Curves:
    """Train `seeds` two-arm policies on every task at once; from step `swap_at` on the arms change places."""
    runs = len(tasks) * learning.seeds
    generator = torch.Generator().manual_seed(learning.seed)
    sigmas = torch.tensor([task.arm_sigmas for task in tasks], dtype=torch.float64).repeat_interleave(learning.seeds, 0)
    gap = tasks[0].gap
    difference = torch.full((runs,), math.log(learning.start / (1 - learning.start)), dtype=torch.float64)
    history, backward = [difference.sigmoid()], []
    for step in range(learning.steps):
        p = difference.sigmoid()
        actions = draw_actions(p, learning.batch, generator)
        swapped = swap_at is not None and step >= swap_at
        rewards = draw_rewards(
            1 - actions if swapped else actions, sigmas.flip(1) if swapped else sigmas, gap, generator
        )
        advantages = rewards - ((1 - p if swapped else p) * gap).unsqueeze(1)
        log_probs = torch.stack(
            [-torch.nn.functional.softplus(-difference), -torch.nn.functional.softplus(difference)], 1
        )
        weights = weight(actions, rewards, advantages, log_probs.gather(1, actions))
        ascent = (weights * advantages * ((actions == 0).double() - p.unsqueeze(1))).mean(1)
        difference = difference + 2 * learning.learning_rate * ascent
        history.append(difference.sigmoid())
        backward.append((weights > 0).double().sum(1))
    shape = (len(tasks), learning.seeds)
    return Curves(torch.stack(history, -1).view(*shape, -1), torch.stack(backward, -1).view(*shape, -1).mean(1))


def batch_weight(method: CurveMethod, temperature: float, rate: float) -> BatchWeight:
    """PG, DG, the gate at price 0 ("kondo") or the gate at a rate ("kondo_rate"), for many runs at once."""
    if method == "kondo_rate":
        return lambda actions, rewards, advantages, log_probs: keep_best(delight(advantages, log_probs), rate)
    of_delight = method_weight(method, temperature)
    return lambda actions, rewards, advantages, log_probs: of_delight(delight(advantages, log_probs).flatten()).view_as(
        advantages
    )


def keep_best(score: Tensor, rate: float) -> Tensor:
    """(R, B) 1 for the best ⌈rate · B⌉ of each row, 0 elsewhere: `KondoGate(rate=rate)` for every row at once."""
    best = score.topk(rate_count(rate, score.shape[1]), dim=1).indices
    return torch.zeros_like(score).scatter_(1, best, 1).where(score != 0, 0)


def curve_record(task: Gambling, name: str, curves: Tensor, backward: Tensor, batch: int) -> Record:
    """What one method did on one task, from its curves (seeds, steps + 1) and backward passes (steps,)."""
    final = curves[:, -1]
    every = max(1, (curves.shape[1] - 1) // CURVE_POINTS)
    mean = curves.mean(0)
    reached = (mean >= SOLVED).nonzero()
    steps_to_90 = int(reached[0]) if len(reached) else None
    return {
        "sigma": task.sigma,
        "gap": task.gap,
        "noise": task.noise,
        "method": name,
        "baseline": "E[R]",
        "start_p": float(curves[0, 0]),
        "final_p": float(final.mean()),
        "final_p_sd": float(final.std(correction=0)),
        "solved": float((final > SOLVED).double().mean()),
        "trapped": float((final < 1 - SOLVED).double().mean()),
        "steps_to_90": steps_to_90,
        "backward_passes_to_90": None if steps_to_90 is None else float(backward[:steps_to_90].sum()),
        "backward_fraction": float(backward.mean()) / batch,
        "curve": [round(float(value), 4) for value in mean[::every]],
        "curve_every": every,
    }


def gambling_records(
    tasks: Sequence[Gambling], learning: Learning, temperature: float, rate: float, method: CurveMethod
) -> list[Record]:
    """One record per task: how `method` learned, beside where its expected step leads."""
    curves = learn(tasks, learning, batch_weight(method, temperature, rate))
    records = []
    for i, task in enumerate(tasks):
        # A rate's price moves with the batch, so its expected step is no formula.
        settles = None if method == "kondo_rate" else task.settling_point(method, temperature, learning.start)
        records.append(
            {
                **curve_record(task, method, curves.p[i], curves.backward[i], learning.batch),
                "temperature": temperature if method == "dg" else None,
                "rate": rate if method == "kondo_rate" else None,
                "lucky_predicted": task.lucky_probability(learning.start),
                "settling_point": settles,
            }
        )
    return records


LABELS: dict[str, tuple[str, str]] = {
    "pg": ("PG", "#444444"),
    "dg": ("DG", "#2e86c1"),
    "kondo": ("gate, price 0", "#c0392b"),
    "kondo_rate": ("gate, fixed rate", "#e59866"),
}


def plot_gambling(lucky: Sequence[Record], records: Sequence[Record]) -> Figure:
    """Lucky draws against the normal tail; where each method ends, by noise; learning curves."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(15, 8.5), layout="constrained")
    _plot_lucky(axes[0, 0], lucky)
    for axis, noise in ((axes[0, 1], "bad"), (axes[0, 2], "all")):
        groups = {name: [r for r in records if (r["noise"], r["method"]) == (noise, name)] for name in LABELS}
        plot_final(axis, {LABELS[name]: group for name, group in groups.items()})
        axis.set_title("noise on the bad arm only" if noise == "bad" else "the same noise on both arms")
    axes[0, 1].legend(fontsize=9, loc="center left")
    ratios = sorted({r["sigma"] / r["gap"] for r in records})
    middle = ratios[len(ratios) * 3 // 5 : len(ratios) * 3 // 5 + 2]  # where gambling begins: 1 and 3 by default
    settings = [("bad", ratio) for ratio in middle] + [("all", ratio) for ratio in middle[-1:]]
    for axis, (noise, ratio) in zip(axes[1], settings, strict=False):
        for record in records:
            if (record["noise"], record["sigma"] / record["gap"]) == (noise, ratio):
                label, color = LABELS[record["method"]]
                steps = [i * record["curve_every"] for i in range(len(record["curve"]))]
                axis.plot(steps, record["curve"], color=color, label=label)
                if record["settling_point"] is not None:
                    axis.axhline(record["settling_point"], color=color, lw=0.8, ls=":")
        axis.set(xlabel="step", ylabel="p, probability of the good arm (mean over seeds)", ylim=(-0.03, 1.03))
        axis.set_title(f"σ/Δ = {ratio:g} on {'the bad arm' if noise == 'bad' else 'both arms'} (dotted: predicted end)")
        axis.grid(alpha=0.3)
    figure.suptitle(
        "Noise on the bad arm of about twice the gap makes the gate gamble; equal noise does not", fontsize=13
    )
    return figure


def plot_final(axis: Axes, groups: dict[tuple[str, str], list[Record]]) -> None:
    """Final p, mean and spread over seeds, against σ/Δ, one line per (label, colour)."""
    for i, ((label, color), group) in enumerate(groups.items()):
        if group:
            shift = 0.05 * (i - (len(groups) - 1) / 2)  # side by side: several end at the same place
            places = [place + shift for place in range(len(group))]
            axis.errorbar(
                places,
                [r["final_p"] for r in group],
                yerr=[r["final_p_sd"] for r in group],
                color=color,
                label=label,
                marker=".",
                capsize=2,
            )
            axis.set_xticks(range(len(group)), [f"{r['sigma'] / r['gap']:g}" for r in group])
    axis.set(xlabel="σ/Δ, reward noise in gaps", ylabel="final p (mean, sd over seeds)", ylim=(-0.05, 1.05))
    axis.grid(alpha=0.3)


def _plot_lucky(axis: Axes, lucky: Sequence[Record]) -> None:
    for i, p in enumerate(sorted({r["p"] for r in lucky})):
        rows = [r for r in lucky if r["p"] == p and r["sigma"] > 0]
        ratios = [r["sigma"] / r["gap"] for r in rows]
        axis.plot(ratios, [r["lucky_measured"] for r in rows], "o", color=f"C{i}", label=f"p = {p:g}")
        axis.plot(ratios, [r["lucky_predicted"] for r in rows], "-", color=f"C{i}", lw=1)
    axis.set(xscale="log", xlabel="σ/Δ, reward noise in gaps", ylabel="Pr(U > 0 | bad arm)")
    axis.set_title("lucky draws kept: dots measured, lines Φ(−pΔ/σ), baseline E[R]", fontsize=10)
    axis.legend()
    axis.grid(alpha=0.3)
