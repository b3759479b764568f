"""The gradients of whatever parameters some log-probs depend on: compared, and put back as they were."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


class Gradients:
    """The `.grad` of the leaves behind some log-probs: set aside, compared with a reference, put back in the end.

    >>> weight = torch.ones(4, requires_grad=True)
    >>> weight.grad = torch.full((4,), 7.0)
    >>> gradients = Gradients([])
    >>> gradients.find(weight * 3)
    >>> (weight * 3).sum().backward()
    >>> gradients.refer()
    6.0
    >>> gradients.clear()
    >>> (weight * 6).sum().backward()
    >>> gradients.compare()
    (1.0, 1.0)
    >>> gradients.restore()
    >>> weight.grad
    tensor([7., 7., 7., 7.])

    Args:
        parameters: leaves that no graph shows, such as those inside a reentrant checkpoint.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._before: dict[Tensor, Tensor | None] = {}
        self._reference: list[Tensor] = []
        for parameter in parameters:
            self._set_aside(parameter)

    @property
    def leaves(self) -> list[Tensor]:
        """All whose gradient is set aside."""
        return list(self._before)

    def find(self, log_probs: Tensor) -> None:
        """Set aside the gradients of leaves that are new in this graph, before anything is added to them.

        Raises:
            ValueError: a leaf runs a hook on its gradient, which might step an optimizer.
        """
        for leaf in leaves(log_probs):
            self._set_aside(leaf)

    def refer(self) -> float:
        """Make what has been added to the gradients the reference; returns its length."""
        self._reference = [_gradient(leaf).clone() for leaf in self._before]
        return math.hypot(*(float(reference.norm()) for reference in self._reference))

    def clear(self) -> None:
        """Zeros, in memory that is there before a step and after it."""
        for leaf in self._before:
            if leaf.grad is None or leaf.grad.layout != torch.strided:
                leaf.grad = torch.zeros_like(leaf)
            else:
                leaf.grad.detach_().zero_()

    def compare(self) -> tuple[float, float]:
        """‖g − ĝ‖/‖ĝ‖ and cosine of the gradient g to the reference ĝ; NaN where the reference is 0."""
        own = other = product = difference = 0.0
        for leaf, reference in zip(self._before, self._reference, strict=True):
            gradient = _gradient(leaf)
            own += float(gradient.norm()) ** 2
            other += float(reference.norm()) ** 2
            difference += float((gradient - reference).norm()) ** 2
            product += float((gradient * reference).sum())
        if other == 0:
            return math.nan, math.nan
        return math.sqrt(difference / other), product / math.sqrt(own * other) if own > 0 else 0.0

    def restore(self) -> None:
        """Put back what was set aside."""
        for leaf, gradient in self._before.items():
            leaf.grad = gradient

    def _set_aside(self, leaf: Tensor) -> None:
        if leaf in self._before:
            return
        if getattr(leaf, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"a parameter of shape {tuple(leaf.shape)} has a hook that runs on its gradient, such as one that "
                "steps an optimizer in the backward pass; remove it while measuring."
            )
        self._before[leaf] = leaf.grad
        leaf.grad = None


def leaves(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors whose `.grad` a backward pass from `tensor` adds to.

    >>> layer = torch.nn.Linear(2, 1)
    >>> sorted(leaf.dim() for leaf in leaves(layer(torch.ones(1, 2))))
    [1, 2]
    """
    if tensor.requires_grad and tensor.grad_fn is None:
        yield tensor
    seen: set[Any] = set()
    waiting: list[Any] = [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().endswith("AccumulateGrad"):
            yield node.variable
        waiting += [parent for parent, _ in node.next_functions]


def _gradient(leaf: Tensor) -> Tensor:
    if leaf.grad is None:
        return torch.zeros_like(leaf)
    gradient = leaf.grad.detach()
    return gradient if gradient.layout == torch.strided else gradient.to_dense()
