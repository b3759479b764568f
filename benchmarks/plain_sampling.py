"""What a sampler is beside: a cache that grows by one token, as one writes it. For reversal_speed.py and tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparkjoy_lab.policies.transformer import Transformer


@torch.no_grad()
def plain_sample(
    policy: Transformer,
    prompts: Tensor,
    answers_per_prompt: int,
    answer_length: int,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """The plain cached loop: a copy of the prompt per answer, a growing cache, one multinomial draw per token."""
    tokens = prompts.repeat_interleave(answers_per_prompt, 0)
    caches: list[tuple[Tensor, Tensor] | None] = [None] * len(policy.layers)
    seen = 0
    answers, log_probs = [], []
    for _ in range(answer_length):
        hidden = policy.embed(tokens, torch.arange(seen, seen + tokens.shape[1]))
        for index, block in enumerate(policy.layers):
            queries, seen_now = block.project(hidden)
            heads = [part.unflatten(2, (block.heads, -1)).transpose(1, 2) for part in (queries, *seen_now.chunk(2, 2))]
            queries, keys, values = heads
            before = caches[index]
            if before is not None:
                keys, values = torch.cat([before[0], keys], dim=2), torch.cat([before[1], values], dim=2)
            caches[index] = (keys, values)
            attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=seen == 0)
            hidden = block.finish(hidden, attended.transpose(1, 2).flatten(2))
        seen += tokens.shape[1]
        every = policy.head(policy.norm(hidden[:, -1])).log_softmax(dim=1)
        tokens = torch.multinomial(every.exp(), 1, generator=generator)
        answers.append(tokens)
        log_probs.append(every.gather(1, tokens))
    return torch.cat(answers, dim=1), torch.cat(log_probs, dim=1)
