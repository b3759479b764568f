"""Results on disk: every file appears whole or not at all."""

from __future__ import annotations

import contextlib
import io
import json
import math
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_whole(path: Path, data: bytes) -> None:
    """Write a temporary file of a name of its own beside `path`, then rename it to `path`.

    Raises:
        ValueError: it cannot be written: a full disk, a limit on a file's size, no permission. `path` is as it was.
    """
    temporary = path.with_name(f".tmp-{path.name}-{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(data)
        temporary.replace(path)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written ({error.strerror or error}); what was there before is as it was."
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write one JSON document; NaN and infinities become null."""
    write_whole(path, (json.dumps(as_json(value), indent=1) + "\n").encode())


def read_json(path: Path) -> Any:
    """One JSON document.

    Raises:
        ValueError: the file is not one.
    """
    try:
        if path.exists() and not path.is_file():
            raise ValueError("not a file")
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        said = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} cannot be read as JSON ({said}); nothing was changed.") from None


def write_json_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line; NaN and infinities become null."""
    text = "".join(json.dumps(as_json(record)) + "\n" for record in records)
    write_whole(path, text.encode())


def save_figure(figure: Figure, out: Path, name: str) -> None:
    """Write a figure as NAME.png and NAME.svg."""
    for suffix in ("png", "svg"):
        drawn = io.BytesIO()
        figure.savefig(drawn, format=suffix, dpi=150)
        write_whole(out / f"{name}.{suffix}", drawn.getvalue())


def as_json(value: Any) -> Any:
    """The value as JSON gives it back: lists for tuples, None for NaN and infinities."""
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
