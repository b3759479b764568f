"""How near the gated gradient comes to the dense one, which is computed too, of the same rows, now and then a step.

One comparison is noise. What tells is whether the dense gradient says the same from comparison to comparison, and
whether the gated one says it too.
"""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparkjoy import states
from sparkjoy.engine.beside import WIDTH, Beside
from sparkjoy.engine.inputs import Inputs
from sparkjoy.engine.ledger import Ledger
from sparkjoy.engine.passes import HowToRun, Passes
from sparkjoy.engine.screening import LogProbFunction

WINDOW = 20
CONSISTENT = 0.6
FOLLOWED = 0.1


@dataclass(frozen=True)
class Comparison:
    """The gated gradient g of one step beside the dense one d: of the same rows, with all weights 1.

    Args:
        cosine: of g and d; None where one is 0 or not finite.
        relative_error: ‖g − d‖ / ‖d‖; None where d is 0 or not finite. Where rows do not agree, its square is near
            `report.noise` on average.
        norm_ratio: ‖g‖ / ‖d‖, likewise.
        consistency: of d over the last 20 comparisons: the mean inner product of two different ones over the mean
            squared length. 1: all the same; about 0: nothing but noise. None before there are 20.
        agreement: of g with d likewise, never of the same step: 0: nothing of what d says is in g.
        forward_rows: rows that ran for the comparison alone, on this process; `report.forward_rows` has none of them.
        backward_rows: likewise.
        seconds: host seconds of the comparison.
    """

    cosine: float | None
    relative_error: float | None
    norm_ratio: float | None
    consistency: float | None
    agreement: float | None
    forward_rows: int
    backward_rows: int
    seconds: float


class Comparisons:
    """When to compare, and what the last comparisons say together.

    Args:
        every: steps from one comparison to the next.
        instead: what the warning advises to set, as the user writes it.
    """

    def __init__(self, every: int, instead: str = "UnbiasedGate(noise=0.3)") -> None:
        self.every = every
        self._instead = instead
        self._steps = 0
        self._seen = 0
        self._window = torch.zeros(2, WINDOW, WIDTH)
        self._warned = False

    def due(self) -> bool:
        """Count a step; whether it is to be compared."""
        self._steps += 1
        return self._steps % self.every == 0

    def compared(
        self, sums: Tensor, sketches: Tensor, forward_rows: int, backward_rows: int, seconds: float
    ) -> Comparison:
        """One comparison, from `Beside`'s sums and sketches of all parameters; warns, once, if the gate surely hurts.

        >>> comparisons = Comparisons(every=1)
        >>> sketches = torch.zeros(2, WIDTH)
        >>> found = comparisons.compared(torch.tensor([4.0, 1.0, 2.0, 1.0]), sketches, 8, 8, 0.1)
        >>> found.cosine, found.relative_error, found.norm_ratio, found.consistency
        (1.0, 1.0, 2.0, None)
        """
        gated, dense, product, error = sums.tolist()
        cosine = relative = ratio = None
        if math.isfinite(gated + dense) and dense > 0:
            relative, ratio = math.sqrt(error / dense), math.sqrt(gated / dense)
            cosine = product / math.sqrt(gated * dense) if gated > 0 else None
            self._window[:, self._seen % WINDOW] = sketches
            self._seen += 1
        consistency, agreement = (None, None) if self._seen < WINDOW else _together(*self._window.double())
        if consistency is not None and agreement is not None and not self._warned:
            self._warned = consistency >= CONSISTENT and agreement < FOLLOWED * consistency
            if self._warned:
                warnings.warn(
                    f"the gated gradient does not follow the dense gradient: in the last {WINDOW} comparisons the "
                    f"dense one pointed much the same way (consistency {consistency:.2f}) and the gated one did not "
                    f"(agreement {agreement:.2f}). Unless the reward rises, set {self._instead}, whose mean gradient "
                    "is the dense one, or a higher rate.",
                    stacklevel=5,
                )
        return Comparison(cosine, relative, ratio, consistency, agreement, forward_rows, backward_rows, seconds)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to compare as an unbroken one would."""
        return {"steps": self._steps, "seen": self._seen, "window": self._window.clone(), "warned": self._warned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        shape = self._window.shape
        states.check(
            "Comparisons",
            state,
            steps=states.is_count,
            seen=states.is_count,
            window=lambda value: isinstance(value, Tensor) and value.shape == shape,
            warned=lambda value: isinstance(value, bool),
        )
        self._steps, self._seen, self._warned = state["steps"], state["seen"], state["warned"]
        self._window = state["window"].clone()


def compared(
    comparisons: Comparisons, beside: Beside, log_prob_fn: LogProbFunction, inputs: Inputs, how: HowToRun
) -> Comparison:
    """The gradient of the passes that have run beside that of all rows at weight 1, which is taken away again."""
    began, ranks, ledger, device = time.perf_counter(), how.ranks, Ledger(None), inputs.advantages.device
    passes = Passes(log_prob_fn, inputs, ledger, how)
    with beside.dense():
        everything = torch.ones(inputs.total, dtype=torch.bool, device=device)
        passes.differentiate(everything, None, ranks.total(inputs.total))
        passes.close()
    found = torch.cat([beside.sums(), beside.sketches(ranks.shard or 0).flatten()])
    found = found if ranks.shard is None else ranks.add(found)
    ran, seconds = ledger.counts, time.perf_counter() - began
    sketches = found[4:].unflatten(0, (2, -1))
    return comparisons.compared(found[:4], sketches, ran.forward_rows, ran.backward_rows, seconds)


def _together(gated: Tensor, dense: Tensor) -> tuple[float, float]:
    """Consistency and agreement of (WINDOW, WIDTH): inner products of different steps, whose noise is independent."""

    def of_different(products: Tensor) -> float:
        return float(products.sum() - products.diagonal().sum()) / (WINDOW * (WINDOW - 1))

    own, other = float(dense.square().sum()) / WINDOW, float(gated.square().sum()) / WINDOW
    agreement = of_different(gated @ dense.T) / math.sqrt(own * other) if other > 0 else 0.0
    return of_different(dense @ dense.T) / own, agreement
