"""FLOPs of a step, counted from outside: around its log-prob function, its draft and its backward passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from sparkjoy import states
from sparkjoy.step.report import BackwardReport

Direction = Literal["screen", "forward", "backward"]
Shape = tuple[Any, ...]
"""Of rows: how many, and the shape of one of them in each tensor; -1 where it is ragged."""

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

    def of(self, direction: Direction, part: Shape) -> int | None:
        """FLOPs of a pass over `part`; None where it has to be measured."""
        if _is_ragged(part):
            return None
        known = self._passes.get(direction, {})
        found = known.get(part)
        if found is not None:
            return found[1]
        if len(known) < SHAPES_MEASURED:
            return None
        size = _size(part)
        nearest, flops = min(known.values(), key=lambda entry: abs(entry[0] - size))
        return flops * size // nearest

    def to_measure(self, part: Shape) -> bool:
        """Whether to measure a pass over `part` that is to be differentiated; asking settles a check that is due."""
        if self.of("forward", part) is None or self.of("backward", part) is None:
            return True
        if self._calls < CALLS_TO_A_CHECK or part not in self._passes["backward"]:
            return False
        self._calls = 0
        return True

    def learn(self, direction: Direction, part: Shape, flops: int) -> None:
        """Remember what was measured, and nothing else where it contradicts what was known of that shape."""
        if _is_ragged(part):
            return
        known = self._passes.get(direction, {}).get(part)
        if known is not None and known[1] != flops:
            self._passes = {}
        of_direction = self._passes.setdefault(direction, {})
        if len(of_direction) < SHAPES_MEASURED:
            of_direction[part] = (_size(part), flops)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to count as an unbroken one would."""
        return {"passes": {direction: dict(known) for direction, known in self._passes.items()}, "calls": self._calls}

    @staticmethod
    def fits(state: Any) -> bool:
        """Whether this is such a state."""
        if not isinstance(state, Mapping) or set(state) != {"passes", "calls"}:
            return False
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


class CountedFlops:
    """The FLOPs of a step, call by call.

    >>> import sparkjoy as sj
    >>> from sparkjoy.testing import TinyPolicy
    >>> policy, flops = TinyPolicy(4, 3), CountedFlops()
    >>> step = sj.GatedBackward(sj.KondoGate(rate=0.5), backward=flops.backward)
    >>> batch = {"state": torch.ones(4, 4), "action": torch.zeros(4, dtype=torch.long)}
    >>> report = flops.counted(step, policy.log_probs, batch, torch.ones(4))
    >>> flops.forward_flops == 2 * 4 * 3 * (4 + 2), flops.backward_flops == 2 * 4 * 3 * 2
    (True, True)
    """

    def __init__(self) -> None:
        self._known = KnownFlops()
        self._ran: list[tuple[int, int, int, int]] = []  # rows with a graph, FLOPs without, forward with one, backward
        self._last: tuple[Shape, bool] = (), False  # the pass that is to be differentiated, and whether it was measured

    @property
    def forward_flops(self) -> int:
        """Of all forward passes of the last step, a draft's included."""
        return sum(screened + forward for _, screened, forward, _ in self._ran)

    @property
    def backward_flops(self) -> int:
        """Of its backward passes."""
        return sum(backward for *_, backward in self._ran)

    @property
    def backward_over_forward(self) -> float | None:
        """r: FLOPs of the backward passes over those of the forward passes they went back through."""
        forward = sum(forward for _, _, forward, _ in self._ran)
        return self.backward_flops / forward if forward and self.backward_flops else None

    def counted(self, step: Any, log_prob_fn: Callable[[Any], Tensor], *args: Any, **options: Any) -> BackwardReport:
        """`step(log_prob_fn, ...)`, whose `backward` is this object's. What a comparison runs is not counted."""
        self._ran = []
        self._known.begin_call()
        report: BackwardReport = step(self.of(log_prob_fn), *args, **options)
        left = 0 if report.comparison is None else report.comparison.backward_rows
        while left > 0:
            left -= self._ran.pop()[0]
        return report

    def of(self, source: Callable[[Any], Tensor], draft: bool = False) -> Callable[[Any], Tensor]:
        """The function, with its passes counted; `draft` says that it is not the policy's."""

        def counted(rows: Any) -> Tensor:
            part, graph = shape_of(rows), torch.is_grad_enabled()
            measure = graph and self._known.to_measure(part)
            log_probs: Tensor
            log_probs, flops = self._measured("screen" if draft else "forward", part, lambda: source(rows), measure)
            self._ran.append((part[0], 0, flops, 0) if graph else (0, flops, 0, 0))
            self._last = (part, measure) if graph else self._last
            return log_probs

        return counted

    def backward(self, loss: Tensor) -> None:
        """`loss.backward()`, counted."""
        part, measure = self._last
        _, flops = self._measured("backward", part, loss.backward, measure)
        rows, screened, forward, _ = self._ran.pop()
        self._ran.append((rows, screened, forward, flops))

    def _measured(self, direction: Direction, part: Shape, work: Callable[[], Any], measure: bool) -> tuple[Any, int]:
        """What `work` returns, and its FLOPs: measured if asked to, or if nothing is known of such a pass."""
        known = None if measure else self._known.of(direction, part)
        if known is not None:
            return work(), known
        with FlopCount() as count:
            result = work()
        self._known.learn(direction, part, count.flops)
        return result, count.flops

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to count as an unbroken one would."""
        return self._known.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        if not KnownFlops.fits(state):
            raise ValueError("state has FLOPs that state_dict() of CountedFlops does not return.")
        self._known.load_state_dict(state)


def shape_of(rows: Any) -> Shape:
    """How many rows, and the shape of one of them in each tensor: what they cost depends on nothing else of them.

    >>> shape_of({"state": torch.ones(4, 7), "action": torch.ones(4)})
    (4, (7,), ())
    """
    tensors = [rows] if isinstance(rows, Tensor) else _tensors(rows)
    if not tensors:
        return 0, (-1,)
    return len(tensors[0]), *((-1,) if tensor.is_nested else tuple(tensor.shape[1:]) for tensor in tensors)


def _tensors(rows: Any) -> list[Tensor]:
    if not isinstance(rows, Mapping):
        return []
    parts = [[part] if isinstance(part, Tensor) else _tensors(part) for part in rows.values()]
    return [tensor for part in parts for tensor in part if tensor.dim()]


def _is_ragged(part: Shape) -> bool:
    return any(-1 in shape for shape in part[1:])


def _size(part: Shape) -> int:
    """Numbers in the tensors of `part`, at least one a row."""
    return int(part[0] * max(1, sum(math.prod(shape) for shape in part[1:])))
