"""What a gate has learnt, in TRL's checkpoints: written whole, and read back by the same gate only."""

from __future__ import annotations

import json
import os
import warnings
import zlib
from pathlib import Path

from sparkjoy.gates import Gate
from sparkjoy.gates.decision import load_state, state_of

FILE = "gate_state.json"
ANEW = "To go on with a gate that has learnt nothing yet, write null into that file."


def save_gate(gate: Gate, folder: Path) -> None:
    """Write the gate's state into a checkpoint."""
    state = json.dumps(state_of(gate))
    temporary = folder / f"{FILE}.tmp"
    temporary.write_text(json.dumps({"gate": repr(gate), "state": state, "crc32": zlib.crc32(state.encode())}))
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
    if name != repr(gate):
        raise ValueError(f"{file} is of {name}, and this run has {gate!r}. Resume with the same gate. {ANEW}")
    load_state(gate, json.loads(state))
