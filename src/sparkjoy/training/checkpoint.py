"""One torch file that a killed run goes on from; read with weights_only=True, written whole."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from sparkjoy.training.tracking import write_whole


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors, numbers, strings, and lists and dicts of them."""
    write_whole(path, lambda temporary: torch.save(state, temporary))


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The saved state, or None where there is no file.

    Raises:
        ValueError: the file is not a whole checkpoint.
    """
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} is not a whole checkpoint ({type(error).__name__}); remove it to start the run anew."
        ) from None
    return state
