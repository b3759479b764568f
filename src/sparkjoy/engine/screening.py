"""Log-probs to decide on, without a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from sparkjoy import checks

LogProbFunction = Callable[[Any], Tensor]
"""`rows -> log-probs` of the actions taken in them: (n,) or (n, T)."""


@contextmanager
def screening() -> Iterator[None]:
    """No graph inside, and weights that autocast caches are left alone.

    What is drawn inside stays drawn: whoever puts torch's random state back makes a thread that draws meanwhile, such
    as a sampler's, draw the same numbers again.

    >>> with screening():
    ...     (torch.ones(2, requires_grad=True) * torch.rand(2)).requires_grad
    False
    """
    with torch.no_grad():
        try:
            yield
        finally:
            # Older versions of torch keep weights that were cast in here, without a graph, for passes that want one.
            torch.clear_autocast_cache()


def uncached(source: LogProbFunction, rows: Any) -> Tensor:
    """`source(rows)`, from weights that this pass computes itself, also inside of `parametrize.cached()`.

    A weight cached by a pass without a graph, or by one whose graph is gone, would be of no use to the next one.

    >>> layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 1))
    >>> with parametrize.cached():
    ...     with screening():
    ...         _ = uncached(layer, torch.ones(1, 2))
    ...     layer.weight.requires_grad
    True
    """
    if not parametrize._cache_enabled:
        return _called(source, rows)
    callers, parametrize._cache = parametrize._cache, {}
    try:
        return _called(source, rows)
    finally:
        parametrize._cache = callers


def _called(source: LogProbFunction, rows: Any) -> Tensor:
    try:
        return source(rows)
    except TypeError:  # only now ask whether it takes one argument: asking takes longer than calling
        checks.function("log_prob_fn", source, "a function from rows to log-probs", rows)
        raise
