"""The gate of a trainer: what its options describe, what its draws really added, its state in a checkpoint."""

from __future__ import annotations

import json
import os
import warnings
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparkjoy import checks
from sparkjoy.gates import Gate, KondoGate, UnbiasedGate
from sparkjoy.gates.decision import GATE, load_state, state_of
from sparkjoy.noise import noise_ratio
from sparkjoy.processes.meeting import in_words

FILE = "gate_state.json"
ANEW = "To go on with a gate that has learnt nothing yet, write null into that file."


def gate_of(
    noise: float | None, rate: float | None, price: float | None, negative_share: float = 0.0, **draws: Any
) -> Gate | None:
    """The gate that gate_noise, gate_rate and gate_price describe; None where none is set, or nothing is skipped.

    >>> gate_of(0.3, None, None), gate_of(None, 0.1, None), gate_of(None, 1.0, None)
    (UnbiasedGate(noise=0.3), KondoGate(rate=0.1), None)

    Args:
        noise: 0 skips only rows without a gradient.
        rate: as `KondoGate`'s.
        price: likewise.
        negative_share: likewise.
        draws: floor and generator, as `UnbiasedGate`'s.

    Raises:
        ValueError: a noise beside a rate or a price, or one outside its range.
    """
    if noise is not None and (rate is not None or price is not None):
        raise ValueError(f"gate_noise={noise!r} finds its own rate; give it alone, without gate_rate or gate_price.")
    try:
        if noise is not None:
            return UnbiasedGate(rate=1.0, **draws) if noise == 0 else UnbiasedGate(noise=noise, **draws)
        gate = None if rate is None and price is None else KondoGate(rate, price, negative_share)
    except ValueError as error:  # begins with the name of an argument
        raise ValueError(f"gate_{error}") from None
    return None if gate is None or (gate.rule is not None and gate.rule.keeps_everything) else gate


def one_gate(own: Gate | None, of_config: Gate | None) -> Gate | None:
    """The gate that a trainer was given, or else that of its config.

    Raises:
        TypeError: no gate.
        ValueError: both.
    """
    if own is None:
        return of_config
    checks.function("gate", own, f"{GATE}, or None for that of the config", ..., ...)
    if of_config is not None:
        raise ValueError(f"gate={own!r}, and the config has {of_config!r}; give one of them.")
    return own


def refuse(reasons: dict[str, Any]) -> None:
    """Raise a ValueError with the first of these reasons that holds."""
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(reason)


def learn_noise(gate: Any, expected: float, sums: list[float]) -> float:
    """Tell a noise budget the `noise_sums` of the rows that ran, of all processes; the noise that was really added.

    Args:
        gate: one without `learn` is told nothing.
        expected: the noise that its decision let expect.
        sums: four.
    """
    if hasattr(gate, "learn"):
        gate.learn(*sums)
    return expected * noise_ratio(*sums)


def state_with_draws(gate: Gate) -> dict[str, Any]:
    """The state of a gate and of its generator, if it has one."""
    generator = getattr(gate, "generator", None)
    return {"gate": state_of(gate), "draws": None if generator is None else generator.get_state()}


def load_with_draws(gate: Any, state: dict[str, Any]) -> None:
    """Take up what `state_with_draws` gave."""
    load_state(gate, state["gate"])
    if state["draws"] is not None and getattr(gate, "generator", None) is not None:
        gate.generator.set_state(torch.as_tensor(state["draws"], dtype=torch.uint8))


def save_gate(gate: Gate, folder: Path, draws: bool = False) -> None:
    """Write the gate's state into a checkpoint; that of its generator too, unless it is seeded for each decision."""
    state = json.dumps(state_with_draws(gate) if draws else state_of(gate), default=_tensor_in_words)
    temporary = folder / f"{FILE}.tmp"
    temporary.write_text(json.dumps({"gate": _named(gate), "state": state, "crc32": zlib.crc32(state.encode())}))
    os.replace(temporary, folder / FILE)


def load_gate(gate: Gate | None, folder: Path, draws: bool = False) -> None:
    """Take up the state in a checkpoint, as `save_gate` wrote it.

    Raises:
        ValueError: it is missing, damaged, or of another gate.
    """
    file = folder / FILE
    if gate is None:
        if file.exists():
            warnings.warn(f"{file}: the run so far had a gate, and goes on without one.", stacklevel=2)
        return
    if not file.exists():
        raise ValueError(f"{file} is missing: the run so far had no gate, or was stopped while it saved. {ANEW}")
    try:
        saved = json.loads(file.read_text())
        if saved is None:
            return
        name, state, check = saved["gate"], saved["state"], saved["crc32"]
        if zlib.crc32(state.encode()) != check:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{file} is damaged. Go on from an earlier checkpoint. {ANEW}") from None
    if name != _named(gate):
        raise ValueError(f"{file} is of {name}, and this run has {gate!r}. Resume with the same gate. {ANEW}")
    (load_with_draws if draws else load_state)(gate, json.loads(state, object_hook=_tensor_from_words))


def _named(gate: Gate) -> str:
    """A gate as two runs of one program call it: without addresses in memory."""
    return in_words({"gate": gate})["gate"]


def _tensor_in_words(value: Any) -> dict[str, Any]:
    """What json does not know of a state."""
    if not isinstance(value, Tensor):
        raise TypeError(f"a gate's state has {type(value).__name__}; expected numbers, text, lists, dicts and tensors.")
    return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}


def _tensor_from_words(value: dict[str, Any]) -> Any:
    return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"])) if "tensor" in value else value
