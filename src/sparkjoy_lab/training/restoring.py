"""Going on from a checkpoint: whose it is, and whether it fits the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparkjoy_lab.training.checkpoint import load_checkpoint
from sparkjoy_lab.training.folder import opened
from sparkjoy_lab.training.processes import Share
from sparkjoy_lab.training.settings import Settings


def found_state(folder: ExitStack, out: Path, config: dict[str, Any], share: Share) -> dict[str, Any] | None:
    """Open a run's folder, and give the state to go on from, if there is one.

    The first process has the folder, and tells the others what it found there.

    Args:
        folder: closes the folder in the end.
        out: the folder.
        config: what the run's results depend on.
        share: this process's part.

    Raises:
        ValueError: the folder or its checkpoint is refused. Processes after the first end: the first says why.
    """
    refusal: ValueError | None = None
    state = None
    if share.first:
        try:
            folder.enter_context(opened(out, config, from_checkpoint=True))
            state = load_checkpoint(out / "checkpoint.pt", config)
        except ValueError as error:
            refusal = error
    refused, state = share.broadcast((refusal is not None, state))
    if refusal is not None:
        raise refusal
    if refused:
        raise SystemExit(2)
    found: dict[str, Any] | None = state
    return found


def check_state(state: Any, fresh: dict[str, Any], parameters: Sequence[Tensor], settings: Settings) -> None:
    """Raise an error unless `state` is one that a run with these settings may have been in.

    Args:
        state: as loaded.
        fresh: the state of such a run before its first step.
        parameters: the policy's.
        settings: of the run.

    Raises:
        ValueError: it is not; other errors where it is of another kind altogether.
    """
    check_like(state, {**fresh, "backward": {}, "optimizer": {}}, "state")
    check_like(state["backward"], fresh["backward"], "backward", exact=False)
    check_like(state["optimizer"], {**fresh["optimizer"], "param_groups": []}, "optimizer")
    if state["optimizer"]["param_groups"] != fresh["optimizer"]["param_groups"]:
        raise ValueError("its optimizer is another")
    for index, moments in state["optimizer"]["state"].items():
        parameter = parameters[index].detach()
        like = {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
        check_like(moments, like, f"optimizer.{index}")
    steps, every, last = state["steps_done"], settings.evaluate_every, settings.steps
    evaluated = list(range(every, steps + 1, every))
    evaluated += [last] if steps == last and last % every else []
    if not 0 <= steps <= last or [record["step"] for record in state["records"]] != evaluated:
        raise ValueError("its records are not those of its steps")
    for record in state["records"]:
        check_like(record["error"], 0.0, "error")


def check_like(found: Any, fresh: Any, where: str, exact: bool = True) -> None:
    """Raise a ValueError unless a loaded value is of the kind that a fresh run has in its place.

    What is empty or None in a fresh run may have been filled since.

    Args:
        found: loaded.
        fresh: a fresh run's.
        where: its name, for the message.
        exact: whether tensors have one shape, and finite values.
    """
    if isinstance(fresh, Tensor):
        alike = isinstance(found, Tensor) and found.dtype == fresh.dtype
        if alike and exact:
            alike = found.shape == fresh.shape and bool(found.isfinite().all())
    elif isinstance(fresh, Mapping):
        alike = isinstance(found, Mapping) and (not fresh or found.keys() == fresh.keys())
        for key in fresh if alike else ():
            check_like(found[key], fresh[key], f"{where}.{key}", exact)
    elif isinstance(fresh, list | tuple):
        alike = isinstance(found, list | tuple)
    elif isinstance(fresh, bool) or isinstance(found, bool):
        alike = isinstance(found, bool) and isinstance(fresh, bool)
    elif fresh is None:
        alike = found is None or isinstance(found, Tensor) or _is_finite(found)
    elif isinstance(fresh, int | float):
        alike = (found is None and not exact) or _is_finite(found)
    else:
        alike = type(found) is type(fresh)
    if not alike:
        raise ValueError(f"its {where} is not what such a run has there")


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
