"""Gates: keep or skip. A guided tour.

- `decision.py`: what a gate is and decides. Start here.
- `kondo.py`: KondoGate, the papers' hard gate: the best by rate, or all above a price.
- `unbiased.py`: UnbiasedGate, the noise budget: keeps at random and weights, so that the dense gradient is its mean.
- `soft.py`: SoftGate, the Kondo gate at a temperature.
- `budget.py`: BudgetGate, which holds the average cost in tokens.

A new gate is a callable `gate(score, cost=None) -> Decision` about N samples. Nothing is registered: give it to
`sj.GatedBackward`, `sj.select` or `sj.frontier`.

>>> import torch, sparkjoy as sj
>>> def best_half(score, cost=None):
...     keep = score >= score.median()
...     return sj.Decision(keep, price=None, probability=keep.to(score.dtype), weight=torch.ones_like(score))
>>> sj.select(best_half, torch.tensor([1.0, -1.0, 2.0, 0.5]), torch.full((4,), -1.0)).rows.tolist()
[0, 2, 3]

**What it gets.** `score` (N,): finite floats without a graph, the delight of each row (for a weighted gate the signed
size of its gradient). A row that teaches nothing (advantage 0 at every token) has score 0 and is never kept, whatever
the gate says. `cost` (N,): what each row costs, or None where no mask was given and all cost the same: valid tokens in
the engine and in `sj.select`; in trainers the prompt's too, with shared tokens each divided by the rows that have it.
To go by an answer's length give a score, not the cost: `sparkjoy.scores.advantage_size` is |U| √tokens.

**What it must say**, in a `Decision`: `keep`, a bool for each row. `probability`, with which a row was kept: 1 or 0
for a hard gate. `weight`, what a kept row's term is multiplied by: 1, unless the gate draws at random and corrects for
it. `price`: the threshold it applied, for the log; None is fine.

**What it may say** of itself, as attributes; each is left out at a cost only:

- `rule`, a `sparkjoy.signs.Rule`: the gate keeps the greatest scores, up to a quota or above a floor. The signs of the
  advantages then decide what they can, and fewer rows need log-probs. Left out: every row that teaches something is
  looked at.
- `weighted = True`: the weights make up for what is skipped. The gate is then asked about sizes instead of delights,
  and `sj.frontier` may recommend it. `weighted = False`: all weights are 1. Left out: weights are used, nothing else
  follows.
- `learn(added, own, expected_added, expected_own)`, for a weighted gate: told after each step what its draws really
  added (`sparkjoy.noise.noise_sums`).
- `state_dict()` and `load_state_dict(state)`, where it remembers anything. They go into `GatedBackward`'s own, and so
  into checkpoints. `load_state_dict` refuses another kind's state before it changes anything (`sparkjoy.states.check`).
- `__repr__` with its options: `sj.frontier` prints it, and several processes compare it to be sure that they agree.

The library's gates are not for subclassing: what they say would be untrue of another `__call__`. Hold one, and call it.

**Several processes** make one decision: the gate sees the rows of all of them, so it should not count on its own
process's batch.

**Where it is tested.** tests/test_tour.py has a whole gate with memory in under 40 lines, and what to check: its
gradient is the masked full batch's, `sj.select` decides as the engine does, a resumed run decides as an unbroken one. A
gate of the library belongs into the table at the top of tests/step/test_backward.py too.
"""

from sparkjoy.gates.budget import BudgetGate as BudgetGate
from sparkjoy.gates.decision import Decision as Decision
from sparkjoy.gates.decision import Gate as Gate
from sparkjoy.gates.kondo import KondoGate as KondoGate
from sparkjoy.gates.soft import SoftGate as SoftGate
from sparkjoy.gates.unbiased import UnbiasedGate as UnbiasedGate

__all__ = ["BudgetGate", "Decision", "Gate", "KondoGate", "SoftGate", "UnbiasedGate"]
