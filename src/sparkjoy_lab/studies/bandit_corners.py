"""Leaving a wrong corner of the simplex, and two states that share a parameter (arXiv 2605.11908).

Near the corner of arm j the policy draws little else. Time is that of gradient flow, dθ/dt = Σ_a π(a) w(a) U(a)
∇log π(a), w the method's weight: σ(χ/η) for DG, 1[U > 0] for the gate at price zero and DG at temperature 0. A better
arm moves at a speed proportional to its own π, whoever moves it; what worse arms do, the weight decides.

With a parameter shared between two states that want opposite actions, PG follows the greater gap to its corner. DG and
the gate weigh successes more than failures, and the rare success of the lesser state holds them back at an interior
point; for the gate it is p* = Δ₁ / (Δ₁ + Δ₂).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sparkjoy.gates import Gate, KondoGate, UnbiasedGate
from sparkjoy.losses import delightful_weight
from sparkjoy.scores import delight, policy_gradient_size, update_size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = dict[str, Any]
TEMPERATURES = {"pg": None, "dg": 1.0, "dg, η = 0.1": 0.1, "gate, price 0": 0.0}
"""Methods by the temperature of their weight; None weighs nothing."""
WORSE = {
    "no worse arm": None,
    "a worse arm, as rare": 0.0,
    "a worse arm, e^(L/2) times as frequent": 0.5,
    "a worse arm, e^(L-1) times as frequent": 1.0,
}
"""How much more frequent than the best arm a worse one is, as a part of the log ratio L."""
REWARDS = (1.0, 0.8, 0.0)
"""Of the best arm, the corner's, and a worse one."""
GAPS = (1.0, 0.6)
"""By how much the shared action is better in the first state, and worse in the second."""
BATCH = 100
SAMPLED: dict[str, tuple[Callable[[torch.Generator], Gate | None], bool]] = {
    "pg": (lambda generator: None, False),
    "dg": (lambda generator: None, True),
    "gate, price 0": (lambda generator: KondoGate(price=0.0), False),
    "gate, 10%": (lambda generator: KondoGate(rate=0.1), False),
    "noise 0.3 of pg": (lambda generator: UnbiasedGate(noise=0.3, generator=generator), False),
    "noise 0.3 of dg": (lambda generator: UnbiasedGate(noise=0.3, generator=generator), True),
}
"""Gate, and whether terms have DG's weight, of the methods that draw batches."""


def weights(advantages: np.ndarray, surprisals: np.ndarray, temperature: float | None) -> np.ndarray:
    """What a method multiplies a term by.

    >>> weights(np.array([1.0, -1.0]), np.array([2.0, 2.0]), 1.0).round(3).tolist()
    [0.881, 0.119]
    """
    if temperature is None:
        return np.ones_like(advantages)
    if temperature == 0:
        return np.where(advantages > 0, 1.0, 0.0)
    scaled = np.clip(advantages * surprisals / temperature, -700, 700)
    found: np.ndarray = 1 / (1 + np.exp(-scaled))
    return found


def start(log_ratio: float, worse: float | None) -> np.ndarray:
    """Logits of the best arm, the corner's, and the worse one, if there is one: log π(corner)/π(best) = `log_ratio`."""
    excess = 0.0 if not worse else (log_ratio / 2 if worse < 1 else log_ratio - 1)
    return np.array([0.0, log_ratio] if worse is None else [0.0, log_ratio, excess])


def exit_time(logits: np.ndarray, rewards: Sequence[float], temperature: float | None) -> float:
    """Time until the corner's arm, number 1, has less than half of the probability.

    >>> round(exit_time(start(2.0, None), (1.0, 0.8), None), 1)
    28.4
    """
    values, logits, time = np.array(rewards[: len(logits)]), logits.copy(), 0.0
    while True:
        policy = np.exp(logits - logits.max())
        policy /= policy.sum()
        if policy[1] < 0.5:
            return time
        advantages = values - policy @ values
        terms = policy * weights(advantages, -np.log(policy), temperature) * advantages
        speed = terms - policy * terms.sum()
        step = 0.02 / np.abs(speed).max()  # 0.02 nats of a logit at a time
        logits += step * speed
        time += float(step)


def exit_records(log_ratios: Sequence[float]) -> list[Record]:
    """Exit times by the exact gradient, of every method and case."""
    return [
        {"case": case, "log_ratio": ratio, "method": method, "time": exit_time(start(ratio, worse), REWARDS, eta)}
        for case, worse in WORSE.items()
        for method, eta in TEMPERATURES.items()
        for ratio in log_ratios
    ]


def exit_slopes(records: Sequence[Record]) -> list[Record]:
    """By how much the logarithm of the exit time grows with the log ratio, over its upper half: 1 is 1/π(best)."""
    found = []
    for case, method in dict.fromkeys((record["case"], record["method"]) for record in records):
        mine = [record for record in records if (record["case"], record["method"]) == (case, method)]
        upper = mine[len(mine) // 2 - 1 :]
        ratios, times = [r["log_ratio"] for r in upper], np.log([r["time"] for r in upper])
        slope = float(np.polyfit(ratios, times, 1)[0]) if len(upper) > 1 else None
        found.append({"case": case, "method": method, "slope": slope})
    return found


def _moves(method: str, generator: torch.Generator) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """From advantages and log-probs of a batch to what each term is multiplied by, and which rows were kept."""
    make, is_dg = SAMPLED[method]
    gate, size = make(generator), update_size if is_dg else policy_gradient_size

    def move(advantages: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        weight = torch.ones_like(advantages)
        if is_dg:
            weight = delightful_weight(log_probs, advantages, None, 1.0, "token")
        if gate is None:
            return weight, torch.ones_like(advantages, dtype=torch.bool)
        score = size if isinstance(gate, UnbiasedGate) else delight
        decision = gate(score(advantages, log_probs))
        return weight * decision.weight * decision.keep, decision.keep

    return move


def sampled_exits(method: str, log_ratio: float, seeds: int, steps: int, learning_rate: float = 1.0) -> Record:
    """Steps to leave the corner with batches of 100 draws, where the worse arm is e^(L/2) times as frequent.

    Returns:
        The median over seeds (None where half of them never left), how many left, and the fraction of rows kept.
    """
    left, kept, drawn = [], 0, 0
    rewards = torch.tensor(REWARDS)
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        move, logits = _moves(method, generator), torch.tensor(start(log_ratio, 0.5), dtype=torch.float32)
        for step in range(steps):
            policy = logits.softmax(0)
            if policy[1] < 0.5:
                left.append(step)
                break
            arms = torch.multinomial(policy, BATCH, replacement=True, generator=generator)
            advantages = rewards[arms] - policy @ rewards
            weight, keep = move(advantages, policy.log()[arms])
            terms = torch.zeros(3).index_add_(0, arms, weight * advantages) / BATCH
            logits += learning_rate * (terms - policy * terms.sum())
            kept, drawn = kept + int(keep.sum()), drawn + BATCH
    times = sorted([*left, *[np.inf] * (seeds - len(left))])
    middle = times[seeds // 2]
    return {
        "log_ratio": log_ratio,
        "method": method,
        "steps": None if middle == np.inf else float(middle),
        "left": len(left),
        "seeds": seeds,
        "kept": kept / max(1, drawn),
    }


def shared_speed(p: float, temperature: float | None) -> float:
    """Expected speed of the shared logit at π(action 1) = p in both states: that action is better in the first one.

    >>> shared_speed(0.9, None) > 0, shared_speed(0.9, 0.0) > 0, abs(shared_speed(1 / 1.6, 0.0)) < 1e-12
    (True, False, True)
    """
    policy, speed = np.array([1 - p, p]), 0.0
    for gap in (GAPS[0], -GAPS[1]):
        advantages = np.array([0.0, gap]) - p * gap
        terms = policy * weights(advantages, -np.log(policy), temperature) * advantages
        speed += float(terms[1] * (1 - p) - terms[0] * p) / 2
    return speed


def shared_records(seeds: int, steps: int, learning_rate: float = 1.0) -> list[Record]:
    """Where each method comes to rest from p = 0.5: by the exact flow, and with batches of draws, a mean over seeds."""
    found: list[Record] = []
    for method, eta in TEMPERATURES.items():
        grid = np.linspace(0.5, 1 - 1e-6, 200_001)
        speeds = np.array([shared_speed(float(p), eta) for p in grid[::200]])
        rests = np.flatnonzero(speeds <= 0)
        found.append({"method": method, "p": float(grid[::200][rests[0]]) if len(rests) else 1.0, "exact": True})
    for method in SAMPLED:
        ends = [_shared_run(method, seed, steps, learning_rate) for seed in range(seeds)]
        found.append({"method": method, "p": float(np.mean(ends)), "exact": False})
    return found


def _shared_run(method: str, seed: int, steps: int, learning_rate: float) -> float:
    """π(action 1), a mean over the last half of the steps."""
    generator = torch.Generator().manual_seed(seed)
    move, logit, seen = _moves(method, generator), torch.zeros(()), []
    gaps = torch.tensor([GAPS[0], -GAPS[1]]).repeat(BATCH // 2)
    for step in range(steps):
        p = logit.sigmoid()
        actions = (torch.rand(BATCH, generator=generator) < p).float()
        advantages = gaps * (actions - p)
        weight, _ = move(advantages, torch.where(actions == 1, p.log(), (1 - p).log()))
        logit += learning_rate * (weight * advantages * (actions - p)).sum() / BATCH
        if 2 * step >= steps:
            seen.append(float(p))
    return float(np.mean(seen))


def plot_corners(exits: Sequence[Record], sampled: Sequence[Record], shared: Sequence[Record]) -> Figure:
    """Left, middle: exit times against the log ratio, without and with a frequent worse arm. Right: where p rests."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    *flows, rest = figure.subplots(1, 3)
    colors = {"pg": "gray", "dg": "black", "dg, η = 0.1": "tab:blue", "gate, price 0": "tab:cyan"}
    for axis, case in zip(flows, (next(iter(WORSE)), list(WORSE)[2]), strict=True):
        for method, color in colors.items():
            mine = [record for record in exits if (record["case"], record["method"]) == (case, method)]
            axis.plot([r["log_ratio"] for r in mine], [r["time"] for r in mine], color=color, label=method)
        axis.set_xticks(range(2, 13, 2))
        axis.set(yscale="log", xlabel="log π₀(corner)/π₀(best)", title=case.replace(", e", ",\ne"))
        axis.grid(alpha=0.3)
    for method, marker in (("pg", "x"), ("dg", "o"), ("noise 0.3 of dg", "s"), ("gate, price 0", "^")):
        mine = [record for record in sampled if record["method"] == method and record["steps"] is not None]
        color = colors.get(method, "tab:orange")
        label = method if color == "tab:orange" else None
        flows[1].plot(
            [r["log_ratio"] for r in mine], [r["steps"] for r in mine], marker, color=color, mfc="none", label=label
        )
    flows[0].set_ylabel("time to leave the corner")
    flows[1].legend(frameon=False, fontsize=8)
    drawn = [record for record in shared if not record["exact"]]
    rest.barh([record["method"] for record in drawn], [record["p"] for record in drawn], color="tab:blue", height=0.6)
    exact = [(record["method"], record["p"]) for record in shared if record["exact"] and record["method"] in SAMPLED]
    rest.plot([p for _, p in exact], [method for method, _ in exact], "k|", markersize=14)
    title = "two states, one parameter\n(black: by the exact flow)"
    rest.set(xlim=(0, 1.02), xlabel="π(action 1) at rest; 1 is best", title=title)
    rest.invert_yaxis()
    return figure
