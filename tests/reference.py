"""Slow, obvious versions of what the engine does, for tests and benchmarks to compare with."""

import torch
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


class CausalModel:
    """A transformer of two layers in float64, told who attends to whom."""

    def __init__(self, vocabulary=5, columns=10, width=6):
        drawn = torch.Generator().manual_seed(0)

        def weights(*shape):
            return torch.randn(*shape, generator=drawn, dtype=torch.float64)

        self.tokens, self.columns, self.head = (
            weights(vocabulary, width),
            weights(columns, width),
            weights(width, vocabulary),
        )
        self.layers = [[weights(width, width) for _ in range(3)] for _ in range(2)]

    def __call__(self, ids, positions, sees):
        """(R, N, V) log-probs of what follows each of `ids` (R, N), of which `sees` (R, N, N) others."""
        states = self.tokens[ids] + self.columns[positions]
        for query, key, value in self.layers:
            scores = (states @ query) @ (states @ key).mT
            states = states + scores.masked_fill(~sees, -torch.inf).softmax(-1) @ (states @ value)
        return (states @ self.head).log_softmax(-1)

    def of_rows(self, ids, mask, window=None, positions=None):
        """(n, T) log-probs of each token after those before it in its row, by a mask of padding; 0 for the first."""
        columns = torch.arange(ids.shape[1])
        distance = columns[:, None] - columns[None, :]
        sees = (distance >= 0) & (distance < (window or len(columns))) & mask.bool()[:, None, :]
        sees = sees | (~sees.any(-1, keepdim=True) & (distance == 0))
        positions = columns.expand_as(ids) if positions is None else positions
        log_probs = self(ids, positions, sees)[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
        return torch.nn.functional.pad(log_probs, (1, 0))
