"""Results on disk: every file appears whole or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write one JSON document; NaN and infinities become null."""
    text = json.dumps(as_json(value), indent=1) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text))


def read_json(path: Path) -> Any:
    """One JSON document.

    Raises:
        ValueError: the file is not one.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}); remove it to start anew.") from None


def write_json_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line; NaN and infinities become null."""
    text = "".join(json.dumps(as_json(record)) + "\n" for record in records)
    write_whole(path, lambda temporary: temporary.write_text(text))


def save_figure(figure: Figure, out: Path, name: str) -> None:
    """Write a figure as NAME.png and NAME.svg."""
    for suffix in ("png", "svg"):
        write_whole(out / f"{name}.{suffix}", lambda temporary: figure.savefig(temporary, dpi=150))


def prepare_out(out: Path) -> None:
    """Create the folder for results and see that it can be written to, before any work is done.

    Raises:
        ValueError: it cannot.
    """
    try:
        write_whole(out / "probe", lambda temporary: temporary.write_text(""))
        (out / "probe").unlink()
    except OSError as error:
        raise ValueError(
            f"--out {out}: cannot write there ({error.strerror}); give a folder that can be written."
        ) from None


def as_json(value: Any) -> Any:
    """The value as JSON gives it back: lists for tuples, None for NaN and infinities."""
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
