"""None of the policy: the draft that any other must beat."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparkjoy import checks


class AdvantageOnly:
    """Screen as if all actions were equally likely: ranked by the advantage alone, for free. What a draft must beat.

    >>> AdvantageOnly(lambda rows: rows["action"])({"action": torch.tensor([0, 2])})
    tensor([-1., -1.])

    Args:
        actions: gives the actions (n,) or (n, T) of `rows`.
    """

    def __init__(self, actions: Callable[[Any], Tensor]) -> None:
        self._actions = checks.function("actions", actions, "a function from rows to actions (n,) or (n, T)", ...)

    def __call__(self, rows: Any) -> Tensor:
        """-1 for every action."""
        return torch.full_like(checks.tensor("what actions returned", self._actions(rows)), -1, dtype=torch.float32)
