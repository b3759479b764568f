"""Sampling from a transformer with a key-value cache; answers share what they read as long as they are equal.

One query against a short cache is far too small for a matrix product per head. So the cache is kept with the answers
innermost, (slot, 3 x width, column), and attention is element-wise work over long contiguous rows; the projections read
and write that layout at no cost, as matrix products take either operand transposed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparkjoy_lab.policies.attention import Block
from sparkjoy_lab.policies.prefixes import SharedPrefixes
from sparkjoy_lab.policies.rows import PlainReading

if TYPE_CHECKING:
    from sparkjoy_lab.policies.transformer import Transformer


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
    positions = torch.arange(prompt_length, slots, device=prompts.device).unsqueeze(1)
    padding = None
    if prompt_lengths is not None:
        padding = torch.arange(prompt_length, device=prompts.device) >= prompt_lengths.unsqueeze(1)
        prompts = prompts.masked_fill(padding, 0)
        positions = positions - prompt_length + prompt_lengths
    position_embeddings = policy.positions(positions)  # (T - 1, 1 or P, D)
    prefixes = SharedPrefixes(len(prompts), answers_per_prompt, prompts.device)
    cache = _Cache(policy, len(prompts), prompt_length, slots, prefixes)
    hidden = _prefill(policy, prompts, prompt_lengths, cache.columns[:, :prompt_length])
    hidden = hidden.repeat_interleave(prefixes.copies, 0)
    for step in range(answer_length):
        if step:
            newest = answers[step - 1]
            old_columns = prefixes.split(newest)
            if old_columns is not None:
                cache.rearrange(old_columns, prompt_length + step - 1)
            position, bias = position_embeddings[step - 1], None
            if padding is not None:
                prompt = prefixes.leaders // answers_per_prompt
                position, bias = position[prompt], _bias(padding[prompt], prompt_length + step, embedding.dtype)
            hidden = F.embedding(newest[prefixes.leaders], embedding) + position
            for layer in cache.layers:
                hidden = _decode(hidden, layer, prompt_length + step, bias)
        every = torch.mm(policy.norm(hidden), head)
        torch.index_select(every, 0, prefixes.columns, out=logits[step])
        torch.argmax(logits[step] + noise[step], dim=1, out=answers[step])
    log_probs = logits.log_softmax(dim=2).gather(2, answers.unsqueeze(2)).squeeze(2)
    return answers.t().contiguous(), log_probs.t().contiguous()


def gumbel_noise(embedding: Tensor, answer_length: int, total: int, generator: torch.Generator | None) -> Tensor:
    """(T, B, M), for every draw at once: the likeliest of logits + noise is a draw from their softmax."""
    return embedding.new_empty(answer_length, total, len(embedding)).exponential_(generator=generator).log_().neg_()


def _bias(padding: Tensor, filled: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores (filled, heads, columns): minus infinity at the prompts' padding (columns, H)."""
    bias = torch.zeros(filled, 1, len(padding), dtype=dtype, device=padding.device)
    bias[: padding.shape[1], 0].masked_fill_(padding.t(), -torch.inf)
    return bias


class _Cache:
    """Queries, keys and values of all layers, a column for each distinct prefix, with room for more.

    Args:
        policy: whose.
        prompts: P.
        prompt_length: H.
        slots: tokens of a sequence that are read.
        prefixes: the columns to begin with.
    """

    def __init__(
        self, policy: Transformer, prompts: int, prompt_length: int, slots: int, prefixes: SharedPrefixes
    ) -> None:
        self._weights = [_Weights.of(block) for block in policy.layers]
        self._heads = policy.layers[0].heads
        self._prompts, self._prompt_length, self._most = prompts, prompt_length, len(prefixes.columns)
        weight = policy.tokens.weight
        self._store = weight.new_empty(len(policy.blocks), slots, 3 * weight.shape[1], len(prefixes.leaders))
        self._show(len(prefixes.leaders))

    def _show(self, count: int) -> None:
        self.columns = self._store[..., :count]
        """(layers, slots, 3 D, columns)."""
        self.layers = [
            _Layer(weights, cache, *cache.unflatten(1, (3, self._heads, -1)).unbind(1))
            for weights, cache in zip(self._weights, self.columns, strict=True)
        ]

    def rearrange(self, old: Tensor, filled: int) -> None:
        """Make the columns copies of the `old` ones, as far as slots are filled."""
        earlier, asked = self.columns, self._prompt_length
        have, width = earlier.shape[3], earlier.shape[2] // 3  # earlier queries are not needed any more
        if len(old) == self._most:
            self._store = self._store.new_empty(*self._store.shape[:3], self._most)
            # The prompts' first columns are still the first ones, and to spread these is quicker than to gather.
            spread = self._store[:, :asked, width:].unflatten(3, (self._prompts, -1))
            spread.copy_(earlier[:, :asked, width:, : self._prompts].unsqueeze(4))
            self._store[:, asked:filled, width:] = earlier[:, asked:filled, width:].index_select(3, old)
        else:
            if len(old) > self._store.shape[3]:
                self._store = self._store.new_empty(*self._store.shape[:3], min(self._most, 2 * len(old)))
                self._store[:, :filled, width:, :have] = earlier[:, :filled, width:]
            new = earlier[:, :filled, width:].index_select(3, old[have:])
            self._store[:, :filled, width:, have : len(old)] = new
        self._show(len(old))


class _Weights(NamedTuple):
    """A block's weights as decoding wants them."""

    attention_norm: Tensor
    qkv: Tensor  # (3 D, D), the queries' rows scaled by 1 / sqrt(D / heads)
    out: Tensor  # (D, D), transposed
    feed_forward_norm: Tensor
    up: Tensor  # (D, F), transposed
    down: Tensor  # (F, D), transposed
    epsilon: float

    @staticmethod
    def of(block: Block) -> _Weights:
        width = block.attention_norm.weight.shape[0]
        qkv = _matrix(block.qkv, width).clone()
        qkv[:width] *= (width // block.heads) ** -0.5
        return _Weights(
            block.attention_norm.weight,
            qkv,
            _matrix(block.out, width).t(),
            block.feed_forward_norm.weight,
            (up := _matrix(block.up, width)).t(),
            _matrix(block.down, len(up)).t(),
            block.attention_norm.eps,
        )


def _matrix(linear: nn.Module, inputs: int) -> Tensor:
    """The weight (outputs, inputs) of a linear map without a bias, an adapter's share included."""
    if type(linear) is nn.Linear:
        return linear.weight
    weight: Tensor = linear(torch.eye(inputs, out=next(linear.parameters()).new_empty(inputs, inputs))).t()
    return weight


class _Layer(NamedTuple):
    """A block's weights and columns: views made when there are new columns, not for every token."""

    weights: _Weights
    cache: Tensor  # (slots, 3 D, columns)
    queries: Tensor  # (slots, heads, D / heads, columns)
    keys: Tensor  # likewise
    values: Tensor  # likewise


def _prefill(policy: Transformer, prompts: Tensor, lengths: Tensor | None, cache: Tensor) -> Tensor:
    """Fill `cache` (layers, H, 3 D, columns) with prompts' keys and values; the last prompt tokens' states (P, D)."""
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
    """The residual stream (columns, D) of the newest tokens after a block; keys and values go to slot `filled` - 1."""
    weights, newest = layer.weights, filled - 1
    shape, width = hidden.shape[1:], hidden.shape[1]
    normed = F.layer_norm(hidden, shape, weights.attention_norm, None, weights.epsilon)
    torch.mm(weights.qkv, normed.t(), out=layer.cache[newest])
    scores = (layer.queries[newest] * layer.keys[:filled]).sum(dim=2)
    if bias is not None:
        scores += bias
    attended = (scores.softmax(dim=0).unsqueeze(2) * layer.values[:filled]).sum(dim=0).view(width, -1)
    hidden = torch.addmm(hidden, attended.t(), weights.out)
    normed = F.layer_norm(hidden, shape, weights.feed_forward_norm, None, weights.epsilon)
    return torch.addmm(hidden, torch.mm(normed, weights.up).relu_(), weights.down)
