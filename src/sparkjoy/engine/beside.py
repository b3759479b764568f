"""The gradients of one step: the one that was made, and beside it the dense one, of all rows at weight 1."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sparkjoy.engine.hooks import leaves

WIDTH = 4096
CHUNK = 1 << 20


class Beside:
    """The gradients of one step: what was there before it, what it added, and the dense gradient beside it.

    >>> weight = torch.ones(2, requires_grad=True)
    >>> weight.grad = torch.tensor([5.0, 5.0])
    >>> beside = Beside(None)
    >>> log_prob_fn = beside.watched(lambda rows: weight * rows)
    >>> log_prob_fn(torch.tensor([1.0, 0.0])).sum().backward()
    >>> with beside.dense():
    ...     log_prob_fn(torch.tensor([1.0, 1.0])).sum().backward()
    >>> beside.sums().tolist(), weight.grad
    ([1.0, 2.0, 1.0, 1.0], tensor([6., 5.]))

    Args:
        parameters: whose gradients; None: those behind the log-probs, as they are found.

    Raises:
        ValueError: one runs a hook on its gradient, which would see two.
    """

    def __init__(self, parameters: list[Tensor] | None) -> None:
        self._finds = parameters is None
        self._known: dict[int, tuple[Tensor, Tensor | None]] = {}  # and what was in .grad before
        self._after: dict[int, Tensor | None] | None = None  # what the step has left there, while the dense passes run
        self._put: dict[int, Tensor | None] = {}
        self._dense: dict[int, Tensor | None] = {}
        for parameter in parameters or []:
            self._find(parameter)

    def watched(self, log_prob_fn: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
        """The function, and the parameters behind what it returns are found before anything is added to them."""

        def watched(rows: Any) -> Tensor:
            log_probs = log_prob_fn(rows)
            if self._finds and isinstance(log_probs, Tensor) and log_probs.requires_grad:
                for leaf in (log_probs,) if log_probs.grad_fn is None else leaves(log_probs):
                    self._find(leaf)
            return log_probs

        return watched

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Around the dense passes: `.grad` begins at 0, and in the end it is what it was, to the bit."""
        self._after = {}
        for leaf, _ in self._known.values():
            self._put_aside(leaf)
        try:
            yield
        finally:
            for key, after in self._after.items():
                leaf = self._known[key][0]
                self._dense[key] = _copy(leaf)
                if after is None or after.layout != torch.strided:
                    leaf.grad = after
                else:
                    _local(leaf).copy_(after)  # in place: whoever averages may hold on to it
            self._put, self._after = self._after, None

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(n,) of each parameter the gated and the dense gradient, at least in float32."""
        for key, (_, before) in self._known.items():
            after, dense = self._put[key], self._dense[key]
            if after is not None and dense is not None:
                gated = _wide(after)
                yield gated if before is None else gated - _wide(before), _wide(dense)
            elif dense is not None:
                yield torch.zeros_like(_wide(dense)), _wide(dense)

    def sums(self) -> Tensor:
        """(4,) ‖g‖², ‖d‖², g · d and ‖g − d‖², in double precision; of this process's part of the parameters."""
        total = torch.zeros(4, dtype=torch.float64)
        for gated, dense in self.pairs():
            parts = (gated * gated, dense * dense, gated * dense, (gated - dense).square())
            total += torch.stack([part.sum(dtype=torch.float64) for part in parts]).cpu()
        return total

    def sketches(self, salt: int) -> Tensor:
        """(2, WIDTH) g and d with their coordinates added up at random places under random signs.

        Inner products of sketches are those of what was sketched, to about 1/√WIDTH of the lengths; sketches of parts
        add up to that of the whole.
        """
        both = torch.zeros(2, WIDTH, dtype=torch.float64)
        for number, pair in enumerate(self.pairs()):
            generator = torch.Generator(pair[0].device).manual_seed((salt << 32) + number)
            for chunk in torch.stack(pair).split(CHUNK, dim=1):
                places = torch.randint(2 * WIDTH, chunk.shape[1:], generator=generator, device=chunk.device)
                signed = torch.where(places < WIDTH, chunk, -chunk)
                both += chunk.new_zeros(2, WIDTH).index_add_(1, places % WIDTH, signed).double().cpu()
        return both

    def _find(self, leaf: Tensor) -> None:
        if id(leaf) in self._known or not leaf.requires_grad:
            return
        if leaf._post_accumulate_grad_hooks or getattr(leaf, "_in_backward_optimizers", None):
            raise ValueError(
                f"compare_every: a parameter of shape {tuple(leaf.shape)} has a hook that runs as soon as its gradient "
                "has arrived, such as an optimizer's step, and the dense gradient would arrive too; leave out "
                "compare_every, or step after the call instead of in a hook."
            )
        self._known[id(leaf)] = (leaf, _copy(leaf))
        if self._after is not None:
            self._put_aside(leaf)

    def _put_aside(self, leaf: Tensor) -> None:
        assert self._after is not None
        self._after[id(leaf)] = _copy(leaf)
        if leaf.grad is None or leaf.grad.layout != torch.strided:
            leaf.grad = None
        else:
            _local(leaf).zero_()


def _local(leaf: Tensor) -> Tensor:
    """The strided `.grad`, or this process's part of it, to be read and written in place."""
    gradient: Any = leaf.grad
    gradient = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    found: Tensor = gradient.detach()
    return found


def _copy(leaf: Tensor) -> Tensor | None:
    return None if leaf.grad is None else _local(leaf).clone()


def _wide(gradient: Tensor) -> Tensor:
    flat = (gradient if gradient.layout == torch.strided else gradient.to_dense()).flatten()
    return flat.to(torch.promote_types(flat.dtype, torch.float32))
