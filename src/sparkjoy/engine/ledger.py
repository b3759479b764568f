"""Counts what one call really did: rows and tokens forward and backward, FLOPs, seconds.

Forward rows are counted as they enter a log-prob function, backward rows by a hook on what it returned, when a gradient
arrives there. FLOPs are measured on the first pass over rows of a new shape and multiplied by the rows after that.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from sparkjoy.engine.inputs import Inputs, check_log_probs

FlopRates = dict[tuple[Any, ...], float]
"""FLOPs per row, by direction and shape of a row; kept from call to call."""


class FlopCount(TorchDispatchMode):
    """Counts the FLOPs of what runs inside it: torch's own formulas, without the per-module tree that doubles the cost.

    >>> import torch
    >>> with FlopCount() as count:
    ...     _ = torch.ones(2, 3) @ torch.ones(3, 4)
    >>> count.flops
    48
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out


class Ledger:
    """The counts of one call.

    Args:
        flop_rates: FLOPs per row measured so far, added to when a row of a new shape comes by; None: count none.
    """

    def __init__(self, flop_rates: FlopRates | None) -> None:
        self.screened_rows = self.forward_rows = self.backward_rows = 0
        self.screened_tokens = self.forward_tokens = self.backward_tokens = 0
        self.forward_flops = self.backward_flops = 0.0
        self.seconds = {"screen": 0.0, "gather": 0.0, "forward": 0.0, "backward": 0.0}
        self._flop_rates = flop_rates
        self._lap_began = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Add the host seconds since the last lap, or since the call began, to `seconds[phase]`."""
        now = time.perf_counter()
        self.seconds[phase] += now - self._lap_began
        self._lap_began = now

    def screen(self, source: Callable[[Any], Tensor], part: Inputs, own: bool) -> Tensor:
        """Log-probs of `part`, to decide on; `own` says that the source is the log-prob function itself."""
        log_probs = self._forward("forward" if own else "screen", source, part)
        tokens = part.tokens(log_probs)
        self.screened_rows += part.total
        self.screened_tokens += tokens
        if own:
            self.forward_rows += part.total
            self.forward_tokens += tokens
        return log_probs

    def forward(self, log_prob_fn: Callable[[Any], Tensor], part: Inputs) -> Tensor:
        """Log-probs of `part`, to differentiate; a hook counts its rows when their gradient arrives."""
        log_probs = self._forward("forward", log_prob_fn, part)
        tokens = part.tokens(log_probs)
        self.forward_rows += part.total
        self.forward_tokens += tokens

        def gradient_arrived(gradient: Tensor) -> None:
            self.backward_rows += gradient.shape[0]
            self.backward_tokens += tokens

        if log_probs.requires_grad:
            log_probs.register_hook(gradient_arrived)
        return log_probs

    def backward(self, backward: Callable[[Tensor], Any], loss: Tensor, part: Inputs) -> None:
        """Run `backward(loss)`, whose graph ends at the log-probs of `part`."""
        before = self.backward_rows
        key = ("backward", *part.row_shapes)
        if self._flop_rates is None:
            backward(loss)
            return
        if key in self._flop_rates:
            backward(loss)
        else:
            with FlopCount() as count:
                backward(loss)
            self._flop_rates[key] = count.flops / max(1, self.backward_rows - before)
        self.backward_flops += self._flop_rates[key] * (self.backward_rows - before)

    def _forward(self, direction: str, source: Callable[[Any], Tensor], part: Inputs) -> Tensor:
        key = (direction, *part.row_shapes)
        if self._flop_rates is None:
            return check_log_probs(source(part.batch), part)
        if key in self._flop_rates:
            log_probs = source(part.batch)
        else:
            with FlopCount() as count:
                log_probs = source(part.batch)
            self._flop_rates[key] = count.flops / part.total
        self.forward_flops += self._flop_rates[key] * part.total
        return check_log_probs(log_probs, part)
