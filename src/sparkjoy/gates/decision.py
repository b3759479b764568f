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
            one with a negative share), else the price used; None when nothing is kept, or where no score was computed
            at the margin: everything is kept, or the signs of the advantages decide.
        probability: (N,), with which each sample was kept; 0 or 1 when the gate is hard.
        weight: (N,), what a kept term is multiplied by: 1, unless a gate that samples corrects for it.
    """

    keep: Tensor
    price: Tensor | None
    probability: Tensor
    weight: Tensor


GATE = "a callable (score, cost) -> Decision, such as KondoGate(rate=0.03)"
"""What messages say that a gate is."""


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


def rule_of(gate: Gate | None) -> Rule | None:
    """The `rule` that a gate states: what signs may decide for it; None where it states none.

    >>> from sparkjoy import KondoGate, SoftGate
    >>> rule_of(KondoGate(rate=0.03)), rule_of(SoftGate(temperature=1.0, price=0.0))
    (Rule(rate=0.03, floor=None, negative_share=0.0), None)
    """
    rule: Rule | None = _said(gate, "rule")
    return rule


def weighted(gate: Gate | None) -> bool | None:
    """Whether what a gate keeps is weighted, so that the expected gradient stays the dense one; None: it does not say.

    >>> from sparkjoy import KondoGate, UnbiasedGate
    >>> weighted(KondoGate(rate=0.03)), weighted(UnbiasedGate(noise=0.3)), weighted(lambda score, cost=None: ...)
    (False, True, None)
    """
    says: bool | None = _said(gate, "weighted")
    return says


def state_of(gate: Any) -> dict[str, Any]:
    """What a resumed run needs to decide as an unbroken one would; {} for a gate without memory."""
    return gate.state_dict() if hasattr(gate, "state_dict") else {}


def load_state(gate: Any, state: dict[str, Any]) -> None:
    """Give a gate its saved state back; one without memory takes none."""
    if hasattr(gate, "load_state_dict"):
        gate.load_state_dict(state)
    else:
        states.check("a gate that remembers nothing", state)


def _said(gate: Any, name: str) -> Any:
    """What `gate` says of itself; None where a subclass decides anew and does not say it again."""
    for cls in type(gate).__mro__:
        if name in vars(cls) or name in getattr(gate, "__dict__", {}):
            return getattr(gate, name)
        if "__call__" in vars(cls):
            return None
    return None
