"""What the runs of the language study come to: where an arm ends beside TRL's own, and after how many seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from sparkjoy_lab.studies.frames import grouped
from sparkjoy_lab.training.loop import Record

DENSE = "TRL's own"
SHARED = f"{DENSE}, shared"
LORA = "LoRA"
PARTS = ("sampling", "gate", "update", "optimizer")
"""What a step's seconds go to; the update is packing, forward and backward passes."""
COSTS = ("step", "seconds", "backward_tokens")
LAST = 3
"""Scores at the end of a run that its last score is the mean of."""
GAIN = 0.9
"""Of the dense arm's rise in score: the target of the costs."""
DRAWS = 4_000
"""Of a bootstrap."""


def dense_of(arm: str) -> str:
    """The arm that another is compared with: of full training or of adapters."""
    return LORA if arm.startswith(LORA) else DENSE


def table(rows: list[Record]) -> list[Record]:
    """Of every arm: its last score, that less the dense arm's, and what 90% of the dense arm's gain costs it.

    Intervals hold 95%: of the difference by Student's t over the seeds that both have, of the costs by a bootstrap over
    seeds. A cost is None where a seed never got there, or where the dense arm gained nothing.
    """
    runs: dict[str, dict[int, list[Record]]] = {}
    for (arm, seed), run in grouped(rows, "arm", "seed").items():
        runs.setdefault(arm, {})[seed] = run
    return [_of_arm(arm, of_seed, runs.get(dense_of(arm), of_seed)) for arm, of_seed in runs.items()]


def _of_arm(arm: str, runs: dict[int, list[Record]], dense: dict[int, list[Record]]) -> Record:
    both = [seed for seed in runs if seed in dense]
    target = target_of(list(dense.values()))
    reached, of_dense = ([crossing(run, target) for run in of.values()] for of in (runs, dense))
    some = next(iter(runs.values()))
    steps = max(1, some[-1]["step"])
    found: Record = {
        "arm": arm,
        "learning_rate": some[0]["learning_rate"],
        "seeds": len(runs),
        "steps": steps,
        "before": float(np.mean([run[0]["score"] for run in runs.values()])),
        "score": float(np.mean([last_score(run) for run in runs.values()])),
        "difference": interval([last_score(runs[seed]) - last_score(dense[seed]) for seed in both]),
        "kept": float(np.mean([row.get("kept", 1.0) for run in runs.values() for row in run[1:]])),
        "target": target,
        "seconds_a_step": {
            part: float(np.mean([run[-1]["seconds"][part] / max(1, run[-1]["step"]) for run in runs.values()]))
            for part in (*PARTS, "total")
        },
    }
    rises = target > float(np.mean([run[0]["score"] for run in dense.values()]))
    for cost in COSTS:
        own, theirs = ([one[cost] for one in several if one is not None] for several in (reached, of_dense))
        all_did = rises and len(own) == len(runs)
        found[f"{cost}_to_target"] = float(np.mean(own)) if all_did else None
        found[f"{cost}_of_dense"] = ratio_of_means(own, theirs) if all_did and len(theirs) == len(dense) else None
    return found


def last_score(run: list[Record]) -> float:
    """The mean of the last scores, but not of the one before training."""
    scores = [row["score"] for row in run[1:] if "score" in row] or [run[0]["score"]]
    return float(np.mean(scores[-LAST:]))


def target_of(dense: Sequence[list[Record]]) -> float:
    """The score at which 90% of the dense arm's mean gain is reached."""
    before, after = (float(np.mean(of)) for of in ([run[0]["score"] for run in dense], [*map(last_score, dense)]))
    return before + GAIN * (after - before)


def interval(differences: Sequence[float]) -> list[float]:
    """Mean, and the ends of its 95% interval, by Student's t; NaN ends where there is one number.

    >>> [round(number, 2) for number in interval([0.0, 1.0, 2.0])]
    [1.0, -1.48, 3.48]
    """
    mean, count = float(np.mean(differences)), len(differences)
    if count < 2:
        return [mean, math.nan, math.nan]
    half = float(stats.t.ppf(0.975, count - 1) * np.std(differences, ddof=1) / math.sqrt(count))
    return [mean, mean - half, mean + half]


def ratio_of_means(own: Sequence[float], dense: Sequence[float]) -> list[float]:
    """One mean over another, and the ends of its 95% interval, seeds of both drawn anew."""
    drawn = np.random.default_rng(0)
    means = [np.array(of)[drawn.integers(len(of), size=(DRAWS, len(of)))].mean(axis=1) for of in (own, dense)]
    low, high = np.quantile(means[0] / means[1], [0.025, 0.975])
    return [float(np.mean(own) / np.mean(dense)), float(low), float(high)]


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


def tables(rows: list[Record]) -> dict[str, pd.DataFrame]:
    """One row an arm: the last score, that less the dense arm's, what was kept, seconds of a step and to the target."""
    found = table(rows)
    columns = [
        "seeds",
        "steps",
        "right %",
        "less TRL's own",
        "95%",
        "kept %",
        "s/step",
        "s to 90%",
        "of TRL's own",
        "95%",
    ]
    shown = []
    for row in found:
        difference, *ends = (100 * number for number in row["difference"])
        ratio = row["seconds_of_dense"] or [None] * 3
        shown.append(
            [
                str(row["seeds"]),
                str(row["steps"]),
                f"{100 * row['score']:.1f}",
                f"{difference:+.1f}",
                _range(ends, "+.1f"),
                f"{100 * row['kept']:.0f}",
                f"{row['seconds_a_step']['total']:.2f}",
                _number(row["seconds_to_target"], "0f"),
                _number(ratio[0], "2f"),
                _range(ratio[1:], ".2f"),
            ]
        )
    title = f"from {100 * found[0]['before']:.1f}%; last scores are means of {LAST}; 90% of TRL's own gain is "
    title += f"{100 * found[0]['target']:.1f}%"
    return {title: pd.DataFrame(shown, index=pd.Index([row["arm"] for row in found], name="arm"), columns=columns)}


def _number(value: float | None, digits: str) -> str:
    return "-" if value is None else f"{value:.{digits}}"


def _range(ends: Sequence[float | None], how: str) -> str:
    return "-" if any(end is None or end != end for end in ends) else " to ".join(f"{end:{how}}" for end in ends)
