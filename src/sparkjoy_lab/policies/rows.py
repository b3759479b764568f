"""Sequences as the rows of one matrix of tokens: who sees whom, and attention with its backward pass written out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sparkjoy_lab.policies.attention import causal_mask, softmax

Saved = tuple[Tensor, ...]


class Attention(Protocol):
    """Which rows see which in a block, and which come out of it."""

    def forward(self, qkv: Tensor) -> tuple[Tensor, Saved]:
        """What the finished rows' heads see (rows, D), of all rows' qkv (rows, 3 D), and what `backward` needs."""
        ...

    def backward(self, gradient: Tensor, saved: Sequence[Tensor]) -> Tensor:
        """The gradient (rows, 3 D) of `qkv`, given that of what the heads saw."""
        ...

    def finished(self, hidden: Tensor) -> Tensor:
        """Of states (rows, D) before the block those of the rows that come out of it."""
        ...

    def add_finished(self, gradient: Tensor, of_finished: Tensor) -> None:
        """Add to the gradient of all rows that of the finished ones."""
        ...


class Reading(Protocol):
    """Tokens to read, each at its position, and where their states go.

    Args:
        tokens: (rows,).
        positions: (rows,).
    """

    tokens: Tensor
    positions: Tensor

    def attentions(self, layers: int) -> list[Attention]:
        """One for every block."""
        ...

    def predicting(self, hidden: Tensor) -> Tensor:
        """The states (n * T, D) that predict the answers' tokens, of those that come out of the last block."""
        ...

    def predicting_backward(self, gradient: Tensor) -> Tensor:
        """The gradient of `hidden`, given that of the states that predict."""
        ...


class PlainReading:
    """Every answer with a prompt of its own.

    Args:
        sequences: (n, S), prompts and what is read of the answers.
        first: the first token that predicts one of the answer.
        heads: attention heads.
        dtype: of the states.
    """

    def __init__(self, sequences: Tensor, first: int, heads: int, dtype: torch.dtype) -> None:
        count, length = sequences.shape
        self.tokens = sequences.flatten()
        self.positions = torch.arange(length, device=sequences.device).repeat(count)
        mask = causal_mask(length, length, dtype, sequences.device)
        self._attention = RowAttention(count, heads, mask)
        self._last = RowAttention(count, heads, mask, first) if first else self._attention

    def attentions(self, layers: int) -> list[Attention]:
        return [*[self._attention] * (layers - 1), self._last]

    def predicting(self, hidden: Tensor) -> Tensor:
        return hidden

    def predicting_backward(self, gradient: Tensor) -> Tensor:
        return gradient


class SharedReading:
    """Every distinct prompt once, for all its answers. The rows: the tokens of all prompts, then of all answers.

    Args:
        prompts: (P, H).
        answers: (n, L), what is read of them, at least one token.
        group: (n,), the number of each answer's prompt.
        heads: attention heads.
        dtype: of the states.
    """

    def __init__(self, prompts: Tensor, answers: Tensor, group: Tensor, heads: int, dtype: torch.dtype) -> None:
        (self._prompts, asked), (self._answers, length) = prompts.shape, answers.shape
        self.tokens = torch.cat([prompts.flatten(), answers.flatten()])
        slots = torch.arange(asked + length, device=answers.device)
        self.positions = torch.cat([slots[:asked].repeat(self._prompts), slots[asked:].repeat(self._answers)])
        # Copying by a product with zeros and ones is as quick as gathering, and its backward pass much quicker.
        self._copies = F.one_hot(group, self._prompts).to(dtype)
        mask = causal_mask(asked + length, asked + length, dtype, answers.device)
        self._attention = SharedAttention(group, self._copies, heads, mask, asked)

    def attentions(self, layers: int) -> list[Attention]:
        return [self._attention] * layers

    def predicting(self, hidden: Tensor) -> Tensor:
        asked, answered = self._split(hidden)
        first = torch.mm(self._copies, asked[:, -1]).unsqueeze(1)
        return torch.cat([first, answered], dim=1).flatten(0, 1)

    def predicting_backward(self, gradient: Tensor) -> Tensor:
        gradient = gradient.view(self._answers, -1, gradient.shape[1])
        of_hidden = gradient.new_zeros(len(self.tokens), gradient.shape[2])
        asked, answered = self._split(of_hidden)
        asked[:, -1] = torch.mm(self._copies.t(), gradient[:, 0])
        answered.copy_(gradient[:, 1:])
        return of_hidden

    def _split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Views (P, H, D) and (n, L, D)."""
        asked = self._attention.asked
        width = rows.shape[1]
        return rows[:asked].view(self._prompts, -1, width), rows[asked:].view(self._answers, -1, width)


class RowAttention:
    """Every sequence sees itself, as far as the mask lets it.

    Args:
        count: n, sequences.
        heads: attention heads.
        mask: (S, S), added to the scores.
        first: only tokens from this one on come out of the block.
    """

    def __init__(self, count: int, heads: int, mask: Tensor, first: int = 0) -> None:
        self.count = count
        self.heads = heads
        self.mask = mask[first:] if first else mask
        self.first = first

    def finished(self, hidden: Tensor) -> Tensor:
        if not self.first:
            return hidden
        return hidden.view(self.count, -1, hidden.shape[1])[:, self.first :].reshape(-1, hidden.shape[1])

    def add_finished(self, gradient: Tensor, of_finished: Tensor) -> None:
        if self.first:
            gradient = gradient.view(self.count, -1, gradient.shape[1])[:, self.first :]
        gradient += of_finished.view_as(gradient)

    def forward(self, qkv: Tensor) -> tuple[Tensor, Saved]:
        parts = to_heads(qkv, self.count, 3, self.heads).contiguous()
        queries, keys, values = flat_parts(parts)
        if self.first:
            queries = queries[:, self.first :]
        seen, chances = look(queries, keys, values, self.mask)
        return from_heads(seen, self.count), (parts, chances)

    def backward(self, gradient: Tensor, saved: Sequence[Tensor]) -> Tensor:
        parts, chances = saved
        queries, keys, values = flat_parts(parts)
        of_parts = torch.empty_like(parts)
        of_queries, of_keys, of_values = flat_parts(of_parts)
        if self.first:
            of_queries[:, : self.first] = 0
            queries, of_queries = queries[:, self.first :], of_queries[:, self.first :]
        of_seen = to_heads(gradient, self.count, 1, self.heads).reshape(queries.shape)
        look_backward(of_seen, queries, keys, values, chances, of_queries, of_keys, of_values)
        return of_parts.permute(1, 3, 0, 2, 4).reshape(-1, 3 * gradient.shape[1])


class SharedAttention:
    """Every prompt sees itself; every answer sees itself and its prompt. The rows: all prompts' tokens, all answers'.

    Args:
        group: (n,), the number of each answer's prompt.
        copies: (n, P), the same as zeros and ones.
        heads: attention heads.
        mask: (H + L, H + L), added to the scores.
        prompt_length: H.
    """

    def __init__(self, group: Tensor, copies: Tensor, heads: int, mask: Tensor, prompt_length: int) -> None:
        self.group = group
        self.copies = copies
        self.answers, prompts = copies.shape
        self.heads = heads
        self.prompt_length = prompt_length
        self.asked = prompts * prompt_length
        self.answer_mask = mask[prompt_length:]
        self.within = RowAttention(prompts, heads, mask[:prompt_length, :prompt_length])

    def finished(self, hidden: Tensor) -> Tensor:
        return hidden

    def add_finished(self, gradient: Tensor, of_finished: Tensor) -> None:
        gradient += of_finished

    def forward(self, qkv: Tensor) -> tuple[Tensor, Saved]:
        in_prompt, (prompt, prompt_chances) = self.within.forward(qkv[: self.asked])
        own = to_heads(qkv[self.asked :], self.answers, 3, self.heads)
        queries = own[0].reshape(self.answers * self.heads, -1, own.shape[4])
        seen = qkv.new_empty(2, *own.shape[1:3], self.prompt_length + own.shape[3], own.shape[4])
        seen[:, :, :, : self.prompt_length] = prompt[1:].index_select(1, self.group)
        seen[:, :, :, self.prompt_length :] = own[1:]
        keys, values = flat_parts(seen)
        in_answer, chances = look(queries, keys, values, self.answer_mask)
        attended = qkv.new_empty(len(qkv), qkv.shape[1] // 3)
        attended[: self.asked] = in_prompt
        to_heads(attended[self.asked :], self.answers, 1, self.heads).copy_(in_answer.view_as(own[:1]))
        return attended, (prompt, prompt_chances, queries, seen, chances)

    def backward(self, gradient: Tensor, saved: Sequence[Tensor]) -> Tensor:
        prompt, prompt_chances, queries, seen, chances = saved
        length = self.prompt_length
        of_queries, of_seen = torch.empty_like(queries), torch.empty_like(seen)
        of_answers = to_heads(gradient[self.asked :], self.answers, 1, self.heads).reshape(queries.shape)
        (keys, values), (of_keys, of_values) = flat_parts(seen), flat_parts(of_seen)
        look_backward(of_answers, queries, keys, values, chances, of_queries, of_keys, of_values)
        of_qkv = gradient.new_empty(len(gradient), 3 * gradient.shape[1])
        of_own = to_heads(of_qkv[self.asked :], self.answers, 3, self.heads)
        of_own[0] = of_queries.view_as(of_own[0])
        of_own[1:] = of_seen[:, :, :, length:]
        of_prompt = of_qkv[: self.asked]
        of_prompt.copy_(self.within.backward(gradient[: self.asked], (prompt, prompt_chances)))
        owed = self.copies.t() @ of_seen[:, :, :, :length].reshape(2, self.answers, -1)
        to_heads(of_prompt, prompt.shape[1], 3, self.heads)[1:] += owed.view(prompt[1:].shape)
        return of_qkv


def to_heads(rows: Tensor, count: int, parts: int, heads: int) -> Tensor:
    """A view (parts, count, heads, S, d) of `rows` (count * S, parts * heads * d)."""
    return rows.view(count, -1, parts, heads, rows.shape[1] // (parts * heads)).permute(2, 0, 3, 1, 4)


def from_heads(seen: Tensor, count: int) -> Tensor:
    """Rows (count * S, heads * d) of (count * heads, S, d)."""
    batch, length, size = seen.shape
    heads = batch // count
    return seen.view(count, heads, length, size).transpose(1, 2).reshape(count * length, heads * size)


def flat_parts(parts: Tensor) -> tuple[Tensor, ...]:
    """Of (parts, count, heads, S, d) each part (count * heads, S, d)."""
    return parts.flatten(1, 2).unbind(0)


def look(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """What queries (b, Q, d) see of keys and values (b, K, d), and with which weights (b, Q, K)."""
    scores = torch.baddbmm(mask, queries, keys.transpose(1, 2), alpha=queries.shape[2] ** -0.5)
    chances = softmax(scores)
    return torch.bmm(chances, values), chances


def look_backward(
    of_seen: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    chances: Tensor,
    of_queries: Tensor,
    of_keys: Tensor,
    of_values: Tensor,
) -> None:
    """Write the gradients of `look`'s queries, keys and values into the last three."""
    scale = queries.shape[2] ** -0.5
    of_chances = torch.bmm(of_seen, values.transpose(1, 2))
    of_scores = torch._softmax_backward_data(of_chances, chances, 2, chances.dtype)
    torch.bmm(chances.transpose(1, 2), of_seen, out=of_values)
    torch.baddbmm(of_queries, of_scores, keys, beta=0, alpha=scale, out=of_queries)
    torch.baddbmm(of_keys, of_scores.transpose(1, 2), queries, beta=0, alpha=scale, out=of_keys)
