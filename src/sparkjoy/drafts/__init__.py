"""Decide on cheaper log-probs than the policy's own: what a `Draft` proposes, and an `Audit` of how good that is."""

from sparkjoy.drafts.audit import Audit as Audit
from sparkjoy.drafts.draft import Draft as Draft

__all__ = ["Audit", "Draft"]
