"""What a task hands to the training loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sparkjoy_lab.tasks.frictions import Frictions


@dataclass(frozen=True)
class Rollout:
    """One batch of answers and what they were worth.

    Args:
        batch: what the policy's `log_probs` takes, leading dimension B.
        advantages: (B,), or (B, T) where every token has its own.
        log_probs: (B,) or (B, T), those the answers were sampled with; with a graph if that was asked for. Answers that
            were injected have log-probs of 0.
        mask: (B, T), or None.
        reward: mean reward, 0-dim.
        group_size: answers per prompt, beside one another; None: the batch is one group.
        parts: (B,), the part of the data that each row belongs to, such as its class; None: there are none.
        foreign: whether the log-probs may be those of another policy than the one that learns.
    """

    batch: dict[str, Tensor]
    advantages: Tensor
    log_probs: Tensor
    mask: Tensor | None
    reward: Tensor
    group_size: int | None = None
    parts: Tensor | None = None
    foreign: bool = False


class Task(Protocol):
    """What the training loop needs of a task."""

    name: str
    frictions: Frictions
    """What its actors have; those of another age than the learner's are for the loop to keep."""
    samples_with_graph: bool
    """Whether `rollout` can keep the graph of the forward pass that sampled."""

    def policy(self) -> Any:
        """A fresh policy, with a `log_probs(rows)` method, from torch's global random state."""
        ...

    def rollout(self, policy: Any, generator: torch.Generator, graph: bool) -> Rollout:
        """Sample a batch from an actor; `graph`: keep the forward pass's graph in `log_probs`, to be differentiated."""
        ...

    def trim(self, rows: Any, length: int) -> Any:
        """Rows of a batch with their answers cut to the first `length` tokens."""
        ...

    def error(self, policy: Any) -> float:
        """Error of the greedy policy on held-out contexts, as a fraction."""
        ...
