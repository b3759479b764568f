"""What a trainer's gate decides on: scores of rows, and for a noise budget sizes, how far each moves the policy.

Gradients of different tokens point different ways, so their lengths add as squares: a row of four times the tokens
moves the policy twice as far. A plain sum overrates long rows, and short ones then add more noise than was asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparkjoy.losses import delightful_weight
from sparkjoy.scores import ScoreFunction, per_row
from sparkjoy.signs import worth
from sparkjoy.step.deciding import row_scores
from sparkjoy.step.inputs import check_inputs

LEAST_DOUBT = 0.01
"""The least 1 - π of a token: the policy may have moved since, and no row with a term may have next to no size."""

LEAST_PULL = 0.1
"""The least that a KL term is taken to pull a token by: a policy that is still its reference is not for long."""

DIVIDES_BY_LENGTH = ("grpo", "sapo")


def score_of_rows(score: ScoreFunction, advantages: Tensor, log_probs: Tensor, mask: Tensor) -> Tensor:
    """(B,) the score of rows (B, T), summed over the tokens that count; a delight has the advantage's sign, always."""
    return row_scores(score, check_inputs({}, advantages, log_probs, None, mask, looks=False), log_probs)


@dataclass(frozen=True)
class RowSize:
    """The size of a row: √Σ_t c_t² (1 - π_t)², where the loss has c_t times the gradient of log π_t.

    Args:
        by_length: whether the loss divides a row by its length. What it divides all rows by does not matter.
        beta: the KL term's weight.
        entropy_coef: the entropy bonus's.
        dg: None, or the unit of the delightful weight.
        dg_temperature: its temperature.
    """

    by_length: bool
    beta: float = 0.0
    entropy_coef: float = 0.0
    dg: Literal["token", "sample"] | None = None
    dg_temperature: float = 1.0

    def __call__(
        self,
        advantages: Tensor,
        log_probs: Tensor | None,
        mask: Tensor,
        ratio: Tensor | None = None,
        reference: Tensor | None = None,
    ) -> Tensor:
        """Sizes with the sign of the advantage, (B,); 0 only for a row without a term.

        Args:
            advantages: (B,) or (B, T), the loss's.
            log_probs: (B, T), exact or not; None: there are none, and each token counts the same.
            mask: (B, T), 1 for tokens that the loss counts.
            ratio: (B, T) or (B, 1), to the sampler's probability, which the loss multiplies by.
            reference: (B, T), log-probs of the KL term's reference.
        """
        valid = mask.bool()
        advantages = per_row(advantages, mask.to(advantages)).expand(mask.shape).where(valid, 0)
        pull = advantages.abs() * (1 if ratio is None else ratio)
        doubt: Tensor | float = 1.0
        if log_probs is not None:
            log_probs = log_probs.float().where(valid, 0).clamp(max=0)
            doubt = (-torch.expm1(log_probs)).clamp(min=LEAST_DOUBT)
            if self.dg is not None:
                pull = pull * delightful_weight(log_probs, advantages, mask, self.dg_temperature, self.dg)
        if self.beta:
            gap = torch.zeros_like(pull)
            if reference is not None and log_probs is not None:
                gap = -torch.expm1((reference.where(valid, 0) - log_probs).clamp(max=10))
            pull = pull + self.beta * gap.abs().clamp(min=LEAST_PULL)
        pull = pull + abs(self.entropy_coef)
        size = (pull * doubt).where(valid, 0).square().sum(dim=1).sqrt()
        length = valid.sum(dim=1).clamp(min=1) if self.by_length else 1
        return torch.copysign(size / length, worth(advantages))
