"""`sparkjoy study gain`: the measurements of `step_gain`, their table and figure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

from sparkjoy_lab.studies.drawing import legend, panels
from sparkjoy_lab.studies.step_gain import StepGainStudy, run
from sparkjoy_lab.studies.study import Rows, Study, Work

GAINS = {"training_gain": ("update alone", "tab:blue"), "total_gain": ("sampling included", "tab:orange")}
COLUMNS = {"flops_ratio": "B/F", "sample": "sample", "dg": "dg", "kondo": "kondo"}


@dataclass(frozen=True)
class GainStudy(StepGainStudy, Study):
    """What the gate saves a step as prompts, vocabulary and model grow and backward passes get dearer."""

    trains = False
    folder = "Folder for summary.json and the figure; written when everything is measured."

    def run(self, work: Work) -> Rows:
        torch.set_num_threads(1)
        return run(self, work.progress)

    def summary(self, rows: Rows) -> dict[str, Any]:
        return {"runs": rows}

    def tables(self, rows: Rows) -> dict[str, pd.DataFrame]:
        found = pd.DataFrame(rows).astype({"value": str}).rename(columns={"value": "to"}).set_index(["changed", "to"])
        times = found[list(COLUMNS)].map("{:.2f}".format).rename(columns=COLUMNS)
        gains = found[list(GAINS)].map("{:.1f}".format).set_axis(["gain", "with sampling"], axis=1)
        title = "CPU milliseconds a step, medians; gain: DG's over the gate's, of the update and with sampling"
        return {title: pd.concat([times, gains], axis=1)}

    def figures(self, rows: Rows) -> dict[str, Figure]:
        return {"gain": plot(rows)}


def plot(rows: Rows) -> Figure:
    """Gain a step, with and without sampling, against what is changed."""
    found = pd.DataFrame(rows)
    changes = list(dict.fromkeys(found["changed"]))
    columns = min(2, len(changes))
    figure, axes = panels(-(-len(changes) // columns), columns, 3.2, sharey=True)
    for number, (axis, changed) in enumerate(zip(axes, changes, strict=False)):
        of_panel = found[found["changed"] == changed]
        places = range(len(of_panel))
        for name, (label, color) in GAINS.items():
            axis.plot(places, of_panel[name], "o" if changed == "body" else "o-", color=color, label=label)
            axis.plot(places, of_panel[f"{name}_flops"], "x", color=color, label=f"{label}, in FLOPs")
        axis.set_xticks(list(places), [str(value).replace(" ", "\n") for value in of_panel["value"]])
        axis.set(xlabel=changed, yscale="log")
        axis.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
        axis.minorticks_off()
        axis.set_ylabel("" if number % columns else "DG's step over the gate's")
    for axis in axes[len(changes) :]:
        axis.remove()
    legend(figure, axes[0], columns=4)
    return figure
