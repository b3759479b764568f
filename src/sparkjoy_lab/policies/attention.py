"""The block that a transformer is a stack of, and attention at the lengths of small tasks."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NARROW = 16
"""Rows narrower than a vector register: torch's CPU softmax over them is 3 times slower than over columns."""


class Block(nn.Module):
    """Pre-norm attention and a pre-norm feed-forward part with ReLU, each added to the residual stream; no biases.

    ReLU, as torch's own transformer layers have by default: at these sizes a GELU costs four times as much.
    """

    def __init__(self, width: int, heads: int, feed_forward: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.feed_forward_norm = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, feed_forward, bias=False)
        self.down = nn.Linear(feed_forward, width, bias=False)

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (..., D), and keys and values (..., 2 D), of hidden states (..., D)."""
        qkv: Tensor = self.qkv(self.attention_norm(hidden))
        width = qkv.shape[-1] // 3
        queries, seen = qkv.split([width, 2 * width], dim=-1)
        return queries, seen

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """The residual stream (..., D) after this block, given what its heads saw, of the same shape."""
        hidden = hidden + self.out(attended)
        fed: Tensor = self.down(F.relu(self.up(self.feed_forward_norm(hidden))))
        return hidden + fed


def attend(queries: Tensor, seen: Tensor, mask: Tensor, heads: int) -> Tensor:
    """Scaled dot-product attention of queries (n, Q, D) to keys and values (n, K, 2 D): (n, Q, D).

    On a CPU as two batched products, which at a few dozen tokens is quicker than the fused kernel, backward above all.

    Args:
        queries: as `Block.project` gives them.
        seen: likewise.
        mask: added to the scores, (Q, K) or (n, 1, Q, K).
        heads: attention heads.
    """
    n, length, width = queries.shape
    size = width // heads
    queries = queries.view(n, length, heads, size).transpose(1, 2)
    keys, values = seen.view(n, seen.shape[1], 2, heads, size).permute(2, 0, 3, 1, 4).unbind(0)
    if queries.device.type != "cpu" or mask.dim() > 2:
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    else:
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)
        scores = torch.baddbmm(mask, queries.flatten(0, 1), keys.transpose(1, 2), alpha=size**-0.5)
        attended = torch.bmm(softmax(scores), values).unflatten(0, (n, heads))
    return attended.transpose(1, 2).reshape(n, length, width)


def softmax(scores: Tensor) -> Tensor:
    """Softmax over the last dimension of (b, Q, K), not always contiguous."""
    if scores.shape[2] < NARROW:
        return scores.transpose(1, 2).contiguous().softmax(dim=1).transpose(1, 2)
    return scores.softmax(dim=2)


@lru_cache(maxsize=16)
def causal_mask(queries: int, slots: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(queries, slots): 0 where the last `queries` of the slots may look, else minus infinity. Not to be written to."""
    with torch.inference_mode(False):  # kept for later calls, which may build a graph
        mask = torch.full((queries, slots), -torch.inf, dtype=dtype, device=device)
        return mask.triu_(slots - queries + 1)
