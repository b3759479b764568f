"""What stands between a learner and its data: actors that are late, broken, corrupted or lucky (arXiv 2603.20521)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from sparkjoy_lab.training.flags import refuse_idle
from sparkjoy_lab.training.processes import WHOLE, Share

DelayKind = Literal["uniform", "oldest"]


@dataclass(frozen=True)
class Frictions:
    """How far the actors are from the learner; without arguments they are the learner.

    Args:
        delay: D, steps that an actor's weights may be old.
        delay_kind: which of the learner's last D + 1 weights act in a step: one drawn uniformly, or the oldest.
        bug: chance that an answer is replaced by zeros.
        corrupt: chance that a reward is replaced by a fair coin of 0 and 1.
        discover: chance that an answer is replaced by the right one.

    Raises:
        ValueError: a delay below 0, or a chance outside [0, 1].
    """

    delay: int = 0
    delay_kind: DelayKind = "uniform"
    bug: float = 0.0
    corrupt: float = 0.0
    discover: float = 0.0

    def __post_init__(self) -> None:
        if self.delay < 0:
            raise ValueError(f"--delay {self.delay}: expected a number of steps, 0 or more.")
        if self.delay_kind not in ("uniform", "oldest"):
            raise ValueError(f"--delay-kind {self.delay_kind}: expected uniform or oldest.")
        refuse_idle(self, {"delay_kind": (self.delay > 0, "--delay")})
        for name in ("bug", "corrupt", "discover"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} {getattr(self, name)}: expected a chance, such as 0.1 for 10%.")

    @property
    def foreign(self) -> bool:
        """Whether answers may come from another policy than the learner as it is now."""
        return bool(self.delay or self.bug or self.discover)

    def answers(
        self, answers: Tensor, log_probs: Tensor, right: Tensor, generator: torch.Generator, share: Share = WHOLE
    ) -> tuple[Tensor, Tensor]:
        """Sampled answers (B, T) and their log-probs, some replaced by `right` or by zeros, recorded at log-prob 0.

        >>> generator, drawn = torch.Generator().manual_seed(0), torch.tensor([[1, 2], [3, 4]])
        >>> Frictions(discover=1.0, bug=1.0).answers(drawn, torch.full((2, 2), -1.0), drawn.flip(1), generator)
        (tensor([[2, 1],
                [4, 3]]), tensor([[0., 0.],
                [0., 0.]]))
        """
        for chance, other in ((self.bug, torch.zeros_like(answers)), (self.discover, right)):
            if chance:
                hit = _drawn(chance, len(answers), generator, share).unsqueeze(1)
                answers, log_probs = other.where(hit, answers), log_probs.masked_fill(hit, 0)
        return answers, log_probs

    def rewards(self, rewards: Tensor, generator: torch.Generator, share: Share = WHOLE) -> Tensor:
        """Rewards (B,), some replaced by a coin's."""
        if not self.corrupt:
            return rewards
        coin = _drawn(0.5, len(rewards), generator, share).to(rewards.dtype)
        return coin.where(_drawn(self.corrupt, len(rewards), generator, share), rewards)


def _drawn(chance: float, count: int, generator: torch.Generator, share: Share) -> Tensor:
    """(count,) of this process's part of draws that are the same on all processes."""
    total = count * share.count
    return (torch.rand(total, generator=generator) < chance)[share.rows(total)]


class Actors:
    """The learner's last D + 1 weights, of which one acts in every step; at first there are fewer.

    >>> learner = nn.Linear(1, 1)
    >>> actors = Actors(learner, Frictions(delay=2, delay_kind="oldest"))
    >>> _ = learner.weight.data.fill_(7.0)
    >>> actors.follow()
    >>> bool(actors.draw(torch.Generator()).weight == 7)
    False

    Args:
        learner: whom they follow; its parameters are all of its state.
        frictions: the delay.
    """

    def __init__(self, learner: nn.Module, frictions: Frictions) -> None:
        self._learner = learner
        self._kind = frictions.delay_kind
        self._actor = copy.deepcopy(learner)
        size = sum(parameter.numel() for parameter in learner.parameters())
        self._snapshots = torch.zeros(frictions.delay + 1, size)
        self._taken = 0
        self.follow()

    def follow(self) -> None:
        """Take up the learner's weights as the newest."""
        self._snapshots[self._taken % len(self._snapshots)] = parameters_to_vector(self._learner.parameters()).detach()
        self._taken += 1

    def draw(self, generator: torch.Generator) -> Any:
        """The policy that acts in this step; good until the next `follow`."""
        there = min(self._taken, len(self._snapshots))
        any_age = self._kind == "uniform"
        index = int(torch.randint(there, (), generator=generator)) if any_age else self._taken % there
        vector_to_parameters(self._snapshots[index], self._actor.parameters())
        return self._actor

    def state_dict(self) -> dict[str, Any]:
        """All weights that may still act."""
        return {"snapshots": self._snapshots, "taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state.

        Raises:
            ValueError: a state without weights.
        """
        if state["taken"] < 1:
            raise ValueError(f"actors of {state['taken']} weights")
        self._snapshots.copy_(state["snapshots"])
        self._taken = state["taken"]
