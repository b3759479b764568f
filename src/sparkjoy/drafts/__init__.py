"""Cheaper sources of log-probs to decide on than the policy's own forward pass: each `rows -> log-probs`, no graph.

Give one to `Draft`, and that to `GatedBackward`. `docs/screening.md` says which to use when.
"""

from sparkjoy.drafts.advantage_only import AdvantageOnly as AdvantageOnly
from sparkjoy.drafts.audit import Audit as Audit
from sparkjoy.drafts.cached import CachedLogProbs as CachedLogProbs
from sparkjoy.drafts.distilled import DistilledDraft as DistilledDraft
from sparkjoy.drafts.precision import LowerPrecision as LowerPrecision
from sparkjoy.drafts.stale import StaleWeights as StaleWeights

__all__ = ["AdvantageOnly", "Audit", "CachedLogProbs", "DistilledDraft", "LowerPrecision", "StaleWeights"]
