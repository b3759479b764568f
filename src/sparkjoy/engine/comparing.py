"""How near the gated gradient comes to the dense one, which is computed too, of the same rows, now and then a step.

One comparison is noise. What tells is whether the dense gradient says the same from comparison to comparison, and
whether the gated one says it too.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparkjoy import states
from sparkjoy.engine.hooks import leaves

WINDOW = 20
CONSISTENT = 0.6
FOLLOWED = 0.1
WIDTH = 4096
CHUNK = 1 << 20
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Comparison:
    """The gated gradient g of one step beside the dense one d: of the same rows, with all weights 1.

    Args:
        cosine: of g and d; None where one is 0 or not finite.
        relative_error: ‖g − d‖ / ‖d‖; None where d is 0 or not finite. Where rows do not agree, its square is near
            `report.noise` on average.
        norm_ratio: ‖g‖ / ‖d‖, likewise.
        consistency: of d over the last 20 comparisons: the mean inner product of two different ones over the mean
            squared length. 1: all the same; about 0: nothing but noise. None before there are 20.
        agreement: of g with d likewise, never of the same step: 0: nothing of what d says is in g.
        forward_rows: rows that ran for the comparison alone, on this process; `report.forward_rows` has none of them.
        backward_rows: likewise.
        seconds: host seconds of the comparison.
    """

    cosine: float | None
    relative_error: float | None
    norm_ratio: float | None
    consistency: float | None
    agreement: float | None
    forward_rows: int
    backward_rows: int
    seconds: float


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
    def dense(self, device: torch.device = CPU) -> Iterator[None]:
        """Around the dense passes on a device: `.grad` begins at 0, and in the end it is what it was, to the bit.

        So is torch's random state, of the CPU and of the device.
        """
        self._after = {}
        for leaf, _ in self._known.values():
            self._put_aside(leaf)
        devices, kind = ([], "cuda") if device.type == "cpu" else ([device], device.type)
        try:
            with torch.random.fork_rng(devices, device_type=kind):
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
        self._window = torch.zeros(2, WINDOW, WIDTH)
        self._warned = False

    def due(self) -> bool:
        """Count a step; whether it is to be compared."""
        self._steps += 1
        return self._steps % self.every == 0

    def compared(
        self, sums: Tensor, sketches: Tensor, forward_rows: int, backward_rows: int, seconds: float
    ) -> Comparison:
        """One comparison, from `Beside`'s sums and sketches of all parameters; warns, once, if the gate surely hurts.

        >>> comparisons = Comparisons(every=1)
        >>> sketches = torch.zeros(2, WIDTH)
        >>> found = comparisons.compared(torch.tensor([4.0, 1.0, 2.0, 1.0]), sketches, 8, 8, 0.1)
        >>> found.cosine, found.relative_error, found.norm_ratio, found.consistency
        (1.0, 1.0, 2.0, None)
        """
        gated, dense, product, error = sums.tolist()
        cosine = relative = ratio = None
        if math.isfinite(gated + dense) and dense > 0:
            relative, ratio = math.sqrt(error / dense), math.sqrt(gated / dense)
            cosine = product / math.sqrt(gated * dense) if gated > 0 else None
            self._window[:, self._seen % WINDOW] = sketches
            self._seen += 1
        consistency, agreement = (None, None) if self._seen < WINDOW else _together(*self._window.double())
        if consistency is not None and agreement is not None and not self._warned:
            self._warned = consistency >= CONSISTENT and agreement < FOLLOWED * consistency
            if self._warned:
                warnings.warn(
                    f"the gated gradient does not follow the dense gradient: in the last {WINDOW} comparisons the "
                    f"dense one pointed much the same way (consistency {consistency:.2f}) and the gated one did not "
                    f"(agreement {agreement:.2f}). Unless the reward rises, set {self._instead}, whose mean gradient "
                    "is the dense one, or a higher rate.",
                    stacklevel=4,
                )
        return Comparison(cosine, relative, ratio, consistency, agreement, forward_rows, backward_rows, seconds)

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


def _together(gated: Tensor, dense: Tensor) -> tuple[float, float]:
    """Consistency and agreement of (WINDOW, WIDTH): inner products of different steps, whose noise is independent."""

    def of_different(products: Tensor) -> float:
        return float(products.sum() - products.diagonal().sum()) / (WINDOW * (WINDOW - 1))

    own, other = float(dense.square().sum()) / WINDOW, float(gated.square().sum()) / WINDOW
    agreement = of_different(gated @ dense.T) / math.sqrt(own * other) if other > 0 else 0.0
    return of_different(dense @ dense.T) / own, agreement


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
