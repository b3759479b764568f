"""Cheaper sources of log-probs to decide on than the policy's own forward pass: each `rows -> log-probs`, no graph.

Give one to `SpeculativeBackward`. `docs/screening.md` says which to use when.
"""

from sparkjoy.screeners.cached import CachedLogProbs as CachedLogProbs
from sparkjoy.screeners.distilled import DistilledDraft as DistilledDraft
from sparkjoy.screeners.precision import LowerPrecision as LowerPrecision
from sparkjoy.screeners.shallow import EarlyExit as EarlyExit
from sparkjoy.screeners.shallow import Flat as Flat
from sparkjoy.screeners.stale import StaleWeights as StaleWeights

__all__ = ["CachedLogProbs", "DistilledDraft", "EarlyExit", "Flat", "LowerPrecision", "StaleWeights"]
