"""Cheaper sources of log-probs to decide on than the policy's own forward pass: each `rows -> log-probs`, no graph.

Give one to `sparkjoy.Draft`, and that to `GatedBackward`. docs/screening.md says which to use when.
"""

from sparkjoy_lab.drafts.advantage_only import AdvantageOnly as AdvantageOnly
from sparkjoy_lab.drafts.cached import CachedLogProbs as CachedLogProbs
from sparkjoy_lab.drafts.distilled import DistilledDraft as DistilledDraft
from sparkjoy_lab.drafts.precision import LowerPrecision as LowerPrecision
from sparkjoy_lab.drafts.stale import StaleWeights as StaleWeights

__all__ = ["AdvantageOnly", "CachedLogProbs", "DistilledDraft", "LowerPrecision", "StaleWeights"]
