"""`sparkjoy bench`: the measurements of `lab.bench`, their tables and figure."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import pandas as pd
import tyro

from sparkjoy_lab.bench.run import BenchConfig, plot, run
from sparkjoy_lab.studies.study import Rows, Study, Work
from sparkjoy_lab.training.flags import need

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FLAT = tyro.conf.arg(name="")


@dataclass(frozen=True)
class Bench(Study):
    """Seconds and peak memory of one step: dense, gated, and what else one could do, in one run."""

    trains = False
    folder = "Folder for config.json, summary.json and the figure; summary.json is written after every round."
    asked: Annotated[BenchConfig, FLAT] = field(default_factory=BenchConfig)

    def config(self) -> dict[str, Any]:
        return asdict(self.asked)

    def run(self, work: Work) -> Rows:
        need("bench", "transformers", *(["kondo_gate"] if "kondo-gate" in self.asked.arms else []))
        return [run(self.asked, work.out, work.progress)]

    def summary(self, rows: Rows) -> dict[str, Any]:
        return rows[0]

    def tables(self, rows: Rows) -> dict[str, pd.DataFrame]:
        return bench_tables(rows[0])

    def figures(self, rows: Rows) -> dict[str, Figure]:
        return {"speedup": plot(rows[0], self.asked.workload.positive)}


def bench_tables(result: dict[str, Any]) -> dict[str, pd.DataFrame]:
    """One row an arm and rate: rows that passed backward and of a micro-batch, milliseconds, dense over its own."""
    arms, over = pd.json_normalize(result["arms"]), result["backward_over_forward"]
    shown = pd.DataFrame(
        {
            "arm": arms["arm"].where(arms["noise"].isna(), arms["noise"].map("noise {:g}".format, na_action="ignore")),
            "rate": arms["rate"].map(_rate),
            "rows": arms["backward_rows"].astype(str),
            "size": arms["micro_batch_size"].astype(str),
            **{f"{p} ms": (1000 * arms[f"seconds.total.{p}"]).map("{:,.1f}".format) for p in ("p20", "p50", "p80")},
            "speed-up": arms["speedup"].map("{:.2f}".format),
        }
    )
    title = (
        f"one step without the optimizer, {result['parameters'] / 1e6:.3g}M parameters; "
        f"backward over forward {over['seconds']:.2f} in seconds, {over['flops']:.2f} in FLOPs"
    )
    found = {title: shown.set_index("arm")}
    if result.get("memory"):
        memory = pd.DataFrame(result["memory"])
        peak, resident = memory["peak_bytes"], memory["peak_resident_bytes"].astype(float)
        columns = {
            "rate": memory["rate"].map(_rate),
            "size": memory["micro_batch_size"].astype(str),
            "MB in tensors": (peak / 1e6).map("{:,.1f}".format),
            "MB resident": ["" if one != one else f"{one / 1e6:,.1f}" for one in resident],
            "of undivided": (peak / peak[0]).map("{:.1%}".format),
        }
        title = "peak memory of the step above weights, gradients and optimizer state"
        found[title] = pd.DataFrame(columns).set_index(memory["arm"])
    return found


def _rate(rate: float | None) -> str:
    return "" if rate is None or rate != rate else f"{rate:g}"
