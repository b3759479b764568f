"""A decoder-only transformer over a small vocabulary, and the log-probs of answers to prompts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparkjoy.policies.sampling import sample_answers


class Block(nn.Module):
    """Pre-norm attention and a pre-norm feed-forward part with ReLU, each added to the residual stream; no biases.

    ReLU, as torch's and flax's own layers have by default: a GELU costs four times as much at these sizes.
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

    def heads_of(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of hidden states (n, S, D): (n, heads, S, D / heads) each."""
        qkv = self.qkv(self.attention_norm(hidden))
        n, length, _ = hidden.shape
        queries, keys, values = qkv.view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return queries, keys, values

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """The residual stream (n, S, D) after this block, given what its heads saw, (n, heads, S, D / heads)."""
        hidden = hidden + self.out(attended.transpose(1, 2).flatten(2))
        return hidden + self.down(F.relu(self.up(self.feed_forward_norm(hidden))))


class Transformer(nn.Module):
    """Answers of T tokens to prompts of H tokens: decoder-only, pre-norm, no biases, learned positions.

    The sequence is the prompt and then the answer; the first answer token is predicted from the last prompt token, so
    there is no separator, and the last answer token is never read.

    >>> import torch
    >>> policy = Transformer(vocab_size=2, positions=19)
    >>> prompts = torch.randint(2, (3, 10))
    >>> answers, log_probs = policy.sample(prompts, 2, 10, torch.Generator().manual_seed(0))
    >>> answers.shape
    torch.Size([6, 10])
    >>> rows = {"prompts": prompts.repeat_interleave(2, 0), "answers": answers}
    >>> bool(torch.isclose(policy.log_probs(rows), log_probs, atol=1e-5).all())
    True

    Args:
        vocab_size: M, of prompts and answers alike.
        positions: the longest sequence read, H + T - 1.
        layers: number of blocks.
        width: D, of the residual stream; a multiple of `heads`.
        heads: attention heads.
        feed_forward: width of the feed-forward part.

    Raises:
        ValueError: a size below 1, or a width that is no multiple of `heads`.
    """

    def __init__(
        self,
        vocab_size: int,
        positions: int,
        layers: int = 3,
        width: int = 64,
        heads: int = 4,
        feed_forward: int = 128,
    ) -> None:
        super().__init__()
        sizes = {
            "vocab_size": vocab_size,
            "positions": positions,
            "layers": layers,
            "width": width,
            "heads": heads,
            "feed_forward": feed_forward,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} is {size}; expected at least 1.")
        if width % heads:
            raise ValueError(f"width is {width}, which {heads} heads do not divide; expected a multiple of {heads}.")
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(positions, width)
        self.blocks = nn.ModuleList(Block(width, heads, feed_forward) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, vocab_size, bias=False)

    def log_probs(self, rows: dict[str, Tensor]) -> Tensor:
        """Differentiable log-probs (n, T) of `rows["answers"]` (n, T) after `rows["prompts"]` (n, H).

        `rows["prompt_lengths"]` (n,), where given, says how many tokens of each prompt count; anything may stand after
        them.

        Raises:
            ValueError: the sequences are longer than there are positions.
        """
        prompts, answers, lengths = rows["prompts"], rows["answers"], rows.get("prompt_lengths")
        hidden = self._read(prompts, answers[:, :-1], lengths)
        logits = self.head(self.norm(hidden))
        return -F.cross_entropy(logits.flatten(0, 1), answers.flatten(), reduction="none").view_as(answers)

    def sample(
        self,
        prompts: Tensor,
        answers_per_prompt: int,
        answer_length: int,
        generator: torch.Generator | None = None,
        prompt_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw answers at temperature 1, the answers of a prompt beside one another.

        Args:
            prompts: (P, H).
            answers_per_prompt: A.
            answer_length: T.
            generator: source of all draws; None: torch's global one.
            prompt_lengths: (P,), how many tokens of each prompt count; None: all.

        Returns:
            Answers and the log-probs they were drawn with, (P * A, T) each, without a graph.

        Raises:
            ValueError: the sequences are longer than there are positions.
        """
        self._check_length(prompts.shape[1] + answer_length - 1)
        return sample_answers(self, prompts, answers_per_prompt, answer_length, generator, prompt_lengths)

    def _check_length(self, length: int) -> None:
        if length > self.positions.num_embeddings:
            raise ValueError(
                f"prompt and answer have {length} tokens to read; this policy was made for at most "
                f"{self.positions.num_embeddings} positions."
            )

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Token and position embeddings, summed."""
        return self.tokens(tokens) + self.positions(positions)

    def _read(self, prompts: Tensor, answers: Tensor, lengths: Tensor | None) -> Tensor:
        """Hidden states (n, T, D) that predict the answer's tokens; `answers` is without its last token."""
        prompt_length = prompts.shape[1]
        sequence = torch.cat([prompts, answers], dim=1)
        self._check_length(sequence.shape[1])
        slots = torch.arange(sequence.shape[1], device=sequence.device)
        if lengths is not None:
            return self._read_ragged(sequence, slots, prompt_length, lengths.unsqueeze(1))
        hidden = self.embed(sequence, slots)
        for block in self.blocks[:-1]:
            hidden = block.finish(hidden, F.scaled_dot_product_attention(*block.heads_of(hidden), is_causal=True))
        # Of the last block only the positions that predict an answer's token matter.
        last = self.blocks[-1]
        queries, keys, values = last.heads_of(hidden)
        mask = slots <= slots[prompt_length - 1 :, None]
        attended = F.scaled_dot_product_attention(queries[:, :, prompt_length - 1 :], keys, values, attn_mask=mask)
        return last.finish(hidden[:, prompt_length - 1 :], attended)

    def _read_ragged(self, sequence: Tensor, slots: Tensor, prompt_length: int, lengths: Tensor) -> Tensor:
        padding = (slots >= lengths) & (slots < prompt_length)  # (n, S)
        # An answer's positions follow its prompt's last token, wherever its slots are.
        positions = torch.where(slots < prompt_length, slots, slots - prompt_length + lengths)
        hidden = self.embed(sequence.masked_fill(padding, 0), positions)
        mask = (slots <= slots[:, None]) & ~padding[:, None, None]
        for block in self.blocks:
            queries, keys, values = block.heads_of(hidden)
            hidden = block.finish(hidden, F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask))
        first = hidden.gather(1, (lengths - 1).unsqueeze(2).expand(-1, 1, hidden.shape[2]))
        return torch.cat([first, hidden[:, prompt_length:]], dim=1)
