"""What the runs of the scaling study come to: the longest prompts, the table and the figure."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from sparkjoy_lab.studies.drawing import draw, legend, log_axes, panels, styles
from sparkjoy_lab.studies.frames import ratio
from sparkjoy_lab.training.loop import Record

BUDGETS = {"answers": "answers sampled", "backward_tokens": "tokens differentiated", "seconds": "seconds, all included"}
SHOWN = ("dg", "kondo 3%", "kondo 10%", "pg", "ppo")
"""The table has all arms."""


def longest(rows: list[Record], budgets: int = 24) -> list[Record]:
    """The longest prompt that all seeds solved within a budget, for a range of budgets of each kind."""
    frame = pd.DataFrame(rows).astype(dict.fromkeys(BUDGETS, float))
    arms = list(dict.fromkeys(frame["arm"]))
    most = frame.groupby(["arm", "prompt_length"], sort=False)[list(BUDGETS)].agg(lambda seeds: seeds.max(skipna=False))
    result = []
    for kind in BUDGETS:
        costs = frame[kind].dropna()
        for budget in np.geomspace(costs.min(), costs.max(), budgets).tolist() if len(costs) else ():
            solved = most[most[kind] <= budget * (1 + 1e-9)].reset_index().groupby("arm")["prompt_length"].max()
            lengths = solved.reindex(arms, fill_value=0)
            result += [
                {"budget": kind, "amount": budget, "arm": arm, "prompt_length": int(lengths[arm])} for arm in arms
            ]
    return result


def tables(rows: list[Record]) -> dict[str, pd.DataFrame]:
    """One row a method and prompt length: what all seeds spent, for each that reached the target, and over DG's."""
    frame = pd.json_normalize(rows)
    of_arm = frame.groupby(["prompt_length", "arm"], sort=False)
    solved, seeds = of_arm["answers"].count(), of_arm.size()
    spent = of_arm[[f"spent.{name}" for name in ("answers", "backward_tokens", "training_seconds", "seconds")]].sum()
    costs = spent.div(solved.where(solved > 0), axis=0).set_axis(["answers", "tokens", "training s", "total s"], axis=1)
    dense = costs[costs.index.get_level_values("arm") == "dg"].droplevel("arm")
    of_dg = (
        costs.drop(columns="answers") / dense.reindex(costs.index.get_level_values("prompt_length")).to_numpy()[:, 1:]
    )
    shown = pd.concat(
        [
            of_arm["learning_rate"].first().map("{:g}".format).rename("learning rate"),
            pd.Series([f"{n} of {m}" for n, m in zip(solved, seeds, strict=True)], costs.index, name="solved"),
            costs.map(_number),
            of_dg.map(partial(ratio, digits=3)).set_axis(["tokens", "training", "total"], axis=1),
        ],
        axis=1,
    )
    title = "spent by all seeds, for each that reached the target error; on the right, as a part of dg's"
    return {title: shown.rename_axis(["H", "arm"])}


def _number(cost: float) -> str:
    if cost != cost:
        return "-"
    return f"{cost:,.0f}" if cost >= 1000 else f"{cost:.2f}"


def plot(rows: list[Record]) -> Figure:
    """What the target took against the prompt length, in answers, backward tokens and seconds: means and seeds."""
    frame = pd.DataFrame(rows).astype(dict.fromkeys(BUDGETS, float))
    style = styles(frame["arm"], SHOWN)
    figure, axes = panels(1, len(BUDGETS), 4.2)
    for axis, (kind, label) in zip(axes, BUDGETS.items(), strict=True):
        for arm, of_arm in frame.groupby("arm", sort=False):
            means = of_arm.groupby("prompt_length")[kind].agg(lambda seeds: seeds.mean(skipna=False))
            draw(axis, means.index, means, style[str(arm)])
            axis.plot(of_arm["prompt_length"], of_arm[kind], ".", color=style[str(arm)]["color"], markersize=3)
        axis.set(xlabel="prompt length H")
        axis.set_xticks(sorted(frame["prompt_length"].unique()))
        log_axes(axis, "y")
        axis.set_title(label, fontsize="medium")
    legend(figure, axes[0])
    said = "to 1% error, each method at its best learning rate; dots: seeds that got there; lines: all did"
    figure.supxlabel(said, fontsize="medium")
    return figure
