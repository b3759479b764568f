"""What a run's gate decides on, where that is not its sampler's log-probs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparkjoy_lab.training.flags import refuse_idle

Screen = Literal["sampler", "recorded", "exact", "stale", "bfloat16", "early-exit", "draft", "cached", "flat"]


@dataclass(frozen=True)
class DraftSettings:
    """The draft, and how far it is trusted."""

    screen: Screen = "sampler"
    """Log-probs that the gate decides on: the sampler's own, free, or an exact forward pass where others sampled; those
    recorded, whoever sampled; an exact forward pass; or a cheaper draft."""
    verify: float | None = None
    """Propose so many times the rate by the draft, and decide by exact log-probs of the proposed; None: do not."""
    audit_every: int = 20
    """Steps between comparisons of the draft with an exact forward pass."""
    recall_floor: float = 0.5
    """Give the draft up for exact screening when it finds less than this fraction of the rows to keep; 0: never."""
    refresh_every: int = 10
    """Steps that the weights of --screen stale are used for."""
    exit_layers: int = 1
    """Layers read by --screen early-exit."""
    max_age: int = 200
    """Steps that a log-prob of --screen cached is believed for."""
    lesson_every: int = 1
    """Steps between lessons of --screen draft."""
    draft_learning_rate: float = 3e-3
    """Adam's learning rate for --screen draft."""

    def __post_init__(self) -> None:
        if self.audit_every < 1:
            raise ValueError(f"--audit-every {self.audit_every}: expected at least 1.")
        if self.verify is not None and self.screen == "exact":
            raise ValueError(f"--verify {self.verify:g} verifies a draft; --screen exact needs none.")
        of_screens = {
            "refresh_every": "stale",
            "exit_layers": "early-exit",
            "max_age": "cached",
            "lesson_every": "draft",
            "draft_learning_rate": "draft",
        }
        goes_with = {name: (self.screen == screen, f"--screen {screen}") for name, screen in of_screens.items()}
        audits = (self.drafted, "a --screen that is a draft, or --verify")
        refuse_idle(self, {"audit_every": audits, "recall_floor": audits, **goes_with})

    @property
    def drafted(self) -> bool:
        """Whether a draft decides, or proposes."""
        return self.screen not in ("sampler", "recorded", "exact") or self.verify is not None

    @property
    def suffix(self) -> str:
        """What follows the method in an arm's name, such as ` screened by draft verified x4`; nothing without one."""
        screened = "" if self.screen == "sampler" else f" screened by {self.screen}"
        return screened + ("" if self.verify is None else f" verified x{self.verify:g}")
