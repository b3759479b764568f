"""Completions as TRL has them in a micro-batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Rows = dict[str, Any]
"""A micro-batch as TRL has it: tensors with the row as leading dimension, and 0-dim ones for the whole batch."""


def loss_mask(rows: Rows) -> Tensor:
    """(n, T), 1 for tokens that the loss counts."""
    mask: Tensor = rows["completion_mask"]
    return mask if rows.get("tool_mask") is None else mask * rows["tool_mask"]


def whole(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts and completions side by side: ids, mask, and which tokens are a completion's; each (n, P + T)."""
    ids = torch.cat([rows["prompt_ids"], rows["completion_ids"]], dim=1)
    mask = torch.cat([rows["prompt_mask"], rows["completion_mask"]], dim=1)
    scored = torch.cat([torch.zeros_like(rows["prompt_mask"]), rows["completion_mask"]], dim=1)
    return ids, mask, scored
