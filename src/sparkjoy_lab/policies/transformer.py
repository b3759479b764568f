"""A decoder-only transformer over a small vocabulary, and the log-probs of answers to prompts."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparkjoy_lab.policies.attention import Block, attend, causal_mask
from sparkjoy_lab.policies.fused import fits_fused, fused_log_probs
from sparkjoy_lab.policies.rows import PlainReading, Reading, SharedReading
from sparkjoy_lab.policies.sampling import gumbel_noise, sample_answers


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
        self.fused = True
        """Whether the written-out backward pass is used where it fits; it changes the cost and nothing else."""
        self.checkpointed = False
        """Whether blocks keep nothing for their backward pass and run a second time there: less memory, more work."""

    def log_probs(self, rows: dict[str, Tensor], layers: int | None = None) -> Tensor:
        """Differentiable log-probs (n, T) of `rows["answers"]` (n, T) after `rows["prompts"]` (n, H).

        `rows["prompt_lengths"]` (n,), where given, says how many tokens of each prompt count; anything may stand after
        them. `rows["prompt_index"]` (n,), where given, is equal for rows of equal prompts: such a prompt is then read
        once for all its answers. It changes the cost and nothing else.

        With `layers` the states after so many blocks are read as if they were the last, by the shared norm and head.

        Raises:
            ValueError: the sequences are longer than there are positions, or there are not as many layers.
        """
        blocks = self.layers if layers is None else self.layers[:layers]
        if layers is not None and not 1 <= layers <= len(self.blocks):
            raise ValueError(f"layers is {layers}; expected 1 to {len(self.blocks)}.")
        prompts, answers, lengths = rows["prompts"], rows["answers"], rows.get("prompt_lengths")
        read = answers[:, :-1]
        self._check_length(prompts.shape[1] + read.shape[1])
        if lengths is None and self.fused and not self.checkpointed and fits_fused(self):
            return fused_log_probs(self, blocks, self._reading(prompts, read, rows.get("prompt_index")), answers)
        hidden = (
            self._read(blocks, prompts, read)
            if lengths is None
            else self._read_ragged(blocks, prompts, read, lengths.unsqueeze(1))
        )
        logits = self.head(self.norm(hidden))
        surprisals: Tensor = F.cross_entropy(logits.flatten(0, 1), answers.flatten(), reduction="none")
        return -surprisals.view_as(answers)

    def sample(
        self,
        prompts: Tensor,
        answers_per_prompt: int,
        answer_length: int,
        generator: torch.Generator | None = None,
        prompt_lengths: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw answers at temperature 1, the answers of a prompt beside one another.

        Args:
            prompts: (P, H).
            answers_per_prompt: A.
            answer_length: T.
            generator: source of all draws; None: torch's global one.
            prompt_lengths: (P,), how many tokens of each prompt count; None: all.
            noise: (T, P * A, M), draws made before by `noise`, instead of the generator's.

        Returns:
            Answers and the log-probs they were drawn with, (P * A, T) each, without a graph.

        Raises:
            ValueError: the sequences are longer than there are positions.
        """
        self._check_length(prompts.shape[1] + answer_length - 1)
        with torch.inference_mode():
            answers, log_probs = sample_answers(
                self, prompts, answers_per_prompt, answer_length, generator, prompt_lengths, noise
            )
        return answers.clone(), log_probs.clone()  # a graph may save these, but not inference tensors

    def noise(self, answer_length: int, total: int, generator: torch.Generator | None = None) -> Tensor:
        """The draws (T, B, M) that `sample` makes, so that several processes can each use their part of them."""
        with torch.inference_mode():
            return gumbel_noise(self.tokens.weight, answer_length, total, generator)

    def _check_length(self, length: int) -> None:
        if length > self.positions.num_embeddings:
            raise ValueError(
                f"prompt and answer have {length} tokens to read; this policy was made for at most "
                f"{self.positions.num_embeddings} positions."
            )

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Token and position embeddings, summed."""
        embedded: Tensor = self.tokens(tokens) + self.positions(positions)
        return embedded

    @property
    def layers(self) -> list[Block]:
        """The blocks, first to last."""
        return cast(list[Block], list(self.blocks))

    def _reading(self, prompts: Tensor, answers: Tensor, index: Tensor | None) -> Reading:
        """Each distinct prompt once, where that pays; `answers` is without its last token."""
        heads, dtype, total = self.layers[0].heads, self.tokens.weight.dtype, len(answers)
        if index is not None and total > 2 and answers.shape[1]:
            groups, group = index.unique(return_inverse=True)
            if 3 * len(groups) <= total:  # else too little is shared to pay for the gathering
                row = torch.empty_like(groups).scatter_(0, group, torch.arange(total, device=index.device))
                return SharedReading(prompts.index_select(0, row), answers, group, heads, dtype)
        return PlainReading(torch.cat([prompts, answers], dim=1), prompts.shape[1] - 1, heads, dtype)

    def _read(self, layers: list[Block], prompts: Tensor, answers: Tensor) -> Tensor:
        """Hidden states (n, T, D) that predict the answer's tokens; `answers` is without its last token."""
        sequence = torch.cat([prompts, answers], dim=1)
        length = sequence.shape[1]
        hidden = self.embed(sequence, torch.arange(length, device=sequence.device))
        mask = causal_mask(length, length, hidden.dtype, hidden.device)
        *blocks, last = layers
        for block in blocks:
            hidden = self._run(block, hidden, mask)
        # Of the last block only the positions that predict an answer's token matter.
        first = prompts.shape[1] - 1
        return self._run(last, hidden, mask, first)

    def _read_ragged(self, layers: list[Block], prompts: Tensor, answers: Tensor, lengths: Tensor) -> Tensor:
        """As `_read`, for prompts of which `lengths` (n, 1) tokens count."""
        prompt_length = prompts.shape[1]
        sequence = torch.cat([prompts, answers], dim=1)
        slots = torch.arange(sequence.shape[1], device=sequence.device)
        padding = (slots >= lengths) & (slots < prompt_length)  # (n, S)
        # An answer's positions follow its prompt's last token, wherever its slots are.
        positions = torch.where(slots < prompt_length, slots, slots - prompt_length + lengths)
        hidden = self.embed(sequence.masked_fill(padding, 0), positions)
        mask = causal_mask(len(slots), len(slots), hidden.dtype, hidden.device).masked_fill(
            padding[:, None, None], -torch.inf
        )
        for block in layers:
            hidden = self._run(block, hidden, mask)
        first = hidden.gather(1, (lengths - 1).unsqueeze(2).expand(-1, 1, hidden.shape[2]))
        return torch.cat([first, hidden[:, prompt_length:]], dim=1)

    def _run(self, block: Block, hidden: Tensor, mask: Tensor, first: int = 0) -> Tensor:
        """Hidden states (n, S - first, D) after a block, of those (n, S, D) before it."""
        if not self.checkpointed or not torch.is_grad_enabled():
            return _block(block, hidden, mask, first)
        ran: Tensor = checkpoint(_block, block, hidden, mask, first, use_reentrant=False, preserve_rng_state=False)
        return ran


def _block(block: Block, hidden: Tensor, mask: Tensor, first: int) -> Tensor:
    queries, seen = block.project(hidden)
    if not first:
        return block.finish(hidden, attend(queries, seen, mask, block.heads))
    return block.finish(hidden[:, first:], attend(queries[:, first:], seen, mask[first:], block.heads))
