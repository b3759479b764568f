"""Gates and scores as users write them, each saying of itself what it is."""

import torch

from sparkjoy import Decision
from sparkjoy.signs import Rule


class BestOfAll:
    """The greatest scores up to a quota, like `KondoGate(rate=)`, in a user's own words."""

    weighted = False

    def __init__(self, rate, says_its_rule=True):
        self.rule = Rule(rate=rate) if says_its_rule else None
        self.rate = rate

    def __call__(self, score, cost=None):
        count = Rule(rate=self.rate).quota(len(score))
        keep = torch.zeros_like(score, dtype=torch.bool)
        keep[score.sort(descending=True, stable=True).indices[:count]] = True
        keep &= score != 0
        ones = torch.ones_like(score)
        return Decision(keep, None, keep.to(score.dtype), ones)


def my_delight(advantages, log_probs):
    return -(advantages if advantages.shape == log_probs.shape else advantages[:, None]) * log_probs.detach()


my_delight.sign_of_advantage = True
