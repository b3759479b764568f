"""What the runs of the language study come to: scores, and steps, seconds and tokens to the target."""

from __future__ import annotations

import math

import pandas as pd

from sparkjoy_lab.studies.frames import as_records, grouped, ratio
from sparkjoy_lab.training.loop import Record

DENSE = "TRL's own"
PARTS = ("sampling", "gate", "update", "optimizer")
"""What a step's seconds go to; the update is packing, forward and backward passes."""
COSTS = ("step", "seconds", "backward_tokens")


def table(rows: list[Record], target: float) -> list[Record]:
    """Of every arm: scores, and steps, seconds and tokens to the target, means over seeds; None where a seed failed.

    The target is reached where the line between two scores crosses it.
    """
    runs = pd.DataFrame([_of_run(run, target) for run in grouped(rows, "arm", "seed").values()])
    of_arm = runs.astype({f"{name}_to_target": float for name in COSTS}).groupby("arm", sort=False)
    stepped = pd.DataFrame(rows).reindex(columns=["arm", "step", "kept"])
    kept = stepped[stepped["step"] > 0].fillna({"kept": 1.0}).groupby("arm")["kept"].mean()
    found = of_arm.mean().assign(seeds=of_arm.size(), standard_error=of_arm["score"].sem(), kept=kept)
    for name in COSTS:
        to_target = of_arm[f"{name}_to_target"].agg(lambda seeds: seeds.mean(skipna=False))
        found[f"{name}_to_target"], found[f"{name}_of_dense"] = to_target, to_target / to_target.get(DENSE, math.nan)
    records = as_records(found)
    for record in records:
        record["seconds_a_step"] = {part: record.pop(f"a_step.{part}") for part in (*PARTS, "total")}
    return records


def _of_run(run: list[Record], target: float) -> Record:
    last = run[-1]
    reached = crossing(run, target) or dict.fromkeys(COSTS)
    return {
        **{name: last[name] for name in ("arm", "learning_rate", "score", "backward_tokens")},
        "steps": last["step"],
        **{f"a_step.{part}": last["seconds"][part] / last["step"] for part in (*PARTS, "total")},
        **{f"{name}_to_target": value for name, value in reached.items()},
    }


def crossing(run: list[Record], target: float) -> dict[str, float] | None:
    """Step, seconds and tokens at which the line through the scores first reaches the target; None if it never does."""
    scored = [row for row in run if "score" in row]
    for before, after in zip([scored[0], *scored], scored, strict=False):
        if after["score"] >= target:
            rise = after["score"] - before["score"]
            part = (target - before["score"]) / rise if rise > 0 else 0.0
            costs = [
                {"step": row["step"], "seconds": row["seconds"]["total"], "backward_tokens": row["backward_tokens"]}
                for row in (before, after)
            ]
            return {name: costs[0][name] + max(0.0, part) * (costs[1][name] - costs[0][name]) for name in costs[0]}
    return None


def tables(rows: list[Record], target: float) -> dict[str, pd.DataFrame]:
    """One row an arm: held-out score, what was kept, seconds of a step, and steps and seconds to the target."""
    found = table(rows, target)
    columns = ["right %", "±", "kept %", "steps", "s/step", "steps", "×", "seconds", "×"]
    shown = [
        [
            _number(100 * row["score"], 1),
            _number(row["standard_error"] and 100 * row["standard_error"], 1),
            _number(100 * row["kept"], 1),
            _number(row["steps"], 0),
            _number(row["seconds_a_step"]["total"], 2),
            _number(row["step_to_target"], 1),
            ratio(row["step_of_dense"]),
            _number(row["seconds_to_target"], 0),
            ratio(row["seconds_of_dense"]),
        ]
        for row in found
    ]
    title = f"means over {found[0]['seeds']} seeds; on the right, to {target:.0%}, and over TRL's own"
    return {title: pd.DataFrame(shown, index=pd.Index([row["arm"] for row in found], name="arm"), columns=columns)}


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
