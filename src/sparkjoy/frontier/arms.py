"""The settings that take turns: the plain dense loop, and what the gates do through the engine; what a turn takes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparkjoy import checks
from sparkjoy.frontier.result import Kind, Setting
from sparkjoy.gates import Gate, KondoGate, UnbiasedGate
from sparkjoy.gates.decision import GATE
from sparkjoy.losses import Loss
from sparkjoy.scores import ScoreFunction, says
from sparkjoy.signs import worth
from sparkjoy.step.inputs import Inputs, LogProbFunction
from sparkjoy.step.passes import loss_terms

Progress = Callable[[float, str], None]
"""Called with the fraction done and what comes next."""
Outcome = tuple[float, float, float | None]
"""Rows kept, their tokens, and the noise that a weighted gate added."""
FEWEST_TURNS, MOST_TURNS = 3, 50


@dataclass(frozen=True)
class Arm:
    """A setting, and what came of its turns.

    Args:
        name: of the setting.
        kind: of the setting.
        gate: None for the dense step.
        step: adds one step's gradient to `.grad`.
        shared: by the function that shares tokens.
        seconds: of each turn.
        outcomes: likewise.
        compared: error and cosine, likewise.
        peaks: bytes of the turns that were watched.
    """

    name: str
    kind: Kind
    gate: Gate | None
    step: Callable[[], Outcome]
    shared: bool = False
    seconds: list[float] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    compared: list[tuple[float, float]] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)

    def measured(self) -> Setting:
        """Medians and means over the turns."""
        rows, tokens, noises = zip(*self.outcomes, strict=True)
        errors, cosines = zip(*self.compared, strict=True)
        return Setting(
            name=self.name,
            gate=None if self.gate is None else repr(self.gate),
            kind=self.kind,
            rows=float(np.mean(rows)),
            tokens=float(np.mean(tokens)),
            seconds=float(np.median(self.seconds)),
            peak_bytes=max(self.peaks),
            error=float(np.sqrt(np.mean(np.square(errors)))),
            cosine=float(np.mean(cosines)),
            noise=None if None in noises else float(np.mean(noises)),
            turns=len(self.seconds),
            shared=self.shared,
        )


def plain_pass(log_prob_fn: LogProbFunction, inputs: Inputs, loss: Loss, rows: slice, divisor: float = 1.0) -> None:
    """What one writes without a gate: adds the gradient of some rows to `.grad`, in one forward and backward pass.

    Args:
        log_prob_fn: `rows -> log-probs`, differentiable; gets copies, which it may write into.
        inputs: the checked batch.
        loss: as `GatedBackward`'s.
        rows: of the batch.
        divisor: what the sum of the terms is divided by.
    """
    part = inputs.take(rows)
    (loss_terms(loss, log_prob_fn(part.batch), part).sum() / divisor).backward()


def default_gates(rate: float, seed: int) -> Iterator[tuple[str, Kind, Gate, ScoreFunction | None]]:
    """Name, kind, gate and what it decides on (None: its own default); `rate` is what a noise of 0.3 keeps."""

    def generator() -> torch.Generator:
        return torch.Generator("cpu").manual_seed(seed)

    for noise in (0.1, 0.3, 1.0, 3.0):
        yield f"noise {noise:g}", "unbiased", UnbiasedGate(noise=noise, generator=generator()), None
    for fraction in (0.25, 0.1, 0.03):
        yield f"hard {fraction:.0%}", "biased", KondoGate(rate=fraction), None
    yield f"uniform {rate:.0%}", "baseline", UnbiasedGate(rate=min(rate, 1.0), generator=generator()), all_alike
    yield "price 0", "biased", KondoGate(price=0.0), None


@says(reads_log_probs=False)
def all_alike(advantages: Tensor, log_probs: Tensor) -> Tensor:
    """(B,) scores by which all rows that teach something are kept with the same probability.

    >>> all_alike(torch.tensor([3.0, -0.5, 0.0]), torch.zeros(3))
    tensor([ 1., -1.,  0.])
    """
    return worth(advantages).sign()


def check_gates(gates: Mapping[str, Gate]) -> None:
    """Raise a ValueError where these are not gates by name."""
    if not isinstance(gates, Mapping) or not gates:
        raise ValueError(f"gates is {checks.described(gates)}; expected a dict of at least one gate by name, or None.")
    for name, gate in gates.items():
        if not isinstance(name, str) or name == "dense":
            raise ValueError(
                f"gates has the name {checks.described(name)}; expected a string other than 'dense', which is measured "
                "anyway."
            )
        checks.function(f"gates[{name!r}]", gate, GATE, ..., ...)


def turns(arms: list[Arm], rounds: int | None, seconds: float, say: Progress) -> Iterator[Arm]:
    """Each arm in turn, again and again.

    Args:
        arms: all of them.
        rounds: turns of each; None: as many as fit `seconds`.
        seconds: how long to go on.
        say: told before each turn.
    """
    start, turn, planned = time.perf_counter(), 0, rounds or FEWEST_TURNS
    while turn < planned:
        for index, arm in enumerate(arms):
            say(0.1 + 0.9 * (turn + index / len(arms)) / planned, f"turn {turn + 1} of {planned}: {arm.name}")
            yield arm
        turn += 1
        if rounds is None:
            each = (time.perf_counter() - start) / turn
            planned = min(max(FEWEST_TURNS, int(seconds / each)), MOST_TURNS)
    say(1.0, "done")


class SavedBytes:
    """Counts what autograd keeps for the backward pass, at most at a time: the same number on every run.

    Neither gradients nor what an operation needs only while it runs are in it, nor what a checkpoint computes anew.

    >>> weight = torch.ones(4, requires_grad=True)
    >>> with SavedBytes([weight]) as counted:
    ...     (weight.exp().exp()).sum().backward()
    >>> counted.peak  # the results of both, 4 numbers of 4 bytes each
    32

    Args:
        there_anyway: tensors that are not counted, such as parameters.
    """

    def __init__(self, there_anyway: Iterable[Tensor]) -> None:
        self.peak = 0
        self._held = 0
        self._uses: Counter[int] = Counter()
        strided = (tensor for tensor in there_anyway if tensor.layout == torch.strided)
        self._there_anyway = {tensor.untyped_storage().data_ptr() for tensor in strided}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda saved: saved.tensor)

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)

    def _pack(self, tensor: Tensor) -> _Saved:
        if tensor.layout != torch.strided:
            return _Saved(tensor, lambda: None)
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place in self._there_anyway:
            return _Saved(tensor, lambda: None)
        if not self._uses[place]:
            self._held += size
            self.peak = max(self.peak, self._held)
        self._uses[place] += 1

        def release() -> None:
            self._uses[place] -= 1
            if not self._uses[place]:
                self._held -= size

        return _Saved(tensor, release)


class _Saved:
    """A tensor kept for the backward pass, which says when it is let go."""

    def __init__(self, tensor: Tensor, release: Callable[[], None]) -> None:
        self.tensor = tensor
        self._release = release

    def __del__(self) -> None:
        self._release()


def timed(step: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds of a step until the device is done with it, and what it returned."""
    wait(device)
    start = time.perf_counter()
    result = step()
    wait(device)
    return time.perf_counter() - start, result


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def with_peak(step: Callable[[], Any], device: torch.device, there_anyway: Iterable[Tensor]) -> tuple[Any, int]:
    """What a step returned, and its peak bytes above what was there before: see `PEAK_BYTES`."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = step()
        return result, torch.cuda.max_memory_allocated(device) - before
    with SavedBytes(there_anyway) as saved:
        result = step()
    return result, saved.peak


PEAK_BYTES = {
    True: "peak of what torch allocated on the GPU, above weights and gradients",
    False: "at most kept at a time for the backward pass, above weights and gradients",
}
"""What `with_peak` counts, by whether it is on a GPU."""
