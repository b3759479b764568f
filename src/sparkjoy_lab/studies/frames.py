"""Rows to frames and back: what the studies' tables have in common."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd

from sparkjoy_lab.training.loop import Record


def grouped(rows: Iterable[Record], *keys: str) -> dict[tuple[Any, ...], list[Record]]:
    """Rows by the values of some of their keys, in the order in which they come.

    >>> grouped([{"arm": "dg", "seed": 0}, {"arm": "pg", "seed": 0}, {"arm": "dg", "seed": 1}], "arm")
    {('dg',): [{'arm': 'dg', 'seed': 0}, {'arm': 'dg', 'seed': 1}], ('pg',): [{'arm': 'pg', 'seed': 0}]}
    """
    found: dict[tuple[Any, ...], list[Record]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def over_arm(values: pd.Series[float], arm: str = "dg") -> pd.Series[float]:
    """Values over those of one arm in the same case: the levels of the index but "arm". NaN where that has none, or 0.

    >>> index = pd.MultiIndex.from_tuples([("mnist", "dg"), ("mnist", "pg"), ("reversal", "pg")], names=["task", "arm"])
    >>> over_arm(pd.Series([2.0, 3.0, 1.0], index)).tolist()
    [1.0, 1.5, nan]
    """
    of_arm = values.where(values.index.get_level_values("arm") == arm)
    cases = [name for name in values.index.names if name != "arm"]
    dense = of_arm.groupby(level=cases, sort=False, dropna=False).transform("first")
    return values / dense.where(dense != 0)


def as_records(frame: pd.DataFrame) -> list[Record]:
    """A frame's rows as plain dicts, its index among them; None for what it has not."""
    plain = frame.reset_index().astype(object)
    records: list[Record] = plain.where(plain.notna(), None).to_dict("records")
    return records


def mean_curves(rows: list[Record], *keys: str, **means: str) -> pd.DataFrame:
    """Of every group, at the steps that all of its seeds reached: mean, least and greatest error, and other means.

    Args:
        rows: records of evaluations.
        keys: what tells groups apart.
        means: names of the columns, and what each is a mean of.

    Returns:
        A frame of keys, step, error, best, worst and `means`.
    """
    frame = pd.json_normalize(rows)
    found = frame.groupby([*keys, "step"], sort=False).agg(
        error=("error", "mean"),
        best=("error", "min"),
        worst=("error", "max"),
        seeds=("seed", "size"),
        **{name: (column, "mean") for name, column in means.items()},
    )
    seeds = found["seeds"].groupby(level=list(keys), sort=False).transform("max")
    return found[found["seeds"] == seeds].reset_index().sort_values("step", kind="stable")


def mean_and_spread(values: pd.Series[float], digits: int = 2) -> str:
    """`5.20 ± 0.10`: mean and standard deviation, the latter where there are several."""
    return f"{values.mean():.{digits}f}" + (f" ± {values.std():.{digits}f}" if len(values) > 1 else "")


def ratio(value: float | None, digits: int = 2) -> str:
    """So many digits, or a dash where there is none."""
    return "-" if value is None or value != value else f"{value:.{digits}f}"
