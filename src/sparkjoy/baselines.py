"""From rewards to advantages: U = reward − baseline.

Each function returns exact zeros where all rewards of a group are equal. A float mean would leave about 1e-8 there, and
a gate could not see that such rows teach nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor


def group_mean_advantage(rewards: Tensor, group_size: int | None = None) -> Tensor:
    """Advantage over the mean of the group, U_i = r_i − mean(r of i's group).

    >>> group_mean_advantage(torch.tensor([1.0, 0.0, 1.0, 1.0]), group_size=2)
    tensor([ 0.5000, -0.5000,  0.0000,  0.0000])

    Args:
        rewards: (B,), the answers of one prompt beside one another.
        group_size: answers per prompt; B must be a multiple of it. None: the whole batch is one group.

    Returns:
        (B,), exactly 0 where all rewards of the group are equal.

    Raises:
        ValueError: `rewards` not (B,), empty, or not a whole number of groups.
    """
    groups = _groups(rewards, group_size)
    return _zero_where_equal(groups, groups - groups.mean(dim=1, keepdim=True))


def leave_one_out_advantage(rewards: Tensor, group_size: int | None = None) -> Tensor:
    """Advantage over the mean of the group's others, U_i = (r_i − mean(r)) · n / (n − 1) (RLOO, arXiv 2402.14740).

    >>> leave_one_out_advantage(torch.tensor([1.0, 0.0, 0.0]))
    tensor([ 1.0000, -0.5000, -0.5000])

    Args:
        rewards: (B,), the answers of one prompt beside one another.
        group_size: answers per prompt, at least 2. None: the whole batch is one group.

    Returns:
        (B,), exactly 0 where all rewards of the group are equal.

    Raises:
        ValueError: as `group_mean_advantage`, or groups of one.
    """
    groups = _groups(rewards, group_size)
    size = groups.shape[1]
    if size < 2:
        raise ValueError("a group of 1 has no others; leave_one_out_advantage needs a group_size of at least 2.")
    return _zero_where_equal(groups, (groups - groups.mean(dim=1, keepdim=True)) * (size / (size - 1)))


def group_standardised_advantage(rewards: Tensor, group_size: int | None = None) -> Tensor:
    """GRPO's advantage, U_i = (r_i − mean(r)) / sd(r) within the group (arXiv 2402.03300).

    The rarer a success in its group, the larger: one in n answers gets (n − 1)/√n. Gate on `group_mean_advantage` where
    that should not decide.

    >>> group_standardised_advantage(torch.tensor([1.0, 0.0, 0.0]))
    tensor([ 1.1547, -0.5774, -0.5774])

    Args:
        rewards: (B,), the answers of one prompt beside one another.
        group_size: answers per prompt, at least 2. None: the whole batch is one group.

    Returns:
        (B,), exactly 0 where all rewards of the group are equal.

    Raises:
        ValueError: as `group_mean_advantage`, or groups of one.
    """
    groups = _groups(rewards, group_size)
    if groups.shape[1] < 2:
        raise ValueError("a group of 1 has no spread; group_standardised_advantage needs a group_size of at least 2.")
    centred = groups - groups.mean(dim=1, keepdim=True)
    spread = groups.std(dim=1, keepdim=True).clamp(min=torch.finfo(groups.dtype).tiny)
    return _zero_where_equal(groups, centred / spread)


def good_and_bad_advantage(advantages: Tensor, alpha: float = 0.5) -> Tensor:
    """PMPO's weights as advantages: αB/n₊ on the n₊ good answers, −(1 − α)B/n₋ on the n₋ bad ones (arXiv 2410.04166).

    Averaged over the batch, −U log π is then PMPO's loss: −α times the mean log-prob of the good answers plus (1 − α)
    times that of the bad ones. How good or bad they were no longer counts.

    >>> good_and_bad_advantage(torch.tensor([0.9, 0.1, 0.0, -0.3]))
    tensor([ 1.,  1.,  0., -2.])

    Args:
        advantages: (B,); above 0 is good, below 0 bad.
        alpha: weight of the good ones, in [0, 1].

    Raises:
        ValueError: `advantages` not (B,) or not finite, or `alpha` outside [0, 1].
    """
    if advantages.dim() != 1:
        raise ValueError(f"advantages has shape {tuple(advantages.shape)}; expected (B,).")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; expected a number in [0, 1].")
    if not bool(advantages.isfinite().all()):
        raise ValueError("advantages has a value that is NaN or infinite; expected finite numbers.")
    good, bad = (advantages > 0).to(advantages), (advantages < 0).to(advantages)
    of_good, of_bad = good / good.sum().clamp(min=1), bad / bad.sum().clamp(min=1)
    return len(advantages) * (alpha * of_good - (1 - alpha) * of_bad)


def expected_confidence_advantage(rewards: Tensor, probabilities: Tensor) -> Tensor:
    """Advantage over the expected confidence, U = r − Σ_a π(a|s)² (arXiv 2603.14608).

    The baseline is the probability that two draws from the policy agree. It needs no label and no second sample, and
    tracks how sure the policy is; it suits rewards of 1 for the right action and 0 otherwise.

    >>> expected_confidence_advantage(torch.tensor([1.0, 0.0]), torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    tensor([ 0.5000, -1.0000])

    Args:
        rewards: (B,).
        probabilities: (B, K), the policy's over all K actions.

    Returns:
        (B,).

    Raises:
        ValueError: shapes that do not go together.
    """
    if rewards.dim() != 1 or probabilities.dim() != 2 or len(rewards) != len(probabilities):
        raise ValueError(
            f"rewards has shape {tuple(rewards.shape)} and probabilities {tuple(probabilities.shape)}; expected (B,) "
            "and (B, K)."
        )
    return rewards - probabilities.detach().square().sum(dim=1)


def _groups(rewards: Tensor, group_size: int | None) -> Tensor:
    if rewards.dim() != 1 or len(rewards) == 0:
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}; expected (B,) with at least one reward.")
    size = len(rewards) if group_size is None else group_size
    if size < 1 or len(rewards) % size:
        raise ValueError(f"group_size is {size}, which does not divide the {len(rewards)} rewards into whole groups.")
    return (rewards if rewards.is_floating_point() else rewards.to(torch.get_default_dtype())).view(-1, size)


def _zero_where_equal(groups: Tensor, advantages: Tensor) -> Tensor:
    equal = (groups == groups[:, :1]).all(dim=1, keepdim=True)
    return advantages.masked_fill(equal, 0).flatten()
