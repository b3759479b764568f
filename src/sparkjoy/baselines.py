"""From rewards to advantages: U = reward − baseline.

Rewards come as reward functions return them: a tensor of any real dtype, an array or a list, bool and integers too.
Statistics are computed in float64, whatever torch's default is; advantages are float64 where a tensor or an array of
rewards is, else float32 (torch's default if that is float64). Rewards of a group that are equal up to rounding, within
4 units in the last place of float32 (float64 for float64, and for lists of what float32 does not hold), are equal:
their advantages are exact zeros. A mean would leave about 1e-8 there, which a gate would rank and a standard deviation
would blow up to full size. The steps of a coarser dtype, such as bfloat16's, are differences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparkjoy import checks
from sparkjoy.checks import as_tensor

Rewards = Tensor | Sequence[Any] | np.ndarray[Any, Any]
"""What reward functions return: bool, integers or floats."""


def group_mean_advantage(rewards: Rewards, group_size: int | None = None) -> Tensor:
    """Advantage over the mean of the group, U_i = r_i − mean(r of i's group).

    >>> group_mean_advantage(torch.tensor([1.0, 0.0, 1.0, 1.0]), group_size=2)
    tensor([ 0.5000, -0.5000,  0.0000,  0.0000])

    Args:
        rewards: (B,) tensor, array or list, the answers of one prompt beside one another.
        group_size: answers per prompt; B must be a multiple of it. None: the whole batch is one group.

    Returns:
        (B,), exactly 0 where all rewards of the group are equal up to rounding.

    Raises:
        ValueError: `rewards` not (B,), empty, no numbers, NaN or infinite, or not a whole number of groups.
    """
    given = as_tensor("rewards", rewards)
    groups = _groups(given, group_size)
    return centred(groups, _rounding(given)).flatten().to(float_dtype(rewards, given))


def leave_one_out_advantage(rewards: Rewards, group_size: int | None = None) -> Tensor:
    """Advantage over the mean of the group's others, U_i = (r_i − mean(r)) · n / (n − 1) (RLOO, arXiv 2402.14740).

    >>> leave_one_out_advantage(torch.tensor([1.0, 0.0, 0.0]))
    tensor([ 1.0000, -0.5000, -0.5000])

    Args:
        rewards: (B,) tensor, array or list, the answers of one prompt beside one another.
        group_size: answers per prompt, at least 2. None: the whole batch is one group.

    Returns:
        (B,), exactly 0 where all rewards of the group are equal up to rounding.

    Raises:
        ValueError: as `group_mean_advantage`, or groups of one.
    """
    given = as_tensor("rewards", rewards)
    groups = _groups(given, group_size, "a group of 1 has no others; leave_one_out_advantage needs")
    size = groups.shape[1]
    return (centred(groups, _rounding(given)) * (size / (size - 1))).flatten().to(float_dtype(rewards, given))


def group_standardised_advantage(rewards: Rewards, group_size: int | None = None) -> Tensor:
    """GRPO's advantage, U_i = (r_i − mean(r)) / sd(r) within the group (arXiv 2402.03300).

    The rarer a success in its group, the larger: one in n answers gets (n − 1)/√n. Gate on `group_mean_advantage` where
    that should not decide.

    >>> group_standardised_advantage(torch.tensor([1.0, 0.0, 0.0]))
    tensor([ 1.1547, -0.5774, -0.5774])

    Args:
        rewards: (B,) tensor, array or list, the answers of one prompt beside one another.
        group_size: answers per prompt, at least 2. None: the whole batch is one group.

    Returns:
        (B,), exactly 0 where all rewards of the group are equal up to rounding.

    Raises:
        ValueError: as `group_mean_advantage`, or groups of one.
    """
    given = as_tensor("rewards", rewards)
    groups = _groups(given, group_size, "a group of 1 has no spread; group_standardised_advantage needs")
    centred_rewards = centred(groups, _rounding(given))
    spread = centred_rewards.std(dim=1, keepdim=True).clamp(min=torch.finfo(groups.dtype).tiny)
    return (centred_rewards / spread).flatten().to(float_dtype(rewards, given))


def precise(values: Tensor) -> Tensor:
    """`values` in float64, or in float32 on Apple's GPUs, which have no float64."""
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)


def centred(groups: Tensor, rounding: float, size: Tensor | None = None) -> Tensor:
    """Each row of `groups` less its mean; exactly 0 where its values are equal up to rounding.

    >>> centred(torch.tensor([[1.0, 0.0], [0.3, 0.1 + 0.2]]).double(), torch.finfo(torch.float64).eps)
    tensor([[ 0.5000, -0.5000],
            [ 0.0000,  0.0000]], dtype=torch.float64)

    Args:
        groups: (G, n), as `precise` gives them.
        rounding: relative size of the last digit that values were computed to; four of them make no difference.
        size: (G, n) what that is relative to, for sums of larger terms; None: the values themselves.
    """
    least, most = groups.aminmax(dim=1, keepdim=True)
    largest = most.abs() if size is None else size.amax(dim=1, keepdim=True)  # the least's too, where they are equal
    equal = most - least <= largest * (4 * rounding)
    return (groups - groups.mean(dim=1, keepdim=True)).masked_fill(equal, 0)


def _groups(rewards: Tensor, group_size: int | None, alone: str | None = None) -> Tensor:
    """(G, n) in float64, checked; `alone` says what groups of one lack, where they are refused."""
    if rewards.dim() != 1 or len(rewards) == 0:
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}; expected (B,) with at least one reward.")
    size = len(rewards) if group_size is None else checks.whole("group_size", group_size)
    if len(rewards) % size:
        raise ValueError(f"group_size is {size}, which does not divide the {len(rewards)} rewards into whole groups.")
    if alone is not None and size < 2:
        raise ValueError(f"{alone} a group_size of at least 2.")
    groups = precise(rewards)
    checks.finite("rewards", groups, " Score such an answer, or leave its group out.")
    return groups.view(-1, size)


def _rounding(rewards: Tensor) -> float:
    coarse = rewards.is_floating_point() and rewards.dtype != torch.float64
    return torch.finfo(torch.float32 if coarse else torch.float64).eps


def float_dtype(rewards: Rewards, given: Tensor) -> torch.dtype:
    """That of advantages: float32 at least, and of whole numbers and lists torch's default."""
    own = given.is_floating_point() and isinstance(rewards, Tensor | np.ndarray)
    return torch.promote_types(given.dtype, torch.float32) if own else checks.at_least_float32()
