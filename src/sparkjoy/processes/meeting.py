"""How the ranks of a step meet, so that none waits for one that has failed.

A meeting is an all-gather of a few numbers, the first of which says whether a rank has failed. A rank where anything is
raised goes straight to a meeting and says so; the others hear of it wherever they meet next, and all raise the same.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

PLACES = ("failed", "open", "counts", "gather", "same", "add", "forward", "backward", "close")
"""Where ranks meet."""

PATIENCE = 10.0
"""Seconds to find out which rank is lost."""


class RanksError(Exception):
    """A rank has failed, or the ranks met in different places; raised on all of them, from the failure of this one.

    Its `args`, the same everywhere: the type to raise for the user, what happened, and whether a rank had `began`.
    """


class Meeting:
    """The meetings of a process group, step by step.

    Args:
        group: the process group.
        device: where the tensors of its collectives have to be.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.over = False
        """Whether this rank may meet no more in this step: all know of a failure, or cannot be told."""
        self.began = False
        """Whether this rank has begun a backward pass in this step."""
        self._group = group
        self._device = device
        self._steps = 0

    def begin(self) -> None:
        """Begin a step."""
        self.over = self.began = False
        self._steps += 1

    def meet(self, place: str, *numbers: float, failure: BaseException | None = None) -> Tensor:
        """(ranks, 2): the numbers that each rank brings, two at most.

        Raises:
            RanksError: a rank has failed, this one by `failure`, or the ranks met in different places.
        """
        mine = [failure is not None, PLACES.index(place), self.began, *numbers, 0, 0][:5]
        every = self.all_gather(torch.tensor(mine, dtype=torch.float64, device="cpu"))
        fails, places, began = every[:, :3].T.long().tolist()
        if not any(fails) and len(set(places)) == 1:
            return every[:, 3:]
        self.over = True
        kind: type[Exception] = RuntimeError
        if any(fails):
            failed = [rank for rank, fail in enumerate(fails) if fail]
            kind, said = self.told(failed[0], None if failure is None else _told_of(failure))
            who = f"rank {', '.join(map(str, failed))} of {self.size}" if len(failed) < self.size else "every rank"
            sentence = f"{who} failed, so none goes on: {said.rstrip('.')}"
        else:
            where = ", ".join(f"rank {rank} at {PLACES[number]!r}" for rank, number in enumerate(places))
            sentence = f"the ranks are out of step: {where}; they were given different work"
        raise RanksError(kind, sentence, any(began)) from failure

    def told(self, rank: int, value: Any) -> Any:
        """What one rank has for `value`, a Python object with its tensors on the CPU."""
        values = [value]
        with self._answered():
            dist.broadcast_object_list(values, dist.get_global_rank(self._group, rank), self._group, self._device)
        return values[0]

    def all_gather(self, tensor: Tensor) -> Tensor:
        """(ranks, *shape), on the CPU."""
        tensor = tensor.to(self._device)
        every = [torch.empty_like(tensor) for _ in range(self.size)]
        with self._answered():
            dist.all_gather(every, tensor, self._group)
        return torch.stack(every).cpu()

    @contextmanager
    def _answered(self) -> Iterator[None]:
        """Around a collective, whose failure is a RuntimeError that names the rank that does not answer."""
        try:
            yield
        except RuntimeError as error:
            self.over = True
            others = absent(self.rank, self.size, f"{self._group.group_name}/{self._steps}")
            raise RuntimeError(
                f"rank {', '.join(others)} of {self.size} does not answer: it has ended, was stopped, or did "
                "not make this call within the time-out of the process group."
            ) from error


def absent(rank: int, size: int, where: str) -> list[str]:
    """The other ranks that do not come to `where` to say that one is missing."""
    others = [str(other) for other in range(size) if other != rank]
    with contextlib.suppress(RuntimeError):  # the store may have gone with the rank
        store = dist.distributed_c10d._get_default_store()
        store.set(f"sparkjoy/{where}/{rank}", "here")
        until = time.monotonic() + PATIENCE
        while len(others) > 1 and time.monotonic() < until:
            time.sleep(0.05)
            others = [other for other in others if not store.check([f"sparkjoy/{where}/{other}"])]
    return others


def _told_of(error: BaseException) -> tuple[type[Exception], str]:
    """What all raise for an error, and its message: where that was not written for the user, after its type."""
    kind = next((kind for kind in (ValueError, TypeError) if isinstance(error, kind)), RuntimeError)
    said = str(error) if kind is ValueError else f"{type(error).__name__}: {error}"
    return kind, said.rstrip(": ")


LONGEST = 200
"""Characters of one option that are looked at."""


def in_words(options: Mapping[str, Any]) -> dict[str, str]:
    """Each option as one line, the same in every process: without addresses in memory.

    >>> in_words({"rate": 0.5, "loss": in_words})
    {'rate': '0.5', 'loss': 'in_words'}
    """
    return {name: _described(value)[:LONGEST].replace("\n", " ") for name, value in options.items()}


def _described(value: Any) -> str:
    if isinstance(value, partial):
        named = [f"{name}={_described(given)}" for name, given in value.keywords.items()]
        return f"{_described(value.func)}({', '.join([*map(_described, value.args), *named])})"
    if isinstance(value, nn.Module):  # whose repr may be long
        return type(value).__qualname__
    name = getattr(value, "__qualname__", None)
    if name is None:
        return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
    held: list[str] = []  # plain values in the closure of a function, such as the clip of `sj.clipped(0.2)`
    for cell in getattr(value, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # the cell is empty
            held += [str(cell.cell_contents)] * isinstance(cell.cell_contents, bool | int | float | str)
    return f"{name}({', '.join(held)})" if held else str(name)
