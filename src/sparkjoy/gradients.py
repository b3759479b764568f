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
"""Comparisons that a warning is about."""
WIDTH = 4096
"""Numbers in a sketch."""
CHUNK = 1 << 20
"""Numbers sketched at a time, to bound the memory that takes."""
CONSISTENT, FOLLOWED = 0.6, 0.1
"""A warning needs dense gradients with at least this mean cosine, and a gated one with less than this part of it."""
Pairs = Iterable[tuple[Tensor, Tensor]]
"""Two gradients, parameter by parameter: (n,) of each."""
Snapshot = WeakIdKeyDictionary
"""Gradients by parameter, None for a parameter without one.

Weak: an input embedding that is made to require a gradient is a leaf too, and gone with its graph.
"""


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
    """What backward passes add to the gradients of some parameters, apart from what `.grad` already had.

    >>> weight = torch.ones(2, requires_grad=True)
    >>> weight.grad = torch.tensor([5.0, 5.0])
    >>> with Gradients("") as gradients:
    ...     log_prob_fn = gradients.watched(lambda rows: weight * rows)
    ...     log_prob_fn(torch.tensor([1.0, 0.0])).sum().backward()
    ...     gated = gradients.snapshot()
    ...     with gradients.set_aside():
    ...         log_prob_fn(torch.tensor([1.0, 1.0])).sum().backward()
    ...         inner_products(gradients.pairs_with(gated)).tolist()
    [1.0, 2.0, 1.0, 1.0]
    >>> weight.grad
    tensor([6., 5.])

    Args:
        why: what a refusal says of a parameter with a hook on its gradient, which would run several times.
        parameters: known beforehand; others are found behind the log-probs of a `watched` function.
    """

    def __init__(self, why: str, parameters: Iterable[Tensor] = ()) -> None:
        super().__init__(self._find)
        self._why = why
        self._before = Snapshot()  # what .grad was when the parameter was found, or when it was set aside
        self._is_aside = False
        for parameter in parameters:
            self._find(parameter)

    @property
    def parameters(self) -> list[Tensor]:
        """All that were found and still exist."""
        return list(self._before)

    def watched(self, log_prob_fn: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
        """The function; parameters behind what it returns are found before anything is added to their gradients."""

        def watched(rows: Any) -> Tensor:
            log_probs = log_prob_fn(rows)
            if isinstance(log_probs, Tensor):  # else the engine refuses it
                self.look(log_probs)
            return log_probs

        return watched

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Start with `.grad` at 0; at the end restore what it was, to the bit."""
        before = Snapshot()
        for leaf in self.parameters:
            before[leaf] = _copy(leaf.grad)
        self._before, self._is_aside = before, True
        try:
            self.clear()
            yield
        finally:
            self._is_aside = False
            for leaf, gradient in self._before.items():
                if leaf.grad is None or gradient is None or gradient.layout != torch.strided:
                    leaf.grad = gradient
                else:
                    _local(leaf.grad).copy_(gradient)  # in place: whoever averages may hold on to it

    def clear(self) -> None:
        """Set gradients to 0, in the memory that they have."""
        for leaf in self.parameters:
            _clear(leaf)

    def snapshot(self) -> Snapshot:
        """A copy of what has been added so far."""
        found = Snapshot()
        for leaf in self.parameters:
            found[leaf] = _copy(self._added(leaf))
        return found

    def pairs_with(self, other: Snapshot) -> Iterator[tuple[Tensor, Tensor]]:
        """For each parameter the gradient in `other` and what has been added here."""
        for leaf in self.parameters:
            yield _numbers(other.get(leaf), leaf), _numbers(self._added(leaf), leaf)

    def _find(self, leaf: Tensor) -> None:
        if leaf not in self._before and leaf.requires_grad:
            refuse_hooks(leaf, self._why)
            self._before[leaf] = _copy(leaf.grad)
            if self._is_aside:
                _clear(leaf)

    def _added(self, leaf: Tensor) -> Tensor | None:
        before = None if self._is_aside else self._before[leaf]
        if leaf.grad is None or before is None:
            return leaf.grad
        return _numbers(leaf.grad, leaf) - _numbers(before, leaf)


def _local(tensor: Tensor) -> Tensor:
    """The tensor, or this process's part of it, to be read and written in place."""
    tensors = sys.modules.get("torch.distributed.tensor")  # who has a DTensor has imported it, so we need not
    local: Tensor = tensor.to_local() if tensors is not None and isinstance(tensor, tensors.DTensor) else tensor
    return local.detach()


def _copy(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else _local(gradient).clone()


def _clear(leaf: Tensor) -> None:
    if leaf.grad is None or leaf.grad.layout != torch.strided:
        leaf.grad = None
    else:
        _local(leaf.grad).zero_()


def _numbers(gradient: Tensor | None, leaf: Tensor) -> Tensor:
    """(n,) real numbers, at least in float32: two for each complex one; zeros where the leaf has no gradient."""
    dense = torch.zeros_like(_local(leaf)) if gradient is None else _local(gradient).to_dense()
    flat = (torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense).flatten()
    return flat.to(torch.promote_types(flat.dtype, torch.float32))


def same_random_state(device: torch.device) -> AbstractContextManager[None]:
    """Inside, draws are of torch's generators; afterwards these are as they were, and what was drawn comes again."""
    devices, kind = ([], "cuda") if device.type == "cpu" else ([device], device.type)
    return torch.random.fork_rng(devices, device_type=kind)


def inner_products(pairs: Pairs) -> Tensor:
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


def figures(products: Tensor) -> tuple[float | None, float | None, float | None]:
    """Cosine of g and d, ‖g − d‖ / ‖d‖ and ‖g‖ / ‖d‖, from their `inner_products`.

    All are None where d is 0 or one is not finite; the cosine also where g is 0.

    >>> figures(torch.tensor([4.0, 1.0, 2.0, 1.0]))
    (1.0, 1.0, 2.0)
    """
    gated, dense, product, error = products.tolist()
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
        self._steps, self._seen, self._warned = 0, 0, False
        self._window = torch.zeros(2, WINDOW, WIDTH, device="cpu")  # of the last sketches: gated, dense

    def due(self) -> bool:
        """Count a step; whether it is to be compared."""
        self._steps += 1
        return self._steps % self.every == 0

    def compared(
        self, products: Tensor, sketches: Tensor, forward_rows: int, backward_rows: int, seconds: float
    ) -> Comparison:
        """One comparison, from inner products and sketches of all parameters; warns, once, if the gate surely hurts."""
        cosine, error, ratio = figures(products)
        if error is not None:
            self._window[:, self._seen % WINDOW] = sketches
            self._seen += 1
        if self._seen >= WINDOW and not self._warned:
            self._warn_if_it_hurts(*self._window.double())
        return Comparison(cosine, error, ratio, forward_rows, backward_rows, seconds)

    def _warn_if_it_hurts(self, gated: Tensor, dense: Tensor) -> None:
        """By mean inner products of sketches (WINDOW, WIDTH) of different steps, whose noise is independent."""
        different = ~torch.eye(WINDOW, dtype=torch.bool, device="cpu")
        of_dense, of_gated = dense.square().sum() / WINDOW, gated.square().sum() / WINDOW
        consistency = float((dense @ dense.T)[different].mean() / of_dense)
        agreement = float((gated @ dense.T)[different].mean() / (of_dense * of_gated).sqrt()) if of_gated > 0 else 0.0
        if consistency >= CONSISTENT and agreement < FOLLOWED * consistency:
            self._warned = True
            warnings.warn(
                f"the gated gradient does not follow the dense gradient: in the last {WINDOW} comparisons two dense "
                f"ones had a mean cosine of {consistency:.2f}, a gated and a dense one of {agreement:.2f}. Unless the "
                f"reward rises, set {self._instead}, whose mean gradient is the dense one, or a higher rate.",
                stacklevel=6,
            )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to compare as an unbroken one would."""
        return {"steps": self._steps, "seen": self._seen, "window": self._window.clone(), "warned": self._warned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        states.check(
            "Comparisons",
            state,
            steps=states.is_count,
            seen=states.is_count,
            window=lambda value: isinstance(value, Tensor) and value.shape == (2, WINDOW, WIDTH),
            warned=lambda value: isinstance(value, bool),
        )
        self._steps, self._seen, self._warned = state["steps"], state["seen"], state["warned"]
        self._window = state["window"].clone()
