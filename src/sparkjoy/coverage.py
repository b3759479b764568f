"""Parts of the data (classes, prompts) of which a gate has stopped keeping anything, although they could still teach.

A gate that keeps successes only never keeps a row of a class that is never named, so nothing can bring that class back.
A part counts as lost where, since its last kept row, it had so much advantage that at the gate's own rate per unit of
|advantage| several rows of it would have been kept, and none was. What is mastered has none left and is never lost.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor

from sparkjoy.signs import worth

MISSED = 7.0
"""Rows that would have been kept: by chance alone not one of them is, once in a thousand times."""
FEW = 0.01
"""Lost parts among all that may be chance."""
MEMORY = 0.99
"""What a step still counts one step later in the gate's rate: a mean over about a hundred steps."""
MOST = 10_000
"""Parts that are remembered: the last seen. A part not seen for so long is forgotten."""
CURE = "A noise budget gives every row a chance: UnbiasedGate(noise=0.3), --method unbiased, or TRL's gate_noise=0.3."


class Coverage:
    """Counts, part by part, what a gate has passed over.

    >>> import torch
    >>> coverage = Coverage(patience=10)
    >>> parts, advantages = ["7", "7", "8", "8"], torch.tensor([0.5, 0.5, -1.0, -1.0])
    >>> keep = advantages > 0
    >>> [coverage.seen(parts, advantages, keep) for _ in range(8)][4:7]
    [[], ['8'], []]
    >>> coverage.lost
    ['8']

    Args:
        patience: the least number of rows with an advantage, all of them skipped, after which a part may be lost.

    Raises:
        ValueError: a patience below 1.
    """

    def __init__(self, patience: int) -> None:
        if patience < 1:
            raise ValueError(f"patience is {patience}; expected at least 1 row.")
        self.patience = patience
        self._skipped: dict[Hashable, tuple[int, float]] = {}  # rows and |advantage| since the last kept row
        self._lost: dict[Hashable, None] = {}  # in the order in which they were lost
        self._kept = self._weight = 0.0

    @property
    def lost(self) -> list[Hashable]:
        """The parts that are lost now; one that is kept again is not."""
        return list(self._lost)

    @property
    def parts(self) -> int:
        """How many parts have been seen."""
        return len(self._skipped)

    def seen(self, parts: Sequence[Hashable], advantages: Tensor, keep: Tensor) -> list[Hashable]:
        """Take up a decision; the parts that are lost since, unless they are so few of all that chance explains it.

        Args:
            parts: B names, the part of each row.
            advantages: (B,) or (B, T), 0 where a token does not count.
            keep: (B,) bool.
        """
        sizes = worth(advantages).abs().tolist()
        kept = keep.tolist()
        self._kept = MEMORY * self._kept + sum(kept)
        self._weight = MEMORY * self._weight + sum(sizes)
        for part, size, is_kept in zip(parts, sizes, kept, strict=True):
            rows, weight = self._skipped.pop(part, (0, 0.0))
            self._skipped[part] = (0, 0.0) if is_kept else (rows + (size > 0), weight + size)  # last, as seen last
        rate = self._kept / self._weight if self._weight else 0.0
        lost = []
        for part in dict.fromkeys(parts):
            rows, weight = self._skipped[part]
            if rows < self.patience or rate * weight < MISSED:
                self._lost.pop(part, None)
            elif part not in self._lost:
                lost.append(part)
                self._lost[part] = None
        while len(self._skipped) > MOST:
            forgotten = next(iter(self._skipped))
            del self._skipped[forgotten]
            self._lost.pop(forgotten, None)
        return [] if len(self._lost) <= FEW * len(self._skipped) else lost

    def warning(self, lost: Sequence[Hashable]) -> str:
        """What to say of parts that are lost, and what to do about it."""
        names = ", ".join(str(part) for part in lost[:5]) + (", ..." if len(lost) > 5 else "")
        return (
            f"the gate has stopped keeping {len(lost)} of {self.parts} parts of the data ({names}): not one of their "
            f"last {self.patience} rows or more, though they have advantages; they may never be learnt so. {CURE}"
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"skipped": dict(self._skipped), "lost": self.lost, "kept": self._kept, "weight": self._weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        self._skipped = dict(state["skipped"])
        self._lost = dict.fromkeys(state["lost"])
        self._kept, self._weight = float(state["kept"]), float(state["weight"])
