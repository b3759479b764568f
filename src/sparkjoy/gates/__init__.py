"""Gates: keep or skip. A guided tour.

`decision.py`  what a gate is and decides            <- start here
`kondo.py`     KondoGate, the papers' hard gate: the best by rate, or all above a price
`unbiased.py`  UnbiasedGate, the noise budget: keeps at random and weights, so that the expected gradient is the dense
one `soft.py`      SoftGate, the Kondo gate at a temperature
`budget.py`    BudgetGate, which holds the average cost in tokens

A new gate is a new class, or any callable `gate(score, cost=None) -> Decision` about N samples. What it may say of
itself:

- `rule`, a `sparkjoy.signs.Rule`: it is hard, and signs may decide for it what they can; the engine then looks at fewer
  rows. None, the default: the engine looks at every row that teaches something.
- `weighted`: True if `Decision.weight` makes up for what is skipped; it is then asked about sizes instead of delights.
  False if all weights are 1. Left out, its weights are used and nothing else follows.
- `learn(noise)`, for a weighted gate: told after each step what its draws really added.
- `state_dict` and `load_state_dict`, where it remembers anything.

A subclass with a `__call__` of its own says these anew. A gate belongs into the table at the top of
tests/engine/test_backward.py, where its gradient is compared with the masked full batch.
"""

from sparkjoy.gates.budget import BudgetGate as BudgetGate
from sparkjoy.gates.decision import Decision as Decision
from sparkjoy.gates.decision import Gate as Gate
from sparkjoy.gates.kondo import KondoGate as KondoGate
from sparkjoy.gates.soft import SoftGate as SoftGate
from sparkjoy.gates.unbiased import UnbiasedGate as UnbiasedGate

__all__ = ["BudgetGate", "Decision", "Gate", "KondoGate", "SoftGate", "UnbiasedGate"]
