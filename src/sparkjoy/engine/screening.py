"""Log-probs to decide on, without a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparkjoy.engine.inputs import Inputs, finite_where_valid, micro_batches
from sparkjoy.engine.ledger import Ledger
from sparkjoy.engine.ranks import Ranks

LogProbFunction = Callable[[Any], Tensor]
"""`rows -> log-probs` of the actions taken in them: (n,) or (n, T)."""


def screen_without_graph(
    source: LogProbFunction, inputs: Inputs, micro_batch_size: int | None, ledger: Ledger, own: bool, ranks: Ranks
) -> Tensor:
    """Log-probs of the whole batch from `source`, leaving the training stream's random state alone."""
    device = inputs.advantages.device
    devices = [] if device.type == "cpu" else [device]
    device_type = "cuda" if device.type == "cpu" else device.type
    chunks = micro_batches(inputs.total, micro_batch_size)
    rounds = ranks.most(len(chunks))  # a rank with fewer runs fillers: the others wait for it
    with torch.no_grad(), torch.random.fork_rng(devices, device_type=device_type), ranks.screening():
        parts = [ledger.screen(source, inputs if len(chunks) == 1 else inputs.take(rows), own) for rows in chunks]
        for _ in range(rounds - len(chunks)):
            ledger.screen(source, inputs.take(slice(0, 1)), own)
    log_probs = parts[0] if len(parts) == 1 else torch.cat(parts)
    return finite_where_valid("the screening forward pass: log_probs", log_probs.detach(), inputs.mask)
