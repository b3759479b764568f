"""FLOPs: how they are counted, and what is known of passes that were counted before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from sparkjoy import states
from sparkjoy.engine.inputs import Inputs

Direction = Literal["screen", "forward", "backward"]

SHAPES_MEASURED = 8
CALLS_TO_A_CHECK = 100


class FlopCount(TorchDispatchMode):
    """Counts the FLOPs of what runs inside it: torch's own formulas, without the per-module tree that doubles the cost.

    Compiled functions run uncompiled inside, and are compiled as ever afterwards: without the stance, torch.compile
    would give up for good on what it first meets under a dispatch mode.

    >>> import torch
    >>> with FlopCount() as count:
    ...     _ = torch.ones(2, 3) @ torch.ones(3, 4)
    >>> count.flops
    48
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.flops = 0

    def __enter__(self) -> Self:
        self._uncompiled = torch.compiler.set_stance("force_eager")
        self._uncompiled.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]  # torch's
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # torch's
        self._uncompiled.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out


class KnownFlops:
    """FLOPs of passes by direction, number of rows and shape of a row, kept from call to call.

    Of every direction the first 8 shapes are measured. What a pass of another shape does is taken from the one of
    nearest size among them, in proportion to the sizes: exact where FLOPs are proportional to rows, near where they
    are not. Of ragged rows no shape says what they cost, so their passes are all measured. A counted pass runs
    uncompiled and takes longer; what is differentiated is measured both ways at once or not at all.

    Freezing or thawing parameters changes what a backward pass does. So in every hundredth call or soon after, one
    pass of a known shape is measured again; where it disagrees, everything is forgotten.
    """

    def __init__(self) -> None:
        self._passes: dict[str, dict[tuple[Any, ...], tuple[int, int]]] = {}
        self._calls = 0

    def begin_call(self) -> None:
        """Count a call, towards the next check."""
        self._calls += 1

    def of(self, direction: Direction, part: Inputs) -> int | None:
        """FLOPs of a pass over `part`; None where it has to be measured."""
        if _is_ragged(part):
            return None
        known = self._passes.get(direction, {})
        found = known.get(_key(part))
        if found is not None:
            return found[1]
        if len(known) < SHAPES_MEASURED:
            return None
        size = _size(part)
        nearest, flops = min(known.values(), key=lambda entry: abs(entry[0] - size))
        return flops * size // nearest

    def to_measure(self, part: Inputs) -> bool:
        """Whether to measure a pass over `part` that is to be differentiated; asking settles a check that is due."""
        if self.of("forward", part) is None or self.of("backward", part) is None:
            return True
        if self._calls < CALLS_TO_A_CHECK or _key(part) not in self._passes["backward"]:
            return False
        self._calls = 0
        return True

    def learn(self, direction: Direction, part: Inputs, flops: int) -> None:
        """Remember what was measured, and nothing else where it contradicts what was known of that shape."""
        if _is_ragged(part):
            return
        known = self._passes.get(direction, {}).get(_key(part))
        if known is not None and known[1] != flops:
            self._passes = {}
        of_direction = self._passes.setdefault(direction, {})
        if len(of_direction) < SHAPES_MEASURED:
            of_direction[_key(part)] = (_size(part), flops)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to count as an unbroken one would."""
        return {"passes": {direction: dict(known) for direction, known in self._passes.items()}, "calls": self._calls}

    @staticmethod
    def fits(state: Any) -> bool:
        """Whether this is such a state, or {}, where nothing was counted."""
        if not isinstance(state, Mapping) or set(state) != {"passes", "calls"}:
            return isinstance(state, Mapping) and not state
        passes = list(state["passes"].values()) if isinstance(state["passes"], Mapping) else None
        if passes is None or not all(isinstance(known, Mapping) for known in passes):
            return False
        entries = [entry for known in passes for entry in known.values()]
        pairs = all(isinstance(entry, tuple) and len(entry) == 2 for entry in entries)
        return pairs and all(map(states.is_count, (state["calls"], *(part for entry in entries for part in entry))))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        self._passes = {direction: dict(known) for direction, known in state["passes"].items()}
        self._calls = state["calls"]


def _key(part: Inputs) -> tuple[Any, ...]:
    return (part.total, *part.row_shapes)


def _is_ragged(part: Inputs) -> bool:
    return any(-1 in shape for shape in part.row_shapes)


def _size(part: Inputs) -> int:
    """Numbers in the tensors of `part`, at least one a row."""
    a_row = 0
    for shape in part.row_shapes:
        numbers = 1
        for length in shape:
            numbers *= length
        a_row += numbers
    return part.total * max(1, a_row)
