"""What the signs of the advantages decide alone: one rule for engine, drafts and trainers.

Surprisal is never negative, so a delight has the sign of its advantage. Convention: also where the surprisal is 0.
Only a row that teaches nothing has a score of 0, and a hard gate never keeps it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """What a hard gate does, as far as signs can tell. A gate that states its rule is spared needless forward passes.

    It keeps scores above the floor, at most the quota of them, the greatest first; of those the negative share is
    reserved for the most negative scores. It never keeps a score of 0, and draws nothing at random.

    >>> Rule(rate=0.03).quota(100), Rule(floor=0.0).quota(100)
    (3, None)

    Args:
        rate: ρ, keep at most ⌈ρN⌉; None: no quota.
        floor: keep only scores above it; None: negative scores too where positive ones are too few.
        negative_share: ς, of the kept, round(ςK) are of the most negative scores.
    """

    rate: float | None = None
    floor: float | None = None
    negative_share: float = 0.0

    @property
    def keeps_everything(self) -> bool:
        """Whether this is the plain, dense step: rate 1 without a floor."""
        return self.rate == 1 and self.floor is None

    def quota(self, total: int) -> int | None:
        """How many of `total` rows are kept at most; None: no rate."""
        return None if self.rate is None else rate_count(self.rate, total)

    def kept_by_sign(self, good: int, bad: int, total: int) -> tuple[int, int]:
        """How many positive and negative scores are kept of those that the floor leaves in the running.

        >>> Rule(rate=0.1, negative_share=0.25).kept_by_sign(good=50, bad=50, total=80)
        (6, 2)

        Args:
            good: positive scores above the floor.
            bad: negative scores; with a floor, those below minus the floor.
            total: all scores, N.
        """
        quota = self.quota(total)
        kept = total if quota is None else quota
        if self.floor is not None:
            kept = min(kept, round(good / (1 - self.negative_share)))
            bad = bad if self.negative_share > 0 else 0
        of_bad = min(bad, max(round(self.negative_share * kept), kept - good))
        return min(good, kept - of_bad), of_bad


Fate = bool | None
"""Of all rows of a sign: True kept, False skipped, None: their log-probs decide."""


def fates(rule: Rule | None, good: int, bad: int, total: int) -> tuple[Fate, Fate]:
    """What the signs alone decide about the rows of positive and of negative scores.

    >>> fates(Rule(rate=0.25), good=2, bad=1, total=4), fates(Rule(rate=0.5), good=2, bad=1, total=4)
    ((None, False), (True, False))

    Args:
        rule: the gate's; None: it has none, so every row that teaches is open.
        good: how many rows have a positive score.
        bad: how many have a negative one.
        total: all rows.
    """
    if rule is None:
        return None, None
    if rule.floor:  # how many pass it, scores tell; above 0 no negative one does
        quota = rule.quota(total)
        of_good = good if quota is None else min(good, quota)
        of_bad = bad if quota is None else min(bad, quota - of_good)
        of_bad = of_bad if rule.floor < 0 else bad * (rule.negative_share > 0)
    else:
        of_good, of_bad = rule.kept_by_sign(good, bad, total)
    good_passes, bad_passes = rule.floor is None or rule.floor <= 0, not rule.floor
    kept = None if of_good > 0 else False
    also = None if of_bad > 0 else False
    return True if of_good == good and good_passes else kept, True if of_bad == bad and bad_passes else also


def undecided(rule: Rule | None, worth: Tensor) -> Tensor:
    """(B,) bool, rows whose log-probs decide: their sign does not.

    >>> undecided(Rule(rate=0.25), torch.tensor([1.0, 2.0, -1.0, 0.0]))
    tensor([ True,  True, False, False])

    Args:
        rule: the gate's; None: it has none.
        worth: (B,), of the sign of each row's score, 0 where a row teaches nothing (see `worth`).
    """
    good, bad = worth > 0, worth < 0
    of_good, of_bad = fates(rule, int(good.count_nonzero()), int(bad.count_nonzero()), len(worth))
    return good * (of_good is None) | bad * (of_bad is None)


def worth(advantages: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B,) what has the sign of each row's score: its advantage; of advantages (B, T) the sum over valid tokens.

    Where the sum cancels it is the sum of sizes, so that only rows that teach nothing have 0. A row whose tokens'
    advantages differ in sign may have a score of either sign (see `mixed`).

    >>> worth(torch.tensor([[1.0, -1.0], [0.0, -2.0], [0.0, 0.0]]))
    tensor([ 2., -2.,  0.])

    Args:
        advantages: (B,) or (B, T).
        mask: (B, T), 1 for tokens that count; None: all.
    """
    if advantages.dim() == 1:
        return advantages if mask is None else advantages.where(mask.bool().any(dim=1), 0)
    valid = advantages if mask is None else advantages.where(mask.bool(), 0)
    total = valid.sum(dim=1)
    return torch.where(total == 0, valid.abs().sum(dim=1), total)


def mixed(advantages: Tensor) -> Tensor:
    """0-dim bool: whether a row has tokens of positive and of negative advantage, so that its sign decides nothing.

    >>> mixed(torch.tensor([[1.0, -1.0], [1.0, 1.0]]))
    tensor(True)

    Args:
        advantages: (B, T).
    """
    return ((advantages > 0).any(dim=1) & (advantages < 0).any(dim=1)).any()


def with_sign(score: Tensor, worth: Tensor) -> Tensor:
    """Scores (B,) of which only those of rows that teach nothing are 0: others get the least number of their sign.

    >>> with_sign(torch.tensor([0.0, 0.0, 0.5]), torch.tensor([1.0, 0.0, 1.0])) > 0
    tensor([ True, False,  True])
    """
    least = torch.finfo(score.dtype).tiny  # what is added to another number is lost in its rounding
    return torch.add(score, worth.sign().to(score.dtype), alpha=least)


def rate_count(rate: float, total: int) -> int:
    """How many of `total` a rate keeps: ⌈rate · total⌉, at least 1, forgiving the float product's last digits.

    >>> rate_count(0.03, 100), rate_count(0.1, 30), rate_count(0.001, 100)
    (3, 3, 1)
    """
    return max(1, math.ceil(rate * total - 1e-9))
