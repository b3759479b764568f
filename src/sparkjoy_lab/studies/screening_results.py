"""What the runs of the screening study come to, part by part."""

from __future__ import annotations

import pandas as pd

from sparkjoy_lab.studies.frames import as_records
from sparkjoy_lab.training.loop import Record

PARTS = ("screeners", "noise", "unbiased")
MEASURED = (
    "recall",
    "draft_recall",
    "spearman",
    "proposed",
    "seconds_over_forward",
    "learn_over_forward",
    "flops_over_forward",
)
NAMES = {"screen": "screener", "price_asked": "price"}
OF_AN_ARM = ("screen", "method", "rate", "price_asked", "verify", "noise", "noise_kind", "batch_size", "step")
SHARED = ("error", "mean_error")
ERRORS = ("error", "error_sd", "mean_error")
SHOWN = {
    "screeners": (*ERRORS, "recall", "draft_recall", "spearman", "seconds_over_forward", "learn_over_forward"),
    "noise": (*ERRORS, "seeds"),
    "unbiased": (*ERRORS, "step", "backward_samples"),
}


def means(rows: list[Record]) -> pd.DataFrame:
    """One row an arm of a part: means and deviations over its seeds; "mean_error" is over a seed's evaluations."""
    frame = pd.json_normalize(rows)
    keys = ["part", "task", "arm"]
    columns = [
        *OF_AN_ARM,
        "backward_samples",
        "error",
        "seed",
        "screening.exact",
        *(f"screening.{n}" for n in MEASURED),
    ]
    last = frame.groupby([*keys, "seed"], sort=False).tail(1).reindex(columns=[*keys, *columns])
    last = last.astype({"screening.exact": float} | {f"screening.{name}": float for name in MEASURED})
    found = last.groupby(keys, sort=False).agg(
        **{NAMES.get(name, name): (name, "first") for name in OF_AN_ARM},
        backward_samples=("backward_samples", "mean"),
        **{name: (f"screening.{name}", "mean") for name in MEASURED},
        gave_up=("screening.exact", "sum"),
        error=("error", "mean"),
        error_sd=("error", "std"),
        seeds=("error", "size"),
    )
    of_seeds = frame.groupby([*keys, "seed"], sort=False)["error"].mean().groupby(level=keys, sort=False)
    return found.assign(mean_error=of_seeds.mean(), mean_error_sd=of_seeds.std())


def summary(rows: list[Record]) -> dict[str, list[Record]]:
    """The tables of summary.json; a screener's errors stand beside those of an exact pass on the same task."""
    every = as_records(means(rows))
    exact = {row["task"]: row for row in every if row["part"] == "screeners" and row["screener"] == "exact"}
    found: dict[str, list[Record]] = {part: [] for part in PARTS}
    for row in every:
        part = row.pop("part")
        if part == "screeners":
            row |= {f"{name}_exact": exact.get(row["task"], {}).get(name) for name in SHARED}
        found[part].append(row)
    return found


def tables(rows: list[Record]) -> dict[str, pd.DataFrame]:
    """One row an arm of every part."""
    found = means(rows)
    return {
        f"{part}: means over {of_part['seeds'].max()} seeds": of_part.droplevel("part")[list(SHOWN[str(part)])].rename(
            columns=lambda name: name.replace("_", " ")
        )
        for part, of_part in found.groupby(level="part", sort=False)
    }
