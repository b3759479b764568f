"""Counts what one call really did: rows and tokens forward and backward, FLOPs, seconds.

Forward rows are counted as they enter a log-prob function, backward rows by a hook on what it returned, when a gradient
arrives there. FLOPs are measured on the first pass over rows of a new shape, and taken from there after that.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.hooks import RemovableHandle

from sparkjoy.engine.inputs import Inputs, check_log_probs

KnownFlops = dict[tuple[Any, ...], int]
"""FLOPs of a pass, by direction, number of rows and shape of a row; kept from call to call."""


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
        known_flops: FLOPs measured so far, added to when a new shape comes by; None: count none.
    """

    def __init__(self, known_flops: KnownFlops | None) -> None:
        self.screened_rows = self.forward_rows = self.backward_rows = 0
        self.screened_tokens = self.forward_tokens = self.backward_tokens = 0
        self.forward_flops = self.backward_flops = self._graph_flops = 0
        self.seconds = {"screen": 0.0, "gather": 0.0, "forward": 0.0, "backward": 0.0}
        self._known_flops = known_flops
        self._lap_began = time.perf_counter()
        self._token_shape: torch.Size | None = None
        self._hook: RemovableHandle | None = None

    @property
    def backward_over_forward(self) -> float | None:
        """r: FLOPs of the backward passes over those of the forward passes they went back through, if counted."""
        return self.backward_flops / self._graph_flops if self._graph_flops and self.backward_flops else None

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
        flops_before = self.forward_flops
        log_probs = self._forward("forward", log_prob_fn, part)
        self._graph_flops += self.forward_flops - flops_before
        tokens = part.tokens(log_probs)
        self.forward_rows += part.total
        self.forward_tokens += tokens

        def gradient_arrived(gradient: Tensor) -> None:
            self.backward_rows += gradient.shape[0]
            self.backward_tokens += tokens

        if log_probs.requires_grad:
            self._hook = log_probs.register_hook(gradient_arrived)
        return log_probs

    def backward(self, backward: Callable[[Tensor], Any], loss: Tensor, part: Inputs) -> None:
        """Run `backward(loss)`, whose graph ends at the log-probs of `part`."""
        self.backward_flops += self._counted("backward", part, lambda: backward(loss))[1]
        if self._hook is not None:
            self._hook.remove()  # a log-prob function may return the same tensor again

    def _forward(self, direction: str, source: Callable[[Any], Tensor], part: Inputs) -> Tensor:
        log_probs, flops = self._counted(direction, part, lambda: source(part.batch))
        self.forward_flops += flops
        checked = check_log_probs(log_probs, part)
        if self._token_shape is None:
            self._token_shape = checked.shape[1:]
        if part.mask is None and checked.shape[1:] != self._token_shape:
            raise ValueError(
                f"the log-prob function returned rows of {tuple(checked.shape[1:])} after rows of "
                f"{tuple(self._token_shape)} in the same call; pad all rows to the same length, and give a mask."
            )
        return checked

    def _counted(self, direction: str, part: Inputs, work: Callable[[], Any]) -> tuple[Any, int]:
        """What `work` returns, and its FLOPs: measured where no pass over as many rows of this shape was yet."""
        if self._known_flops is None:
            return work(), 0
        key = (direction, part.total, *part.row_shapes)
        if key in self._known_flops:
            return work(), self._known_flops[key]
        with FlopCount() as count:
            result = work()
        self._known_flops[key] = count.flops
        return result, count.flops
