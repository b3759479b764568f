"""What one call really did: rows and tokens forward and backward, seconds.

Forward rows are counted as they enter a log-prob function, backward rows by a hook on what it returned, when a gradient
arrives there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from sparkjoy import checks
from sparkjoy.step.inputs import Inputs, LogProbFunction, check_log_probs

Plan = Literal["known", "signs", "draft", "screen", "dense"]
"""How a gate came to know what it decides on.

"known": the log-probs are given. "signs": the advantages' signs decide. "draft": a draft decides, or proposes what the
policy then decides about. "screen": a forward pass without a graph decides, survivors are recomputed. "dense": one
differentiable pass over all that may be kept, skipped rows at weight zero.
"""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Rows and tokens of some passes, counted from what ran.

    >>> ran = Counts(forward_rows=3) + Counts(forward_rows=2, backward_rows=2)
    >>> ran.forward_rows, ran.backward_rows
    (5, 2)

    Args:
        screened_rows: rows whose log-probs were computed to decide, without a graph, drafted ones too.
        forward_rows: rows that went through `log_prob_fn`, screened ones included.
        backward_rows: rows whose gradient arrived at what `log_prob_fn` returned.
        screened_tokens: as the rows, in tokens that the mask counts; equal to the rows for (B,) log-probs.
        forward_tokens: likewise.
        backward_tokens: likewise.
    """

    screened_rows: int = 0
    forward_rows: int = 0
    backward_rows: int = 0
    screened_tokens: int = 0
    forward_tokens: int = 0
    backward_tokens: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{name: getattr(self, name) + getattr(other, name) for name in COUNTED})


COUNTED = tuple(field.name for field in fields(Counts))


class Counting:
    """What a call has done so far."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(COUNTED, 0)
        self.differentiated = False
        """Whether a backward pass has begun, and so may have added to `.grad`."""
        self.seconds = {"screen": 0.0, "gather": 0.0, "forward": 0.0, "backward": 0.0}
        self.plan: Plan = "dense"
        self.reason = "Every row is kept."
        self.proposed: int | None = None
        """Rows that a draft let through to the gate."""
        self._lap_began = time.perf_counter()
        self._token_shape: torch.Size | None = None

    def lap(self, phase: str) -> None:
        """Add the host seconds since the last lap, or since the call began, to `seconds[phase]`."""
        now = time.perf_counter()
        self.seconds[phase] += now - self._lap_began
        self._lap_began = now

    def screen(self, source: LogProbFunction, part: Inputs, own: bool) -> Tensor:
        """Log-probs of `part`, to decide on; `own` says that the source is the log-prob function itself."""
        log_probs = self._called(source, part, "the log-prob function" if own else "the draft")
        tokens = part.tokens(log_probs)
        self._count("screened", part.total, tokens)
        if own:
            self._count("forward", part.total, tokens)
        return log_probs

    def forward(self, log_prob_fn: LogProbFunction, part: Inputs) -> Tensor:
        """Log-probs of `part`, to differentiate; a hook counts its rows when their gradient arrives."""
        log_probs = self._called(log_prob_fn, part, "the log-prob function")
        tokens = part.tokens(log_probs)
        self._count("forward", part.total, tokens)
        if log_probs.requires_grad:
            self._hook = log_probs.register_hook(partial(self._arrived, tokens))
        return log_probs

    def backward(self, backward: Callable[[Tensor], Any], loss: Tensor) -> None:
        """Run `backward(loss)`, of the log-probs that `forward` gave last."""
        loss.register_hook(self._begun)
        backward(loss)
        self._hook.remove()  # a log-prob function may return the same tensor again

    def _begun(self, gradient: Tensor) -> None:
        self.differentiated = True

    def _arrived(self, tokens: int, gradient: Tensor) -> None:
        self._count("backward", gradient.shape[0], tokens)

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Around a pass that is nobody's work, but a question about a graph."""
        before = dict(self.counts)
        try:
            yield
        finally:
            self.counts = before

    def _count(self, direction: str, rows: int, tokens: int) -> None:
        self.counts[f"{direction}_rows"] += rows
        self.counts[f"{direction}_tokens"] += tokens

    def _called(self, source: LogProbFunction, part: Inputs, whose: str) -> Tensor:
        try:
            log_probs = uncached(source, part.batch) if parametrize._cache_enabled else source(part.batch)
        except TypeError:  # only now ask whether it takes one argument: asking takes longer than calling
            checks.function("log_prob_fn", source, "a function from rows to log-probs", part.batch)
            raise
        except ValueError as error:
            if part.total == 1 and "more than 1 value per channel when training" in str(error):
                checks.add_sentence(
                    error,
                    "A function is called with one row too, which BatchNorm in training mode refuses: update its "
                    "statistics yourself, once a step on all rows, and call it in eval() (docs/how_a_step_runs.md).",
                )
            raise
        check_log_probs(log_probs, part, whose)
        if part.mask is None:
            shape = log_probs.shape[1:]
            self._token_shape = shape if self._token_shape is None else self._token_shape
            if shape != self._token_shape:
                raise ValueError(
                    f"{whose} returned rows of {tuple(shape)} after rows of {tuple(self._token_shape)} in the same "
                    "call; pad all rows to the same length, and give a mask."
                )
        return log_probs


def uncached(source: LogProbFunction, rows: Any) -> Tensor:
    """`source(rows)`, from weights that this pass computes itself, also inside of `parametrize.cached()`.

    A weight cached by a pass without a graph, or by one whose graph is gone, would be of no use to the next one.

    >>> layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 1))
    >>> with parametrize.cached():
    ...     with torch.no_grad():
    ...         _ = uncached(layer, torch.ones(1, 2))
    ...     layer.weight.requires_grad
    True
    """
    callers, parametrize._cache = parametrize._cache, {}
    try:
        return source(rows)
    finally:
        parametrize._cache = callers
