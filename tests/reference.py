"""Slow, obvious versions of what the engine does, for tests and benchmarks to compare with."""

import torch
import torch.nn.functional as F
from torch import Tensor


def keep_by_rate(scores: list[float], rate: float) -> list[bool]:
    """The ⌈ρN⌉ greatest scores other than 0, the earlier of equals first."""
    count = -int(-(rate * len(scores) - 1e-9) // 1)
    ranked = sorted((i for i, score in enumerate(scores) if score != 0), key=lambda i: (-scores[i], i))
    return [i in ranked[:count] for i in range(len(scores))]


def keep_by_price(scores: list[float], price: float) -> list[bool]:
    return [score > price and score != 0 for score in scores]


def masked_gradient(log_prob_fn, loss, batch, advantages, mask, keep, weight, denominator, parameters) -> list[Tensor]:
    """The full batch's gradient with skipped rows multiplied by zero: what research code does, and pays for."""
    log_probs = log_prob_fn(batch)
    expanded = advantages if advantages.shape == log_probs.shape else advantages.unsqueeze(1).expand_as(log_probs)
    terms = loss(log_probs, expanded, None, mask)
    row_weight = keep.to(terms) * weight.to(terms)
    terms = terms * (row_weight.unsqueeze(1) if terms.dim() == 2 else row_weight)
    if mask is not None:
        terms = terms * mask
    return list(torch.autograd.grad(terms.sum() / denominator, parameters))


@torch.no_grad()
def plain_sample(policy, prompts, answers_per_prompt, answer_length, generator=None):
    """The plain cached loop: a copy of the prompt per answer, a growing cache, one multinomial draw per token."""
    tokens = prompts.repeat_interleave(answers_per_prompt, 0)
    caches = [None] * len(policy.blocks)
    seen = 0
    answers, log_probs = [], []
    for _ in range(answer_length):
        hidden = policy.embed(tokens, torch.arange(seen, seen + tokens.shape[1]))
        for index, block in enumerate(policy.blocks):
            queries, seen_now = block.project(hidden)
            heads = [part.unflatten(2, (block.heads, -1)).transpose(1, 2) for part in (queries, *seen_now.chunk(2, 2))]
            queries, keys, values = heads
            if caches[index] is not None:
                keys = torch.cat([caches[index][0], keys], dim=2)
                values = torch.cat([caches[index][1], values], dim=2)
            caches[index] = (keys, values)
            attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=seen == 0)
            hidden = block.finish(hidden, attended.transpose(1, 2).flatten(2))
        seen += tokens.shape[1]
        every = policy.head(policy.norm(hidden[:, -1])).log_softmax(dim=1)
        tokens = torch.multinomial(every.exp(), 1, generator=generator)
        answers.append(tokens)
        log_probs.append(every.gather(1, tokens))
    return torch.cat(answers, dim=1), torch.cat(log_probs, dim=1)
