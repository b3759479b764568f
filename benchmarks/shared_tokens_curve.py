"""How much faster an update is with shared tokens, by prompt over answer length and by the answers to a prompt.

    python benchmarks/shared_tokens_curve.py --out docs/figures

A decoder of `sparkjoy bench` of 14 million random parameters, Llama's shape, answers of random tokens, two groups.
Forward and backward passes of a plain loop over the groups, the two ways in turn on one thread; medians of ratios in
the same round. The limit is all tokens over the distinct ones: answers of random tokens share the prompt alone.
"""

from __future__ import annotations

import time
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure

from sparkjoy.prefix_tree import fold
from sparkjoy_lab.bench import timing
from sparkjoy_lab.bench.arms import step_of
from sparkjoy_lab.bench.models import Workload, build
from sparkjoy_lab.studies.drawing import WIDTH
from sparkjoy_lab.training.tracking import save_figure, write_json

ANSWER = 48
PROMPTS = (3, 12, 24, 48, 96, 192, 384)
GROUPS = (4, 8, 16)


def factor(prompt: int, group: int, rounds: int) -> float:
    """Seconds of a dense step over those of a shared one."""
    workload = Workload(model="llama-14m", rows=2 * group, length=ANSWER, prompt=prompt, group=group)
    problem = build(workload)
    arms = {arm: step_of(arm, 1.0, group, problem) for arm in ("dense", "shared")}
    clear = partial(problem.module.zero_grad, set_to_none=False)
    taken = timing.turns(arms, rounds, warm_up=1, clock=time.process_time, before=lambda *_: clear())
    seconds, _ = timing.collect(taken)
    return timing.ratio(seconds["dense"], seconds["shared"])


def limit(prompt: float, group: int) -> float:
    """All tokens over the distinct ones."""
    return group * (prompt + ANSWER) / (prompt + group * ANSWER)


def building(rounds: int) -> tuple[float, float]:
    """Seconds of a tree and its mask, and of the forward and backward pass over it."""
    problem = build(Workload(model="llama-14m", rows=64, prompt=536, length=64, group=8))
    ids = problem.batch["tokens"]
    scored = (torch.arange(600) >= 536).expand_as(ids)
    step = step_of("shared", 1.0, 64, problem)
    arms = {"tree": lambda: fold(ids, torch.ones_like(ids), scored, balance=4.0 * 384).sees(), "pass": step}
    seconds, _ = timing.collect(timing.turns(arms, rounds, warm_up=1, clock=time.process_time))
    return timing.median(seconds["tree"]), timing.median(seconds["pass"])


def draw(found: dict[int, list[float]]) -> Figure:
    """Factors against prompt over answer length, measured and at most."""
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    axis = figure.subplots()
    for number, (group, factors) in enumerate(found.items()):
        ratios = [prompt / ANSWER for prompt in PROMPTS]
        axis.plot(ratios, factors, "o-", color=f"C{number}", label=f"{group} answers to a prompt")
        axis.plot(ratios, [limit(prompt, group) for prompt in PROMPTS], "--", color=f"C{number}", linewidth=1)
    axis.plot([], [], "k--", linewidth=1, label="all tokens over the distinct ones")
    axis.axhline(1, color="black", linewidth=0.5)
    axis.set_xscale("log", base=2)
    axis.set_xticks([prompt / ANSWER for prompt in PROMPTS], [str(Fraction(prompt, ANSWER)) for prompt in PROMPTS])
    axis.set_xlabel("tokens of the prompt over tokens of an answer")
    axis.set_ylabel("times as fast")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def main() -> None:
    """Measure, print, write and draw."""
    parser = timing.options(__doc__, rounds=5, out="out/shared_tokens_curve")
    given: Any = parser.parse_args()
    torch.set_num_threads(1)
    tree, whole = building(given.rounds)
    print(f"a tree of 64 rows of 600 tokens: {1000 * tree:.1f} ms, {tree / whole:.2%} of {whole:.2f} s", flush=True)
    found: dict[int, list[float]] = {}
    for group in GROUPS:
        for prompt in PROMPTS:
            found.setdefault(group, []).append(factor(prompt, group, given.rounds))
            of_limit = f"at most {limit(prompt, group):.2f}"
            print(f"{group} answers of {ANSWER}, prompt of {prompt}: {found[group][-1]:.2f} x, {of_limit}", flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    write_json(
        given.out / "shared_tokens.json",
        {"setup": timing.machine("cpu", "transformers"), "factors": found, "tree": tree, "pass": whole},
    )
    save_figure(draw(found), given.out, "shared_tokens")


if __name__ == "__main__":
    main()
