"""sparkjoy: policy gradients that pay for a backward pass only where a sample is worth it."""

from sparkjoy.baselines import group_mean_advantage as group_mean_advantage
from sparkjoy.baselines import group_standardised_advantage as group_standardised_advantage
from sparkjoy.baselines import leave_one_out_advantage as leave_one_out_advantage
from sparkjoy.draft import Draft as Draft
from sparkjoy.frontier import Frontier as Frontier
from sparkjoy.frontier import frontier as frontier
from sparkjoy.gates import BudgetGate as BudgetGate
from sparkjoy.gates import Decision as Decision
from sparkjoy.gates import Gate as Gate
from sparkjoy.gates import KondoGate as KondoGate
from sparkjoy.gates import SoftGate as SoftGate
from sparkjoy.gates import UnbiasedGate as UnbiasedGate
from sparkjoy.losses import clipped as clipped
from sparkjoy.losses import delightful as delightful
from sparkjoy.losses import reinforce as reinforce
from sparkjoy.scores import delight as delight
from sparkjoy.scores import sequence_delight as sequence_delight
from sparkjoy.scores import surprisal as surprisal
from sparkjoy.scores import update_size as update_size
from sparkjoy.selecting import select as select
from sparkjoy.step.backward import GatedBackward as GatedBackward
from sparkjoy.step.backward import gated_backward as gated_backward
from sparkjoy.step.packing import TrimRight as TrimRight
from sparkjoy.step.report import BackwardReport as BackwardReport

__all__ = [
    "BackwardReport",
    "BudgetGate",
    "Decision",
    "Draft",
    "Frontier",
    "Gate",
    "GatedBackward",
    "KondoGate",
    "SoftGate",
    "TrimRight",
    "UnbiasedGate",
    "clipped",
    "delight",
    "delightful",
    "frontier",
    "gated_backward",
    "group_mean_advantage",
    "group_standardised_advantage",
    "leave_one_out_advantage",
    "reinforce",
    "select",
    "sequence_delight",
    "surprisal",
    "update_size",
]
__version__ = "0.1.0"
