"""Sampling from a transformer with a key-value cache, the answers of a prompt sharing its prefill.

One query against a short cache is far too small for a matrix product per head. So the cache is kept with the answers
innermost, (slot, 3 x width, answer), and attention is element-wise work over long contiguous rows; the projections read
and write that layout at no cost, as matrix products take either operand transposed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparkjoy.policies.attention import Block
from sparkjoy.policies.rows import PlainReading

if TYPE_CHECKING:
    from sparkjoy.policies.transformer import Transformer


def sample_answers(
    policy: Transformer,
    prompts: Tensor,
    answers_per_prompt: int,
    answer_length: int,
    generator: torch.Generator | None,
    prompt_lengths: Tensor | None,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What `Transformer.sample` does; to be called without gradients."""
    prompt_length, total = prompts.shape[1], len(prompts) * answers_per_prompt
    embedding, head = policy.tokens.weight, policy.head.weight.t()
    if noise is None:
        noise = gumbel_noise(embedding, answer_length, total, generator)
    logits = torch.empty_like(noise)
    answers = prompts.new_empty(answer_length, total)
    slots = prompt_length + answer_length - 1
    cache = embedding.new_empty(len(policy.blocks), slots, 3 * embedding.shape[1], total)
    positions = torch.arange(prompt_length, slots, device=prompts.device).unsqueeze(1)
    bias = None
    if prompt_lengths is not None:
        padding = torch.arange(prompt_length, device=prompts.device) >= prompt_lengths.unsqueeze(1)
        prompts = prompts.masked_fill(padding, 0)
        bias = embedding.new_zeros(slots, 1, total)
        bias[:prompt_length, 0].masked_fill_(padding.t().repeat_interleave(answers_per_prompt, 1), -torch.inf)
        positions = positions - prompt_length + prompt_lengths.repeat_interleave(answers_per_prompt)
    position_embeddings = policy.positions(positions)  # (T - 1, 1 or B, D)
    hidden = _prefill(policy, prompts, prompt_lengths, cache[:, :prompt_length]).repeat_interleave(
        answers_per_prompt, 0
    )
    layers = [_layer(block, layer_cache) for block, layer_cache in zip(policy.layers, cache, strict=True)]
    for step in range(answer_length):
        if step:
            hidden = F.embedding(answers[step - 1], embedding) + position_embeddings[step - 1]
            for layer in layers:
                hidden = _decode(hidden, layer, prompt_length + step, bias)
        torch.mm(policy.norm(hidden), head, out=logits[step])
        torch.argmax(logits[step] + noise[step], dim=1, out=answers[step])
    log_probs = logits.log_softmax(dim=2).gather(2, answers.unsqueeze(2)).squeeze(2)
    return answers.t().contiguous(), log_probs.t().contiguous()


def gumbel_noise(embedding: Tensor, answer_length: int, total: int, generator: torch.Generator | None) -> Tensor:
    """(T, B, M), for every draw at once: the likeliest of logits + noise is a draw from their softmax."""
    return embedding.new_empty(answer_length, total, len(embedding)).exponential_(generator=generator).log_().neg_()


class _Layer(NamedTuple):
    """A block's weights and cache as decoding wants them: every view is made once, not once per token."""

    slots: tuple[Tensor, ...]  # (3 D, B) each, the query, key and value of one slot
    queries: tuple[Tensor, ...]  # (heads, D / heads, B) each, of one slot
    keys: Tensor  # (slots, heads, D / heads, B)
    values: Tensor  # likewise
    attention_norm: Tensor
    qkv: Tensor  # (3 D, D), the queries' rows scaled by 1 / sqrt(D / heads)
    out: Tensor  # (D, D), transposed
    feed_forward_norm: Tensor
    up: Tensor  # (D, F), transposed
    down: Tensor  # (F, D), transposed
    epsilon: float


def _layer(block: Block, cache: Tensor) -> _Layer:
    width = block.out.weight.shape[0]
    qkv = block.qkv.weight.clone()
    qkv[:width] *= (width // block.heads) ** -0.5
    queries, keys, values = cache.unflatten(1, (3, block.heads, -1)).unbind(1)
    return _Layer(
        cache.unbind(0),
        queries.unbind(0),
        keys,
        values,
        block.attention_norm.weight,
        qkv,
        block.out.weight.t(),
        block.feed_forward_norm.weight,
        block.up.weight.t(),
        block.down.weight.t(),
        block.attention_norm.eps,
    )


def _prefill(policy: Transformer, prompts: Tensor, lengths: Tensor | None, cache: Tensor) -> Tensor:
    """Fill `cache` (layers, H, 3 D, P * A) with the prompts' keys and values; the last prompt tokens' states (P, D)."""
    count, length = prompts.shape
    reading = PlainReading(prompts, length - 1 if lengths is None else 0, policy.layers[0].heads, cache.dtype)
    hidden = policy.embed(reading.tokens, reading.positions)
    attentions = reading.attentions(len(policy.layers))
    # Padding comes after the tokens that count, so none of these looks at it.
    for block, attention, layer_cache in zip(policy.layers, attentions, cache, strict=True):
        qkv = block.qkv(block.attention_norm(hidden))
        width = hidden.shape[1]
        shared = qkv.view(count, length, -1)[:, :, width:].permute(1, 2, 0).unsqueeze(3)  # (H, 2 D, P, 1)
        layer_cache[:, width:].unflatten(2, (count, -1)).copy_(shared)
        hidden = block.finish(attention.finished(hidden), attention.forward(qkv)[0])
    if lengths is None:
        return hidden
    return hidden.view(count, length, -1)[torch.arange(count, device=prompts.device), lengths - 1]


def _decode(hidden: Tensor, layer: _Layer, filled: int, bias: Tensor | None) -> Tensor:
    """The residual stream (B, D) of the newest token after one block; its keys and values go to slot `filled` - 1."""
    shape, width = hidden.shape[1:], hidden.shape[1]
    normed = F.layer_norm(hidden, shape, layer.attention_norm, None, layer.epsilon)
    torch.mm(layer.qkv, normed.t(), out=layer.slots[filled - 1])
    scores = (layer.queries[filled - 1] * layer.keys[:filled]).sum(dim=2)
    if bias is not None:
        scores += bias[:filled]
    attended = (scores.softmax(dim=0).unsqueeze(2) * layer.values[:filled]).sum(dim=0).view(width, -1)
    hidden = torch.addmm(hidden, attended.t(), layer.out)
    normed = F.layer_norm(hidden, shape, layer.feed_forward_norm, None, layer.epsilon)
    return torch.addmm(hidden, torch.mm(normed, layer.up).relu_(), layer.down)
