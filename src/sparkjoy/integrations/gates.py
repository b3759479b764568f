"""The gate of a trainer: what its three options say, and what it has learnt, in checkpoints of TRL's."""

from __future__ import annotations

import json
import os
import warnings
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparkjoy.gates import Gate, KondoGate, UnbiasedGate
from sparkjoy.gates.decision import load_state, state_of
from sparkjoy.processes.meeting import in_words

FILE = "gate_state.json"
ANEW = "To go on with a gate that has learnt nothing yet, write null into that file."


def gate_of(
    noise: float | None,
    rate: float | None,
    price: float | None,
    negative_share: float = 0.0,
    floor: float = 0.0,
    generator: torch.Generator | None = None,
) -> Gate | None:
    """The gate that the options gate_noise, gate_rate and gate_price describe; None where none is set.

    >>> gate_of(0.3, None, None), gate_of(None, 0.1, None), gate_of(None, None, None)
    (UnbiasedGate(noise=0.3), KondoGate(rate=0.1), None)

    Args:
        noise: 0 skips only rows without a gradient.
        rate: as `KondoGate`'s.
        price: likewise.
        negative_share: likewise.
        floor: as `UnbiasedGate`'s.
        generator: likewise.

    Raises:
        ValueError: a noise beside a rate or a price, or one outside its range.
    """
    if noise is not None and (rate is not None or price is not None):
        raise ValueError(f"gate_noise={noise!r} finds its own rate; give it alone, without gate_rate or gate_price.")
    if noise is not None:
        given = {"rate": 1.0} if noise == 0 else {"noise": noise}
        return UnbiasedGate(**given, floor=floor, generator=generator)
    return None if rate is None and price is None else KondoGate(rate, price, negative_share)


def save_gate(gate: Gate, folder: Path) -> None:
    """Write the gate's state into a checkpoint."""
    state = json.dumps(state_of(gate), default=_tensor_in_words)
    temporary = folder / f"{FILE}.tmp"
    temporary.write_text(json.dumps({"gate": _named(gate), "state": state, "crc32": zlib.crc32(state.encode())}))
    os.replace(temporary, folder / FILE)


def load_gate(gate: Gate | None, folder: Path) -> None:
    """Take up the state in a checkpoint.

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
    load_state(gate, json.loads(state, object_hook=_tensor_from_words))


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
