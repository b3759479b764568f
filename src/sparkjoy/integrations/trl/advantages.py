"""What a hard gate ranks by: the loss's advantages, or those with the division by their group's spread undone."""

from __future__ import annotations

import torch
from torch import Tensor
from trl.trainer.utils import nanstd

from sparkjoy import signs
from sparkjoy.baselines import centred, precise

STABILISER = 1e-4
"""What TRL adds to a standard deviation before it divides by it."""


def centred_advantages(rewards_per_func: Tensor, weights: Tensor, group_size: int) -> Tensor:
    """Weighted reward less its group's mean; 0 where the group's are equal up to float32's rounding, or there is none.

    >>> centred_advantages(torch.tensor([[1.0], [0.0], [2.0], [2.0]]), torch.ones(1), group_size=2)
    tensor([ 0.5000, -0.5000,  0.0000,  0.0000])

    Args:
        rewards_per_func: (N, F); NaN where a reward function gave none.
        weights: (F,).
        group_size: completions of a prompt, which stand beside one another.

    Returns:
        (N,)
    """
    terms = precise(rewards_per_func) * precise(weights)
    unscored = terms.isnan().all(dim=1).view(-1, group_size)
    groups = terms.nansum(dim=1).view(-1, group_size).masked_fill(unscored, torch.nan)
    scored = groups.where(~unscored, groups.nanmean(dim=1, keepdim=True))
    size = terms.abs().nansum(dim=1).view(-1, group_size)
    advantages = centred(scored, torch.finfo(torch.float32).eps, size).masked_fill(unscored, 0)
    return advantages.flatten().to(rewards_per_func.dtype)


def from_rewards(
    rewards_per_func: Tensor, weights: Tensor, group_size: int, scale_rewards: str, aggregation: str
) -> Tensor:
    """(N,) advantages as TRL computes them, to tell whether those of a batch are of these rewards.

    >>> rewards = torch.tensor([[1.0], [0.0], [2.0], [2.0]])
    >>> from_rewards(rewards, torch.ones(1), 2, "none", "sum_then_normalize")
    tensor([ 0.5000, -0.5000,  0.0000,  0.0000])

    Args:
        rewards_per_func: (N, F); NaN where a reward function gave none.
        weights: (F,).
        group_size: completions of a prompt, which stand beside one another.
        scale_rewards: TRL's option, "group", "batch" or "none".
        aggregation: TRL's `multi_objective_aggregation`.
    """
    unscored, of_batch = rewards_per_func.isnan().all(dim=1), aggregation == "normalize_then_sum"
    if of_batch:
        grouped = rewards_per_func.view(-1, group_size, rewards_per_func.shape[1])
        spread = nanstd(grouped, dim=1, keepdim=True) + STABILISER
        rewards_per_func = ((grouped - grouped.nanmean(dim=1, keepdim=True)) / spread).flatten(0, 1)
    rewards = (rewards_per_func * weights).nansum(dim=1).masked_fill(unscored, torch.nan)
    groups = rewards.view(-1, len(rewards) if of_batch else group_size)
    advantages = groups - groups.nanmean(dim=1, keepdim=True)
    if of_batch or scale_rewards != "none":
        spread = nanstd(rewards) if scale_rewards == "batch" else nanstd(groups, dim=1, keepdim=True)
        advantages = advantages / (spread + STABILISER)
    return advantages.nan_to_num(nan=0.0).flatten()


def of_the_gate(
    own: Tensor,
    rewards_per_func: Tensor | None,
    weights: Tensor,
    group_size: int,
    scale_rewards: str,
    aggregation: str,
) -> tuple[Tensor, bool]:
    """The loss's advantages, exactly 0 where a group's rewards are equal up to rounding; centred, where they can be.

    Rewards count only for rows whose advantage they give: a trainer may have answered groups anew, put remembered ones
    in their place, or shaped the advantages.

    Args:
        own: (N,), the loss's.
        rewards_per_func: (N, F), those last seen; None, or of another length, where they are not of this batch.

    Returns:
        (N,) to rank by, and whether it is reward less its group's mean.
    """
    if rewards_per_func is None or len(rewards_per_func) != len(own) or len(own) % group_size:
        return own, False
    rewards_per_func, weights = rewards_per_func.to(own), weights.to(own)
    expected = from_rewards(rewards_per_func, weights, group_size, scale_rewards, aggregation)
    given = torch.isclose(own, expected, rtol=1e-4, atol=1e-6)
    if aggregation == "sum_then_normalize":
        ranks = centred_advantages(rewards_per_func, weights, group_size)
        if bool((given | (own == 0)).all()):
            return ranks, True
        silent = ranks == 0
    else:
        columns, one = rewards_per_func.split(1, dim=1), torch.ones_like(weights[:1])
        alone = [centred_advantages(column, one, group_size) for column in columns]
        silent = (torch.stack(alone) == 0).all(dim=0)
    return own.masked_fill(silent & given, 0), False


def worth(advantages: Tensor, own_advantages: Tensor, mask: Tensor) -> Tensor:
    """(B,) what tells a row's sign: its advantage to the gate, 0 where it has no token or the loss no term.

    Args:
        advantages: (B,) or (B, T), those the gate ranks by.
        own_advantages: (B,) or (B, T), those of the loss.
        mask: (B, T), 1 for tokens that the loss has a term of.
    """
    teaches = (own_advantages.reshape(len(mask), -1) * mask != 0).any(dim=1)
    return signs.worth(advantages, mask).where(teaches, 0)


def other_score(name: str, worth: Tensor, generator: torch.Generator) -> Tensor:
    """The scores that need no log-probs, (N,): "advantage", "absolute-advantage", "uniform"; 0 stays 0."""
    if name == "advantage":
        return worth
    if name == "absolute-advantage":
        return worth.abs()
    uniform = torch.rand(len(worth), generator=generator)
    return signs.with_sign(uniform, worth.abs()).where(worth != 0, 0)
