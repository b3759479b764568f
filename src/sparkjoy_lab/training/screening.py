"""What a run screens with, where that is not its sampler's log-probs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from sparkjoy_lab.drafts import AdvantageOnly, CachedLogProbs, DistilledDraft, LowerPrecision, StaleWeights
from sparkjoy_lab.policies.early_exit import EarlyExit
from sparkjoy_lab.training.draft_settings import DraftSettings

Keys = tuple[Callable[[Any], Tensor], int]
"""`rows -> (n,)`, whole numbers that are the same for the same action in the same example, and how many there are."""


@runtime_checkable
class Draftable(Protocol):
    """A task that can be screened by other means than its policy."""

    name: str

    def draft_policy(self) -> nn.Module:
        """A fresh policy much smaller than the task's, from torch's global random state."""
        ...

    def actions(self, rows: Any) -> Tensor:
        """The actions (n,) or (n, T) of rows."""
        ...

    def recurring(self) -> Keys | None:
        """What tells an example that comes round again; None where none does."""
        ...


def screener(settings: DraftSettings, seed: int, task: Any, policy: nn.Module) -> Callable[[Any], Tensor] | None:
    """What `--screen` names, for this policy; None for known log-probs and for an exact pass.

    A draft's weights are drawn from `seed`, and leave torch's global random state alone.

    Raises:
        ValueError: the task, or its policy, has no such screener.
    """
    screen = settings.screen
    if screen in ("sampler", "recorded", "exact"):
        return None
    if screen == "stale":
        return StaleWeights(policy, settings.refresh_every)
    if screen == "bfloat16":
        return LowerPrecision(policy, torch.bfloat16)
    if screen == "early-exit":
        return EarlyExit(policy, settings.exit_layers)
    if not isinstance(task, Draftable):
        raise ValueError(f"--screen {screen}: this task has no draft; expected another screen.")
    if screen == "flat":
        return AdvantageOnly(task.actions)
    if screen == "draft":
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            student = task.draft_policy()
        return DistilledDraft(student, learning_rate=settings.draft_learning_rate, every=settings.lesson_every)
    keys = task.recurring()
    if keys is None:
        raise ValueError(f"--screen cached: no example of {task.name} comes round again; expected another screen.")
    return CachedLogProbs(policy.log_probs, *keys, max_age=settings.max_age)  # type: ignore[arg-type]  # a task's policy
