"""One torch file that a killed run goes on from: read with weights_only=True, written whole, and sealed.

The seal is a SHA-256 of every byte before it, as the comment at the end of the zip archive that a torch file is, so
`torch.load` reads the file too, and no changed bit goes unseen. With the state goes what it was made under.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sparkjoy_lab.training.tracking import as_json, write_whole

VERSION = 1
MARK = b"sparkjoy sha256 "
SEAL_BYTES = len(MARK) + 64
NO_COMMENT = b"PK\x05\x06"  # the archive's last record, of 22 bytes where no comment follows


def save_checkpoint(path: Path, state: dict[str, Any], config: Mapping[str, Any] | None = None) -> None:
    """Write tensors, numbers, strings, and lists and dicts of them.

    Args:
        path: the file.
        state: what to go on from.
        config: what it was made under.
    """
    buffer = io.BytesIO()
    torch.save({"version": VERSION, "config": as_json(config), "state": state}, buffer)
    data = buffer.getvalue()
    if data[-22:-18] != NO_COMMENT:
        raise RuntimeError("torch.save wrote no zip archive without a comment, so a checkpoint cannot be sealed.")
    body = data[:-2] + SEAL_BYTES.to_bytes(2, "little")
    write_whole(path, body + _seal(body))


def load_checkpoint(path: Path, config: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """The saved state, or None where there is no file.

    Args:
        path: the file.
        config: what it must have been made under; None: anything.

    Raises:
        ValueError: the file cannot be read, is damaged, or was made under another config.
    """
    try:
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is not a file; give another --out.")
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}); it may well be whole. Nothing was changed."
        ) from None
    damaged = ValueError(
        f"{path} is not a whole checkpoint of this version; nothing was changed. Put a copy of it back, or give "
        "another --out to start anew."
    )
    body, seal = data[:-SEAL_BYTES], data[-SEAL_BYTES:]
    if seal != _seal(body):
        raise damaged
    try:
        saved = torch.load(io.BytesIO(data), weights_only=True)
    except Exception:  # whatever else is sealed
        raise damaged from None
    if not isinstance(saved, dict) or saved.keys() != {"version", "config", "state"} or saved["version"] != VERSION:
        raise damaged
    state: dict[str, Any] = saved["state"]
    if not isinstance(state, dict):
        raise damaged
    if config is not None and saved["config"] != as_json(config):
        raise ValueError(f"{path} was made under other settings{_differing(saved['config'], as_json(config))}.")
    return state


def _seal(body: bytes) -> bytes:
    return MARK + hashlib.sha256(body).hexdigest().encode()


def _differing(earlier: Any, config: dict[str, Any]) -> str:
    if not isinstance(earlier, dict):
        return ""
    keys = sorted(str(key) for key in earlier.keys() | config.keys() if earlier.get(key) != config.get(key))
    return f" ({', '.join(keys)}); give another --out, or those settings"
