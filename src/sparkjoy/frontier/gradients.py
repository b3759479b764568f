"""The gradients of whatever parameters some log-probs depend on: compared, and put back as they were."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from sparkjoy import checks


class Gradients:
    """The `.grad` of the parameters behind some log-probs: set aside, compared with a reference, put back in the end.

    >>> weight = torch.ones(4, requires_grad=True)
    >>> weight.grad = torch.full((4,), 7.0)
    >>> gradients = Gradients(None)
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
        parameters: all that require a gradient; None: they are found.

    Raises:
        ValueError: none of them requires a gradient, or one runs a hook on it, which might step an optimizer.
    """

    def __init__(self, parameters: Iterable[Tensor] | None) -> None:
        # Weak: what log-probs make on the way and nobody holds when they are gone is no parameter.
        self._before: dict[int, tuple[weakref.ref[Tensor], Tensor | None]] = {}
        self._reference: list[Tensor] = []
        self._parameters: list[Tensor] | None = None
        if parameters is None:
            return
        parameters = [parameters] if isinstance(parameters, Tensor) else parameters
        given = list(
            checks.instance("parameters", parameters, Iterable, "tensors, such as model.parameters(), or None")
        )
        for index, parameter in enumerate(given):
            checks.tensor(f"parameters[{index}]", parameter)
        self._parameters = [parameter for parameter in given if parameter.requires_grad]
        if not self._parameters:
            raise ValueError("parameters has none that requires a gradient; leave it out for them to be found.")
        for parameter in self._parameters:
            _refuse_hooks(parameter)
        for parameter in self._parameters:
            self._set_aside(parameter)

    @property
    def parameters(self) -> list[Tensor]:
        """All that were found and are still there, or those given."""
        if self._parameters is not None:
            return self._parameters
        return [leaf for reference, _ in self._before.values() if (leaf := reference()) is not None]

    def find(self, log_probs: Tensor) -> None:
        """Set aside the gradients of parameters that are new in this graph, before anything is added to them.

        Raises:
            ValueError: one runs a hook on its gradient.
        """
        if self._parameters is None:
            for leaf in leaves(log_probs):
                self._set_aside(leaf)

    def refer(self) -> float:
        """Make what has been added to the gradients the reference; returns its length. No more are found from now."""
        self._parameters = self.parameters
        self._reference = [_gradient(parameter).clone() for parameter in self._parameters]
        return math.hypot(*(float(reference.norm()) for reference in self._reference))

    def clear(self) -> None:
        """Zeros, in memory that is there before a step and after it."""
        for parameter in self.parameters:
            if parameter.grad is None or parameter.grad.layout != torch.strided:
                parameter.grad = torch.zeros_like(parameter)
            else:
                parameter.grad.detach_().zero_()

    def compare(self) -> tuple[float, float]:
        """‖g − ĝ‖/‖ĝ‖ and the cosine of the gradient g to the reference ĝ, which is not 0; of g = 0 the cosine is 0."""
        own = other = product = difference = 0.0
        for parameter, reference in zip(self.parameters, self._reference, strict=True):
            gradient = _gradient(parameter)
            own += float(gradient.norm()) ** 2
            other += float(reference.norm()) ** 2
            difference += float((gradient - reference).norm()) ** 2
            product += float((gradient * reference).sum())
        return math.sqrt(difference / other), product / math.sqrt(own * other) if own > 0 else 0.0

    def restore(self) -> None:
        """Put back what was set aside."""
        for reference, gradient in self._before.values():
            leaf = reference()
            if leaf is not None:
                leaf.grad = gradient

    def _set_aside(self, leaf: Tensor) -> None:
        known = self._before.get(id(leaf))
        if known is None or known[0]() is not leaf:
            _refuse_hooks(leaf)
            self._before[id(leaf)] = (weakref.ref(leaf), leaf.grad)
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


def _refuse_hooks(parameter: Tensor) -> None:
    if getattr(parameter, "_post_accumulate_grad_hooks", None):
        raise ValueError(
            f"a parameter of shape {tuple(parameter.shape)} has a hook that runs on its gradient, such as one that "
            "steps an optimizer in the backward pass; remove it while measuring."
        )


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        return torch.zeros_like(parameter)
    gradient = parameter.grad.detach()
    return gradient if gradient.layout == torch.strided else gradient.to_dense()
