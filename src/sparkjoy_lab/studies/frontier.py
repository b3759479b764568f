"""`sparkjoy frontier`: what gating does to one step of the user's own."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from sparkjoy_lab.bench.frontier import FrontierConfig, plot, run, summary
from sparkjoy_lab.training.console import study_progress
from sparkjoy_lab.training.flags import need
from sparkjoy_lab.training.folder import opened
from sparkjoy_lab.training.tracking import save_figure, write_json, write_json_lines


@dataclass(frozen=True)
class Frontier:
    """What gating saves of a step on your own model and batch, and what it does to the gradient."""

    asked: Annotated[FrontierConfig, tyro.conf.arg(name="")] = field(default_factory=FrontierConfig)
    folder = "Folder for config.json, answers.jsonl, summary.json and the figure; written when everything is measured."

    def start(self, out: Path) -> None:
        """Measure, write and print: its tables are text, which `sj.frontier` makes for anybody."""
        need("bench", "transformers")
        shown, out = out, out.absolute()  # a reward may go to another folder
        with opened(out, asdict(self.asked)):
            with study_progress() as progress:
                step, found = run(self.asked, progress)
            if step.answers:
                write_json_lines(out / "answers.jsonl", step.answers)
            write_json(out / "summary.json", summary(found, self.asked.noise))
            save_figure(plot(found, self.asked.noise), out, "frontier")
        for one in found.values():
            print(f"{one.table()}\n{one.recommend(self.asked.noise).reason}\n")
        for line in step.told:
            print(line)
        print(f"results in {shown}; drawn: frontier.png")
