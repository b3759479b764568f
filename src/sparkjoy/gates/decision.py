"""What a gate is, what it decides, and what it may say of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from sparkjoy import states
from sparkjoy.signs import Rule


@dataclass(frozen=True)
class Decision:
    """What a gate decided about N samples. Values stay tensors on their device until read.

    >>> import torch, sparkjoy as sj
    >>> decision = sj.KondoGate(rate=0.5)(torch.tensor([0.2, 1.5, -3.0, 0.7]))
    >>> decision.keep, decision.price
    (tensor([False,  True, False,  True]), tensor(0.7000))

    Args:
        keep: (N,) bool, which samples get a backward pass.
        price: 0-dim, in units of the score: the smallest kept score of a hard rate gate (the smallest kept |score| of
            one with a negative share), else the price used; None when a step keeps nothing, or where no score was
            computed at the margin: everything is kept, or the signs of the advantages decide.
        probability: (N,), with which each sample was kept; 0 or 1 when the gate is hard.
        weight: (N,), what a kept term is multiplied by: 1, unless a gate that samples corrects for it.
    """

    keep: Tensor
    price: Tensor | None
    probability: Tensor
    weight: Tensor


GATE = "a callable (score, cost) -> Decision, such as KondoGate(rate=0.03)"
"""What messages say that a gate is."""


class Final:
    """A gate that is held, not subclassed: what it says of itself would be untrue of another `__call__`."""

    def __init_subclass__(cls) -> None:
        if Final not in cls.__bases__:
            given = cls.__mro__[1].__name__
            raise TypeError(f"{cls.__name__} subclasses {given}; write a gate of your own that holds one instead.")


class Gate(Protocol):
    """Any callable of this shape is a gate. What more it may say of itself: `sparkjoy.gates`, the tour.

    >>> import torch, sparkjoy as sj
    >>> def above_mean(score, cost=None):
    ...     keep = score > score.mean()
    ...     return sj.Decision(keep, score.mean(), probability=keep.to(score.dtype), weight=torch.ones_like(score))
    >>> above_mean(torch.tensor([0.2, 1.5, -3.0])).keep
    tensor([ True,  True, False])
    """

    def __call__(self, score: Tensor, cost: Tensor | None = None) -> Decision:
        """Decide on N samples from their scores (N,) and, where known, what each costs (N,), in tokens."""
        ...


def rule_of(gate: Any) -> Rule | None:
    """The rule that a gate says it keeps rows by; None where it says none."""
    rule: Rule | None = getattr(gate, "rule", None)
    return rule


def weighs(gate: Any) -> bool:
    """Whether a gate says that its weights make up for what it skips, so that it decides on sizes."""
    return bool(getattr(gate, "weighted", None))


def state_of(gate: Any) -> dict[str, Any]:
    """What a resumed run needs to decide as an unbroken one would; {} for a gate without memory."""
    return gate.state_dict() if hasattr(gate, "state_dict") else {}


def load_state(gate: Any, state: dict[str, Any]) -> None:
    """Give a gate its saved state back; one without memory takes none."""
    if hasattr(gate, "load_state_dict"):
        gate.load_state_dict(state)
    else:
        states.check("a gate that remembers nothing", state)
