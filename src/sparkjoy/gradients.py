"""The gradients that backward passes add to `.grad`: found before they arrive, set aside, compared, put back.

One comparison of two gradients is noise. What tells whether a gate hurts is whether the dense gradient points the same
way from comparison to comparison, and whether the gated one points there too.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from threading import get_ident
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.weak import WeakIdKeyDictionary

from sparkjoy import states

ACCUMULATES = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]
WINDOW = 20
WIDTH = 4096
CHUNK = 1 << 20
CONSISTENT = 0.6
FOLLOWED = 0.1
Pairs = Iterable[tuple[Tensor, Tensor]]
Snapshot = WeakIdKeyDictionary
"""(n,) gradients by parameter."""


def leaves(graph: Tensor) -> list[Tensor]:
    """The tensors that a backward pass from `graph` adds a gradient to, as far as the graph shows them.

    >>> layer = torch.nn.Linear(2, 1)
    >>> sorted(leaf.dim() for leaf in leaves(layer(torch.ones(1, 2))))
    [1, 2]
    """
    return [node.variable for node in _nodes(graph) if isinstance(node, ACCUMULATES)]


def _nodes(graph: Tensor | GradientEdge) -> Iterator[Any]:
    if isinstance(graph, Tensor) and not graph.requires_grad:
        return
    nodes = [graph.node if isinstance(graph, GradientEdge) else get_gradient_edge(graph).node]
    met = set(nodes)
    while nodes:
        node = nodes.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in met:
                met.add(following)
                nodes.append(following)


class Leaves:
    """Calls `found` with every tensor that backward passes add a gradient to, before they do; while open, as a context.

    A node written in Python may run a backward pass of its own, over what it computes anew: a reentrant activation
    checkpoint does, and its parameters are in no graph before that. So such nodes say when they run, and while one
    does, the graphs of backward passes that begin in its thread are looked at too.
    """

    def __init__(self, found: Callable[[Tensor], None]) -> None:
        self._found = found
        self._running: Counter[int] = Counter()  # by thread: how many such nodes
        self._backward: Callable[..., None] | None = None  # torch's, while nested passes are looked at

    def look(self, graph: Tensor | GradientEdge) -> None:
        """Look at a graph that is to be differentiated."""
        for node in _nodes(graph):
            if isinstance(node, ACCUMULATES):
                self._found(node.variable)
            elif isinstance(node, BackwardCFunction):
                node.register_prehook(lambda *_: self._running.update([get_ident()]))
                node.register_hook(lambda *_: self._running.subtract([get_ident()]))
                if self._backward is None:
                    self._backward, torch.autograd.backward = torch.autograd.backward, self._nested

    def _nested(self, tensors: Any, *args: Any, **kwargs: Any) -> None:
        if self._running[get_ident()] > 0:
            for graph in (tensors,) if isinstance(tensors, Tensor | GradientEdge) else tensors:
                self.look(graph)
        assert self._backward is not None
        self._backward(tensors, *args, **kwargs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._running.clear()
        if self._backward is not None and torch.autograd.backward == self._nested:
            torch.autograd.backward = self._backward  # else it is a later one's, which passes through here


def refuse_hooks(leaf: Tensor, why: str) -> None:
    """Raise a ValueError where a parameter has a hook that runs as soon as its gradient has arrived.

    Of several backward passes such a hook would see each gradient in part, and one that steps would move the weights.
    """
    # The second is how torch.distributed.optim marks parameters whose optimizer it applies in the backward pass.
    if leaf._post_accumulate_grad_hooks or getattr(leaf, "_in_backward_optimizers", None):
        raise ValueError(
            f"a parameter of shape {tuple(leaf.shape)} has a hook that runs as soon as its gradient has arrived, such "
            f"as an optimizer's step, and {why}"
        )


class Gradients(Leaves):
    """The gradients of some parameters: what passes add to them, beside what others added.

    >>> weight = torch.ones(2, requires_grad=True)
    >>> weight.grad = torch.tensor([5.0, 5.0])
    >>> with Gradients("") as gradients:
    ...     log_prob_fn = gradients.watched(lambda rows: weight * rows)
    ...     log_prob_fn(torch.tensor([1.0, 0.0])).sum().backward()
    ...     gated = gradients.snapshot()
    ...     with gradients.apart():
    ...         log_prob_fn(torch.tensor([1.0, 1.0])).sum().backward()
    ...         sums(gradients.beside(gated)).tolist()
    [1.0, 2.0, 1.0, 1.0]
    >>> weight.grad
    tensor([6., 5.])

    Args:
        why: what is said of a parameter that runs a hook on its gradient, which would see several.
        parameters: known beforehand; others are found behind the log-probs of a `watched` function.
    """

    def __init__(self, why: str, parameters: Iterable[Tensor] = ()) -> None:
        super().__init__(self._find)
        self._why = why
        # Weak: an input embedding that is made to require a gradient is a leaf too, and gone with its graph.
        self._before = Snapshot()  # what was in .grad when it was found
        self._aside: Snapshot | None = None  # what was there before `apart`
        for parameter in parameters:
            self._find(parameter)

    @property
    def parameters(self) -> list[Tensor]:
        """All that were found and are still there."""
        return list(self._before)

    def watched(self, log_prob_fn: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
        """The function; parameters behind what it returns are found before anything is added to them."""

        def watched(rows: Any) -> Tensor:
            log_probs = log_prob_fn(rows)
            if isinstance(log_probs, Tensor):  # else the engine refuses it
                self.look(log_probs)
            return log_probs

        return watched

    @contextmanager
    def apart(self) -> Iterator[None]:
        """`.grad` begins at 0, and in the end it is what it was, to the bit."""
        self._aside = aside = Snapshot()
        try:
            for leaf in self.parameters:
                self._put_aside(leaf, aside)
            yield
        finally:
            self._aside = None
            for leaf, gradient in aside.items():
                if leaf.grad is None or gradient is None or gradient.layout != torch.strided:
                    leaf.grad = gradient
                else:
                    _local(leaf.grad).copy_(gradient)  # in place: whoever averages may hold on to it

    def clear(self) -> None:
        """Zeros, in memory that is there before a step and after it."""
        for leaf in self.parameters:
            if leaf.grad is None or leaf.grad.layout != torch.strided:
                leaf.grad = torch.zeros_like(leaf)
            else:
                _local(leaf.grad).zero_()

    def snapshot(self) -> Snapshot:
        """A copy of what has been added since, by parameter."""
        found = Snapshot()
        for leaf in self.parameters:
            if (gradient := self._added(leaf)) is not None:
                found[leaf] = gradient.clone()
        return found

    def beside(self, other: Snapshot) -> Iterator[tuple[Tensor, Tensor]]:
        """(n,) of each parameter the gradient in `other` and the one here."""
        for leaf in self.parameters:
            here, there = self._added(leaf), other.get(leaf)
            zeros = torch.zeros_like(_local(leaf)) if here is None or there is None else leaf
            yield _wide(zeros if there is None else there), _wide(zeros if here is None else here)

    def _find(self, leaf: Tensor) -> None:
        if leaf not in self._before and leaf.requires_grad:
            refuse_hooks(leaf, self._why)
            if self._aside is None:
                self._before[leaf] = _copy(leaf)
            else:
                self._put_aside(leaf, self._aside)

    def _put_aside(self, leaf: Tensor, aside: Snapshot) -> None:
        aside[leaf] = _copy(leaf)
        if leaf.grad is None or leaf.grad.layout != torch.strided:
            leaf.grad = None
        else:
            _local(leaf.grad).zero_()
        self._before[leaf] = None

    def _added(self, leaf: Tensor) -> Tensor | None:
        if leaf.grad is None:
            return None
        before = self._before[leaf]
        return _local(leaf.grad) if before is None else _wide(_local(leaf.grad)) - _wide(before)


def same_random_state(device: torch.device) -> AbstractContextManager[None]:
    """Inside, draws are of torch's generators; afterwards these are as they were, and what was drawn comes again."""
    devices, kind = ([], "cuda") if device.type == "cpu" else ([device], device.type)
    return torch.random.fork_rng(devices, device_type=kind)


def _local(tensor: Tensor) -> Tensor:
    """The tensor, or this process's part of it, to be read and written in place."""
    tensors = sys.modules.get("torch.distributed.tensor")  # who has a DTensor has imported it, so we need not
    local: Tensor = tensor.to_local() if tensors is not None and isinstance(tensor, tensors.DTensor) else tensor
    return local.detach()


def _copy(leaf: Tensor) -> Tensor | None:
    return None if leaf.grad is None else _local(leaf.grad).clone()


def _wide(gradient: Tensor) -> Tensor:
    """(n,) real numbers, at least in float32: two for each complex one."""
    dense = gradient if gradient.layout == torch.strided else gradient.to_dense()
    flat = (torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense).flatten()
    return flat.to(torch.promote_types(flat.dtype, torch.float32))


def sums(pairs: Pairs) -> Tensor:
    """(4,) ‖g‖², ‖d‖², g · d and ‖g − d‖² of gradients g and d, in double precision, on the CPU."""
    total = torch.zeros(4, dtype=torch.float64, device="cpu")
    for g, d in pairs:
        parts = (g * g, d * d, g * d, (g - d).square())
        total += torch.stack([part.sum(dtype=torch.float64) for part in parts]).cpu()
    return total


def sketches(pairs: Pairs, salt: int = 0) -> Tensor:
    """(2, WIDTH) g and d with their coordinates added up at random places under random signs, on the CPU.

    Inner products of sketches are those of what was sketched, to about 1/√WIDTH of the lengths; sketches of parts,
    each under a salt of its own, add up to that of the whole.
    """
    both = torch.zeros(2, WIDTH, dtype=torch.float64, device="cpu")
    for number, pair in enumerate(pairs):
        generator = torch.Generator(pair[0].device).manual_seed((salt << 32) + number)
        for chunk in torch.stack(pair).split(CHUNK, dim=1):
            places = torch.randint(2 * WIDTH, chunk.shape[1:], generator=generator, device=chunk.device)
            signed = torch.where(places < WIDTH, chunk, -chunk)
            both += chunk.new_zeros(2, WIDTH).index_add_(1, places % WIDTH, signed).double().cpu()
    return both


def figures(sums: Tensor) -> tuple[float | None, float | None, float | None]:
    """Cosine of g and d, ‖g − d‖ / ‖d‖ and ‖g‖ / ‖d‖; None where d is 0 or one is not finite, a cosine also of g = 0.

    >>> figures(torch.tensor([4.0, 1.0, 2.0, 1.0]))
    (1.0, 1.0, 2.0)
    """
    gated, dense, product, error = sums.tolist()
    if not (math.isfinite(gated + dense) and dense > 0):
        return None, None, None
    cosine = product / math.sqrt(gated) / math.sqrt(dense) if gated > 0 else None
    return cosine, math.sqrt(error / dense), math.sqrt(gated / dense)


@dataclass(frozen=True)
class Comparison:
    """The gated gradient g of one step beside the dense one d: of the same rows, with all weights 1.

    Args:
        cosine: of g and d; None where one is 0 or not finite.
        relative_error: ‖g − d‖ / ‖d‖; None where d is 0 or not finite. Where rows do not agree, its square is near
            `report.noise` on average.
        norm_ratio: ‖g‖ / ‖d‖, likewise.
        forward_rows: rows that ran for the comparison alone, on this process; `report.forward_rows` has none of them.
        backward_rows: likewise.
        seconds: host seconds of the comparison.
    """

    cosine: float | None
    relative_error: float | None
    norm_ratio: float | None
    forward_rows: int
    backward_rows: int
    seconds: float


class Comparisons:
    """When to compare, and what the last comparisons say together.

    Args:
        every: steps from one comparison to the next.
        instead: what the warning advises to set, as the user writes it.
    """

    def __init__(self, every: int, instead: str = "UnbiasedGate(noise=0.3)") -> None:
        self.every = every
        self._instead = instead
        self._steps = 0
        self._seen = 0
        self._window = torch.zeros(2, WINDOW, WIDTH, device="cpu")
        self._warned = False

    def due(self) -> bool:
        """Count a step; whether it is to be compared."""
        self._steps += 1
        return self._steps % self.every == 0

    def compared(
        self, sums: Tensor, sketches: Tensor, forward_rows: int, backward_rows: int, seconds: float
    ) -> Comparison:
        """One comparison, from the sums and sketches of all parameters; warns, once, if the gate surely hurts."""
        cosine, error, ratio = figures(sums)
        if error is not None:
            self._window[:, self._seen % WINDOW] = sketches
            self._seen += 1
        if self._seen >= WINDOW and not self._warned:
            self._warn(*self._window.double())
        return Comparison(cosine, error, ratio, forward_rows, backward_rows, seconds)

    def _warn(self, gated: Tensor, dense: Tensor) -> None:
        """By mean inner products of different steps (WINDOW, WIDTH), whose noise is independent, over mean squares."""

        def of_different(products: Tensor) -> float:
            return float(products.sum() - products.diagonal().sum()) / (WINDOW * (WINDOW - 1))

        own, other = float(dense.square().sum()) / WINDOW, float(gated.square().sum()) / WINDOW
        consistency = of_different(dense @ dense.T) / own
        agreement = of_different(gated @ dense.T) / math.sqrt(own * other) if other > 0 else 0.0
        if consistency >= CONSISTENT and agreement < FOLLOWED * consistency:
            self._warned = True
            warnings.warn(
                f"the gated gradient does not follow the dense gradient: in the last {WINDOW} comparisons "
                f"two dense ones had a mean cosine of {consistency:.2f}, a gated and a dense one of {agreement:.2f}. "
                "Unless the reward rises, "
                f"set {self._instead}, whose mean gradient is the dense one, or a higher rate.",
                stacklevel=6,
            )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to compare as an unbroken one would."""
        return {"steps": self._steps, "seen": self._seen, "window": self._window.clone(), "warned": self._warned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        shape = self._window.shape
        states.check(
            "Comparisons",
            state,
            steps=states.is_count,
            seen=states.is_count,
            window=lambda value: isinstance(value, Tensor) and value.shape == shape,
            warned=lambda value: isinstance(value, bool),
        )
        self._steps, self._seen, self._warned = state["steps"], state["seen"], state["warned"]
        self._window = state["window"].clone()
