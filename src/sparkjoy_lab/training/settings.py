"""What one training run is asked to do: a method, what its gate decides on, and the run itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparkjoy_lab.training.building import build_step
from sparkjoy_lab.training.draft_settings import DraftSettings
from sparkjoy_lab.training.flags import refuse_idle
from sparkjoy_lab.training.method_settings import Method as Method
from sparkjoy_lab.training.method_settings import MethodSettings
from sparkjoy_lab.training.method_settings import Score as Score
from sparkjoy_lab.training.run_settings import RunSettings


@dataclass(frozen=True)
class Settings(RunSettings, DraftSettings, MethodSettings):
    """One run: everything that its records depend on, but for the task.

    >>> Settings(rate=0.1, screen="draft", seed=3).label
    'kondo 10% screened by draft'
    """

    def __post_init__(self) -> None:
        RunSettings.__post_init__(self)
        DraftSettings.__post_init__(self)
        MethodSettings.__post_init__(self)
        if self.compare_every is not None and (not self.gated or self.drafted or self.unit == "token"):
            raise ValueError(
                f"--compare-every {self.compare_every}: goes with a gate of whole samples (kondo, uniform, unbiased), "
                "without a draft."
            )
        if self.drafted and (self.method not in ("kondo", "unbiased") or self.unit == "token"):
            raise ValueError("--screen and --verify go with a gate of whole samples: --method kondo, unbiased.")
        ranks = self.method in ("kondo", "uniform") and self.price is None and self.temperature == 0
        if self.price_kind != "batch" and (not ranks or self.drafted):
            raise ValueError(
                f"--price-kind {self.price_kind} goes with the --rate of kondo or uniform, without --price, "
                "--temperature, --screen or --verify."
            )
        refuse_idle(self, {"screen": (self.gated, "a gate: --method kondo, uniform, unbiased")})
        of_answers = self.method != "kondo" or self.score != "delight" or self.screen == "exact"
        if self.unit == "token" and (of_answers or self.micro_batch_size):
            raise ValueError(
                "--unit token goes with --method kondo, by delight on the sampler's log-probs, in one micro-batch."
            )
        build_step(self, torch.Generator())  # raises on a rate, price, temperature or alpha outside its range

    @property
    def label(self) -> str:
        """A short name of the arm, without the seed: `kondo 3% screened by draft`."""
        return super().label + self.suffix
