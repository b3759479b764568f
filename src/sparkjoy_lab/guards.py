"""Against gambling: judge an action by what its repeated draws paid on average, not by one lucky draw.

No statistic of a single sample tells a lucky draw of a bad action from a breakthrough; its history can. A guard is a
score function with memory, told before each step which (context, action) every row belongs to. Off unless given as
`GatedBackward(score=guard)`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparkjoy import checks, states
from sparkjoy.scores import delight


class RepeatedDraws:
    """Count, mean and standard deviation of the rewards of each key, over its draws so far.

    >>> draws = RepeatedDraws(keys=2)
    >>> draws.update(torch.tensor([0, 0, 1]), torch.tensor([1.0, 3.0, 5.0]))
    >>> draws.mean, draws.deviation
    (tensor([2., 5.], dtype=torch.float64), tensor([1.4142, 0.0000], dtype=torch.float64))

    Args:
        keys: how many keys there are; a key is a whole number below it.
        memory: draws of a key that an average looks back over, about; None: all. Give one where rewards drift.
        device: where the statistics live: that of the keys and rewards.

    Raises:
        ValueError: fewer than 1 key, or a memory below 1.
    """

    def __init__(self, keys: int, memory: int | None = None, device: torch.device | str | None = None) -> None:
        keys = checks.whole("keys", keys)
        if memory is not None:
            memory = checks.whole("memory", memory, "at least 1 draw, or None for all of them")
        self.memory = memory
        try:
            self.count = torch.zeros(keys, dtype=torch.float64, device=device)
        except Exception as error:  # torch has many kinds: of a device or of memory there is not
            raise ValueError(f"no room for keys = {keys} on device = {checks.described(device)}: {error}") from error
        self.mean = torch.zeros_like(self.count)
        self._squares = torch.zeros_like(self.count)  # summed squared deviations from the mean

    @property
    def deviation(self) -> Tensor:
        """(keys,) sample standard deviation of one draw; 0 with fewer than 2 draws."""
        return (self._squares / (self.count - 1).clamp(min=1)).sqrt()

    def update(self, keys: Tensor, rewards: Tensor) -> None:
        """Add a batch: keys (B,) and rewards (B,)."""
        size = len(self.count)
        checks.tensor("keys", keys, shape="whole numbers (B,)", beside=self.count)
        checks.tensor("rewards", rewards, shape="(B,)", beside=self.count)
        if keys.dtype != torch.int64:
            raise ValueError(f"keys is {keys.dtype}; expected whole numbers of torch.int64.")
        if keys.shape != rewards.shape or keys.dim() != 1:
            raise ValueError(f"keys {tuple(keys.shape)} and rewards {tuple(rewards.shape)}; expected (B,) and (B,).")
        if len(keys) and not 0 <= int(keys.min()) <= int(keys.max()) < size:
            raise ValueError(f"keys from {int(keys.min())} to {int(keys.max())}; expected 0 to {size - 1}.")
        rewards = rewards.detach().double()
        checks.finite("rewards", rewards)
        new = torch.bincount(keys, minlength=size).double()
        new_mean = torch.zeros_like(self.mean).index_add_(0, keys, rewards) / new.clamp(min=1)
        new_squares = torch.zeros_like(self.mean).index_add_(0, keys, (rewards - new_mean[keys]).square())
        if self.memory is not None:
            remembered = self.count.clamp(max=self.memory)
            self._squares *= remembered / self.count.clamp(min=1)
            self.count = remembered
        # Two batches' moments merged (Chan, Golub and LeVeque 1979): stable where the mean is far from 0.
        total = self.count + new
        difference = (new_mean - self.mean).where(new > 0, 0)
        self._squares += new_squares + difference.square() * self.count * new / total.clamp(min=1)
        self.mean += difference * new / total.clamp(min=1)
        self.count = total

    def state_dict(self) -> dict[str, Any]:
        """The statistics, for a checkpoint."""
        return {"count": self.count, "mean": self.mean, "squares": self._squares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up saved statistics."""
        states.check("RepeatedDraws", state, count=self._fits, mean=self._fits, squares=self._fits)
        self.count, self.mean, self._squares = (state[name].clone() for name in ("count", "mean", "squares"))

    def _fits(self, saved: Any) -> bool:
        sound = saved is not None and states.is_row(saved)
        return sound and saved.shape == self.count.shape and saved.dtype == self.count.dtype


class GuardedDelight:
    """Delight with each row's reward replaced by its key's mean reward: χ = (U + mean(key) − reward) · ℓ.

    The baseline stays the row's own. Where a key always pays the same, this is delight exactly; a lucky draw of an
    action that is bad on average has negative delight. A key seen for the first time is taken at its word. The keys
    must separate what pays differently: one key for an action that is right in some contexts and wrong in others
    hides both.

    >>> guard = GuardedDelight(RepeatedDraws(keys=2))
    >>> guard.observe(torch.tensor([1, 1, 1, 0]), torch.tensor([-2.0, -2.0, 3.0, 0.5]))  # action 1 was lucky once
    >>> guard(torch.tensor([-2.0, -2.0, 3.0, 0.5]), torch.tensor([0.5, 0.5, 0.5, 0.5]).log()) > 0
    tensor([False, False, False,  True])

    Args:
        draws: the statistics; their `keys` is the number of (context, action) pairs, or of answer classes.
    """

    def __init__(self, draws: RepeatedDraws) -> None:
        self.draws = checks.instance("draws", draws, RepeatedDraws, "a RepeatedDraws(...)")
        self._keys: Tensor | None = None
        self._rewards: Tensor | None = None

    def observe(self, keys: Tensor, rewards: Tensor) -> None:
        """Say which key each row of the coming step has (B,), and what it paid (B,). Call before the step."""
        self.draws.update(keys, rewards)
        self._keys, self._rewards = keys, checks.floating(rewards)

    def __call__(self, advantages: Tensor, log_probs: Tensor) -> Tensor:
        """The score of the rows last observed: (B,) from advantages (B,) and log-probs (B,), detached.

        Raises:
            ValueError: no rows observed, or another number of them.
        """
        if self._keys is None or self._rewards is None:
            raise ValueError("the guard has seen no rows; call observe(keys, rewards) before the step.")
        advantages = checks.advantages(advantages)
        if advantages.shape != self._keys.shape:
            raise ValueError(
                f"{tuple(advantages.shape)} advantages, but the rows observed are {tuple(self._keys.shape)}; "
                "call observe(keys, rewards) with the rows of this step."
            )
        luck = self._rewards - self.draws.mean[self._keys].to(self._rewards.dtype)
        return delight(advantages - luck, log_probs)

    def state_dict(self) -> dict[str, Any]:
        """The statistics, for a checkpoint."""
        return self.draws.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up saved statistics."""
        self.draws.load_state_dict(state)
