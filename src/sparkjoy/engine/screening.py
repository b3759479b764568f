"""Log-probs to decide on, without a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparkjoy.engine.inputs import Inputs, finite_where_valid, micro_batches
from sparkjoy.engine.ledger import Ledger
from sparkjoy.scores import ScoreFunction, at_least_float32, delight

LogProbFunction = Callable[[Any], Tensor]
"""`rows -> log-probs` of the actions taken in them: (n,) or (n, T)."""


def screen_without_graph(
    source: LogProbFunction, inputs: Inputs, micro_batch_size: int | None, ledger: Ledger, own: bool
) -> Tensor:
    """Log-probs of the whole batch from `source`, leaving the training stream's random state alone."""
    device = inputs.advantages.device
    devices = [] if device.type == "cpu" else [device]
    device_type = "cuda" if device.type == "cpu" else device.type
    with torch.no_grad(), torch.random.fork_rng(devices, device_type=device_type):
        chunks = micro_batches(inputs.total, micro_batch_size)
        parts = [ledger.screen(source, inputs if len(chunks) == 1 else inputs.take(rows), own) for rows in chunks]
    log_probs = parts[0] if len(parts) == 1 else torch.cat(parts)
    return finite_where_valid("the screening forward pass: log_probs", log_probs.detach(), inputs.mask)


def row_scores(score: ScoreFunction, inputs: Inputs, log_probs: Tensor) -> Tensor:
    """(B,) scores of rows, summed over their valid tokens; 0 for rows that teach nothing.

    Raises:
        ValueError: the score is neither (B,) nor (B, T).
    """
    scores = score(at_least_float32(inputs.advantages), at_least_float32(log_probs))
    if scores.dim() == 2:
        scores = (scores if inputs.mask is None else scores.where(inputs.mask, 0)).sum(dim=1)
    if scores.shape != (inputs.total,):
        raise ValueError(f"the score has shape {tuple(scores.shape)}; expected ({inputs.total},), one per row.")
    if score is not delight:  # delight is 0 already where the advantage is
        scores = scores.where(inputs.teaches(), 0)
    return scores
