"""The folder of a run or study: one process at a time, one set of settings, and nothing left that came to nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparkjoy_lab.training.tracking import as_json, read_json, write_json

if sys.platform != "win32":
    import fcntl

LOCK = ".sparkjoy-lock"
RESULTS = ("records.jsonl", "summary.json", "answers.jsonl", "checkpoint.pt", "*.png", "*.svg")
"""What would be written over."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system says that has no locks; there, nobody can be kept out."""
TEMPORARY = re.compile(r"\.tmp-.+-[0-9a-f]{16}")


@contextmanager
def opened(
    out: Path, config: Mapping[str, Any], from_checkpoint: bool = False, extends: Sequence[str] = ()
) -> Iterator[None]:
    """Make `out` the folder of a run or study with this config, or go on with it if it is one already.

    The folder is locked while open; a process that was killed leaves no lock. Where an error ends the work before there
    is any result, the folder is left as it was found.

    Args:
        out: the folder.
        config: what its results depend on, for config.json.
        from_checkpoint: whether a checkpoint there is gone on from; it says itself what it was made under.
        extends: lists in the config that may be longer than those of the results there, which they begin with.

    Raises:
        ValueError: another process has it open, it cannot be written, or it holds results of another config.
    """
    made = [path for path in (out, *out.parents) if not os.path.exists(path)]
    try:
        with _locked(out):
            _remove_temporaries(out)
            before, given = _others(out), as_json(config)
            earlier = _check(out, given, from_checkpoint, extends)
            try:
                yield
            except BaseException:
                if earlier != given and _others(out) == before:
                    _put_back(out / "config.json", earlier)
                raise
    except BaseException:
        with contextlib.suppress(OSError):  # a folder that is not empty stays
            for path in made:
                path.rmdir()
        raise


def _check(out: Path, config: dict[str, Any], from_checkpoint: bool, extends: Sequence[str]) -> Any:
    """Write this config, unless what is there is of another; the one that was there, or None."""
    path = out / "config.json"
    found = sorted(result.name for pattern in RESULTS for result in out.glob(pattern))
    odd = [name for name in found if Path(name).suffix in (".json", ".jsonl", ".pt") and not (out / name).is_file()]
    if odd:
        raise ValueError(f"{out / odd[0]} is not a file; give another --out.")
    if not path.exists():
        if found and not (from_checkpoint and "checkpoint.pt" in found):
            raise ValueError(
                f"--out {out} holds {found[0]}, but no config.json that says what it is of; put that back, or give "
                "another folder."
            )
        write_json(path, config)
        return None
    earlier = read_json(path)
    if not isinstance(earlier, dict):
        raise ValueError(f"{path} is no config of sparkjoy's, but a {type(earlier).__name__}; give another --out.")
    if earlier == config:
        return earlier
    if earlier.keys() != config.keys():
        raise ValueError(f"--out {out} holds results of another command, or of another version; give another folder.")
    differing = [key for key in sorted(config) if earlier[key] != config[key]]
    if _others(out) and not all(key in extends and _begins(config[key], earlier[key]) for key in differing):
        cure = "begin with those there and then add others, or " if set(differing) <= set(extends) else ""
        raise ValueError(
            f"--out {out} holds results with other settings ({', '.join(differing)}); {cure}give another folder."
        )
    write_json(path, config)  # over that of fewer runs, or of an earlier start that left nothing else
    return earlier


def _begins(values: list[Any], first: Any) -> bool:
    return isinstance(first, list) and values[: len(first)] == first


def _put_back(path: Path, config: Any) -> None:
    if config is None:
        path.unlink(missing_ok=True)
    else:
        write_json(path, config)


def _others(out: Path) -> list[tuple[str, int]]:
    """What there is beside the config and the lock, and when it was written."""
    there = (path for path in out.iterdir() if path.name not in ("config.json", LOCK))
    return sorted((path.name, path.lstat().st_mtime_ns) for path in there)


def _remove_temporaries(out: Path) -> None:
    """Remove what a killed process was writing; nobody else writes here now."""
    for path in out.glob(".tmp-*"):
        if TEMPORARY.fullmatch(path.name):
            with contextlib.suppress(OSError):
                path.unlink()


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    path = out / LOCK
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = _lock(path)
    except BlockingIOError:
        raise ValueError(
            f"--out {out}: another process is at work there; wait for it, or give another folder."
        ) from None
    except OSError as error:
        raise ValueError(
            f"--out {out}: cannot write there ({error.strerror}); give a folder that can be written."
        ) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)  # before the lock goes, so that nobody holds a lock on a file that is gone
        os.close(lock)


def _lock(path: Path) -> int:
    """A locked file: the system takes the lock back however the process ends.

    Raises:
        BlockingIOError: another process has it.
        OSError: it cannot be written.
    """
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _take(lock)
            if os.path.exists(path) and os.path.samestat(os.fstat(lock), os.stat(path)):
                return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)  # its owner removed it in between


def _take(lock: int) -> None:
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
