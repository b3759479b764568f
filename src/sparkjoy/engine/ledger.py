"""Counts what one call really did: rows and tokens forward and backward, FLOPs, seconds.

Forward rows are counted as they enter a log-prob function, backward rows by a hook on what it returned, when a gradient
arrives there. FLOPs are measured on the first pass over rows of a new shape, and taken from there after that (see
`sparkjoy.engine.flops`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from sparkjoy import checks
from sparkjoy.engine.counts import Counts
from sparkjoy.engine.flops import Direction, FlopCount, KnownFlops
from sparkjoy.engine.inputs import Inputs, check_log_probs
from sparkjoy.engine.screening import uncached

COUNTED = tuple(field.name for field in fields(Counts))


class Ledger:
    """The counts of one call.

    Args:
        known_flops: FLOPs measured in earlier calls, added to in this one; None: count none.
    """

    def __init__(self, known_flops: KnownFlops | None) -> None:
        self._counted = dict.fromkeys(COUNTED, 0)
        self._graph_flops = 0
        self.differentiated = False
        """Whether a backward pass has begun, and so may have added to `.grad`."""
        self.seconds = {"screen": 0.0, "gather": 0.0, "forward": 0.0, "backward": 0.0}
        self._known_flops = known_flops
        self._measures_graph = False
        self._lap_began = time.perf_counter()
        self._token_shape: torch.Size | None = None
        self._hook: RemovableHandle | None = None
        if known_flops is not None:
            known_flops.begin_call()

    @property
    def counts_flops(self) -> bool:
        """Whether FLOPs are counted."""
        return self._known_flops is not None

    @property
    def backward_over_forward(self) -> float | None:
        """r: FLOPs of the backward passes over those of the forward passes they went back through, if counted."""
        backward = self._counted["backward_flops"]
        return backward / self._graph_flops if self._graph_flops and backward else None

    def lap(self, phase: str) -> None:
        """Add the host seconds since the last lap, or since the call began, to `seconds[phase]`."""
        now = time.perf_counter()
        self.seconds[phase] += now - self._lap_began
        self._lap_began = now

    @property
    def counts(self) -> Counts:
        """What ran so far."""
        return Counts(**self.counted)

    @property
    def counted(self) -> dict[str, Any]:
        """The same by name: fields of a `Counts`."""
        return self._counted if self.counts_flops else {**self._counted, "forward_flops": None, "backward_flops": None}

    def screen(self, source: Callable[[Any], Tensor], part: Inputs, own: bool) -> Tensor:
        """Log-probs of `part`, to decide on; `own` says that the source is the log-prob function itself."""
        log_probs = self._forward("forward" if own else "screen", source, part)
        self._count("screened", part.total, part.tokens(log_probs))
        if own:
            self._count("forward", part.total, part.tokens(log_probs))
        return log_probs

    def forward(self, log_prob_fn: Callable[[Any], Tensor], part: Inputs) -> Tensor:
        """Log-probs of `part`, to differentiate; a hook counts its rows when their gradient arrives."""
        flops_before = self._counted["forward_flops"]
        self._measures_graph = self._known_flops is not None and self._known_flops.to_measure(part)
        log_probs = self._forward("forward", log_prob_fn, part, self._measures_graph)
        self._graph_flops += self._counted["forward_flops"] - flops_before
        tokens = part.tokens(log_probs)
        self._count("forward", part.total, tokens)
        if log_probs.requires_grad:
            self._hook = log_probs.register_hook(lambda gradient: self._count("backward", gradient.shape[0], tokens))
        return log_probs

    def backward(self, backward: Callable[[Tensor], Any], loss: Tensor, part: Inputs) -> None:
        """Run `backward(loss)`, whose graph ends at the log-probs of `part`."""
        loss.register_hook(self._begun)
        flops = self._measured("backward", part, lambda: backward(loss), self._measures_graph)[1]
        self._counted["backward_flops"] += flops
        if self._hook is not None:
            self._hook.remove()  # a log-prob function may return the same tensor again

    def _begun(self, gradient: Tensor) -> None:
        self.differentiated = True

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Around a pass that is nobody's work, but a question about a graph."""
        before = dict(self._counted)
        try:
            yield
        finally:
            self._counted = before

    def _count(self, direction: str, rows: int, tokens: int) -> None:
        self._counted[f"{direction}_rows"] += rows
        self._counted[f"{direction}_tokens"] += tokens

    def _forward(
        self, direction: Direction, source: Callable[[Any], Tensor], part: Inputs, measure: bool = False
    ) -> Tensor:
        try:
            log_probs, flops = self._measured(direction, part, lambda: uncached(source, part.batch), measure)
        except ValueError as error:
            if part.total == 1 and "more than 1 value per channel when training" in str(error):
                checks.add_sentence(
                    error,
                    "A function is called with one row too, which BatchNorm in training mode refuses: update its "
                    "statistics yourself, once a step on all rows, and call it in eval() (docs/how_a_step_runs.md).",
                )
            raise
        self._counted["forward_flops"] += flops
        whose = "the draft" if direction == "screen" else "the log-prob function"
        checked = check_log_probs(log_probs, part, whose)
        if self._token_shape is None:
            self._token_shape = checked.shape[1:]
        if part.mask is None and checked.shape[1:] != self._token_shape:
            raise ValueError(
                f"{whose} returned rows of {tuple(checked.shape[1:])} after rows of "
                f"{tuple(self._token_shape)} in the same call; pad all rows to the same length, and give a mask."
            )
        return checked

    def _measured(
        self, direction: Direction, part: Inputs, work: Callable[[], Any], measure: bool = False
    ) -> tuple[Any, int]:
        """What `work` returns, and its FLOPs: measured if asked to, or if nothing is known of such a pass."""
        if self._known_flops is None:
            return work(), 0
        known = None if measure else self._known_flops.of(direction, part)
        if known is not None:
            return work(), known
        with FlopCount() as count:
            result = work()
        self._known_flops.learn(direction, part, count.flops)
        return result, count.flops
