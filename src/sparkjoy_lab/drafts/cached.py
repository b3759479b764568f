"""Log-probs remembered from the last time that the same example came by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparkjoy import checks, states
from sparkjoy.step.batches import take

NEVER = -1


class CachedLogProbs:
    """Screen recurring data with the log-prob that the same action in the same example had some steps ago.

    What is not in the cache, or too old, is computed, and remembered. Delight is remembered by its surprisal: the
    advantage is today's.

    >>> from sparkjoy.testing import TinyPolicy
    >>> policy = TinyPolicy(4, 3)
    >>> screen = CachedLogProbs(policy.log_probs, lambda rows: rows["action"], size=3, max_age=10)
    >>> rows = {"state": torch.ones(2, 4), "action": torch.tensor([0, 2])}
    >>> first, again = screen(rows), screen(rows)
    >>> bool((first == again).all()), screen.computed
    (True, 0)

    Args:
        log_prob_fn: `rows -> (n,)`, the policy's.
        key: `rows -> (n,)` whole numbers in [0, size), the same for the same action in the same example.
        size: how many keys there are.
        max_age: steps that a log-prob is believed for; 0: within its step.

    Raises:
        ValueError: a size below 1 or an age below 0; when called, a key outside the range.
    """

    def __init__(
        self, log_prob_fn: Callable[[Any], Tensor], key: Callable[[Any], Tensor], size: int, max_age: int
    ) -> None:
        checks.function("log_prob_fn", log_prob_fn, "a function from rows to log-probs", ...)
        checks.function("key", key, "a function from rows to whole numbers (n,)", ...)
        size = checks.whole("size", size)
        self.max_age = checks.whole("max_age", max_age, "a whole number of at least 0", least=0)
        self.computed = 0
        """Rows that the last call had to compute."""
        self._log_prob_fn = log_prob_fn
        self._key = key
        self._log_probs = torch.zeros(size)
        self._written = torch.full((size,), NEVER)
        self._now = 0

    @torch.no_grad()
    def __call__(self, rows: Any) -> Tensor:
        """Log-probs (n,), remembered or computed."""
        keys = self._keys(rows)
        written = self._written[keys]
        missing = ((written == NEVER) | (self._now - written > self.max_age)).nonzero().squeeze(1)
        self.computed = len(missing)
        if self.computed:
            part = rows if self.computed == len(keys) else take(rows, missing)
            self._remember(keys[missing], self._log_prob_fn(part))
        return self._log_probs[keys]

    def learn(self, seen: Sequence[tuple[Any, Tensor]]) -> None:
        """Remember exact log-probs, and that a step is over."""
        for rows, log_probs in seen:
            self._remember(self._keys(rows), log_probs)
        self._now += 1

    def state_dict(self) -> dict[str, Any]:
        return {"log_probs": self._log_probs, "written": self._written, "now": self._now}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        states.check("CachedLogProbs", state, log_probs=self._fits, written=self._fits, now=states.is_count)
        self._log_probs, self._written, self._now = state["log_probs"].clone(), state["written"].clone(), state["now"]

    def _fits(self, saved: Any) -> bool:
        return isinstance(saved, Tensor) and saved.shape == self._written.shape

    def _keys(self, rows: Any) -> Tensor:
        keys = checks.tensor("the cache's keys", self._key(rows), shape="whole numbers (n,)")
        if keys.dim() != 1 or keys.dtype != torch.int64 or bool((keys < 0).any() | (keys >= len(self._written)).any()):
            raise ValueError(
                f"the cache's keys are {keys.dtype} {tuple(keys.shape)}; expected whole numbers (n,) from 0 to "
                f"{len(self._written) - 1}."
            )
        return keys

    def _remember(self, keys: Tensor, log_probs: Tensor) -> None:
        checks.tensor("what log_prob_fn returned", log_probs, (1,), checks.FLOATING, "(n,)")
        if log_probs.shape != keys.shape:
            raise ValueError(
                f"log_prob_fn returned shape {tuple(log_probs.shape)} for {len(keys)} rows; expected one for each."
            )
        self._log_probs[keys] = log_probs.to(self._log_probs.dtype)
        self._written[keys] = self._now
