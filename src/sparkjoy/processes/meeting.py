"""How the processes of a step meet, so that none waits for one that has failed.

All meetings begin alike, by a few numbers of which the first says that a rank has failed. A rank where anything is
raised goes straight to a meeting and says so; the others hear of it wherever they meet next, and all raise the same.
What they compare, options and gates, is told in words (`in_words`), so that all can say what differs.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

Place = Literal["failed", "open", "sum", "most", "gather", "same", "add", "forward", "backward", "close"]
"""Where ranks meet."""

PLACES: tuple[str, ...] = get_args(Place)

KINDS: tuple[type[Exception], ...] = (ValueError, TypeError, RuntimeError)
"""What all ranks raise: the kind of the first failure, the last one for any other kind."""

NUMBERS = 4
"""What a rank can bring to a meeting."""

TEXT = 4096
"""Bytes of a sentence that is told to the others."""

PATIENCE = 10.0
"""Seconds to find out which rank is lost."""


class RanksError(Exception):
    """A rank has failed, or the ranks met in different places; raised on all of them.

    Args:
        sentence: what happened, the same everywhere.
        kind: what to raise.
        numbers: (ranks, NUMBERS) what each brought.
    """

    def __init__(self, sentence: str, kind: type[Exception], numbers: Tensor) -> None:
        super().__init__(sentence)
        self.kind = kind
        self.numbers = numbers


class Meeting:
    """The meetings of a process group, step by step.

    Args:
        group: the process group.
        device: where its tensors are.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.over = False
        """Whether this rank may meet no more in this step: all know of a failure, or cannot be told."""
        self._group = group
        self._device = device
        self._steps = 0

    def begin(self) -> None:
        """Begin a step."""
        self.over = False
        self._steps += 1

    def meet(self, place: Place, numbers: Sequence[float] = (), failure: BaseException | None = None) -> Tensor:
        """(ranks, NUMBERS) what each rank brings.

        Raises:
            RanksError: a rank has failed, this one by `failure`, or the ranks met in different places.
        """
        kind = 0
        if failure is not None:
            kind = next((code for code, kind in enumerate(KINDS, 1) if isinstance(failure, kind)), len(KINDS))
        mine = [kind, PLACES.index(place), *map(float, numbers)]
        every = self.all_gather(
            torch.tensor(mine + [0.0] * (2 + NUMBERS - len(mine)), dtype=torch.float64, device="cpu")
        )
        kinds, places = every[:, 0].long().tolist(), every[:, 1].long().tolist()
        if not any(kinds) and len(set(places)) == 1:
            return every[:, 2:]
        said = self.texts(place if failure is None else _sentence(failure))
        self.over = True
        failed = [rank for rank, kind in enumerate(kinds) if kind]
        if not failed:
            where = ", ".join(f"rank {rank} at {text!r}" for rank, text in enumerate(said))
            sentence = f"the ranks are out of step: {where}; they were given different work"
            raise RanksError(sentence, KINDS[-1], every[:, 2:])
        who = f"rank {', '.join(map(str, failed))} of {self.size}" if len(failed) < self.size else "every rank"
        sentence = f"{who} failed, so none goes on: {said[failed[0]].rstrip('.')}"
        raise RanksError(sentence, KINDS[kinds[failed[0]] - 1], every[:, 2:])

    def texts(self, text: str) -> list[str]:
        """What each rank says."""
        data = text.encode()[:TEXT]
        every = self.all_gather(torch.tensor(list(data) + [0] * (TEXT - len(data)), dtype=torch.uint8, device="cpu"))
        return [bytes(row.tolist()).rstrip(b"\0").decode(errors="ignore") for row in every]

    def all_gather(self, tensor: Tensor) -> Tensor:
        """(ranks, *shape), on the CPU.

        Raises:
            RuntimeError: a rank does not answer, and which one.
        """
        tensor = tensor.to(self._device)
        every = [torch.empty_like(tensor) for _ in range(self.size)]
        try:
            dist.all_gather(every, tensor, self._group)
        except RuntimeError as error:
            self.over = True
            others = absent(self.rank, self.size, f"{self._group.group_name}/{self._steps}")
            raise RuntimeError(
                f"rank {', '.join(others)} of {self.size} does not answer: it has ended, was stopped, or did "
                "not make this call within the time-out of the process group."
            ) from error
        return torch.stack(every).cpu()


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


def _sentence(error: BaseException) -> str:
    """What is told of an error: of one that was not meant as a sentence for the user, its kind too."""
    said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return said.rstrip(": ")


LONGEST = 200
"""Characters of one option that are looked at."""


def in_words(options: Mapping[str, Any]) -> str:
    """One line for each option, `name=value`, without addresses in memory.

    >>> print(in_words({"rate": 0.5, "loss": in_words}))
    rate=0.5
    loss=in_words
    """
    return "\n".join(f"{name}={_described(value)[:LONGEST]}".replace("\n", " ") for name, value in options.items())


def first_difference(texts: list[str]) -> str:
    """The first option that is not everywhere the same, and what it is where.

    >>> first_difference(["rate=0.5", "rate=0.1"])
    'rate is 0.5 on rank 0 and 0.1 on rank 1'
    """
    for rank, text in enumerate(texts):
        for here, there in zip(texts[0].splitlines(), text.splitlines(), strict=False):
            if here != there:
                (name, first), (_, other) = here.split("=", 1), there.split("=", 1)
                return f"{name} is {first} on rank 0 and {other} on rank {rank}"
    return "options differ"


def _described(value: Any) -> str:
    if isinstance(value, partial):
        named = [f"{name}={_described(given)}" for name, given in value.keywords.items()]
        return f"{_described(value.func)}({', '.join([*map(_described, value.args), *named])})"
    if isinstance(value, nn.Module):
        return type(value).__qualname__
    name = getattr(value, "__qualname__", None)
    if name is None:
        kind: Any = type(value)
        return kind.__qualname__ if kind.__repr__ is object.__repr__ else re.sub(r" at 0x[0-9a-f]+", "", repr(value))
    cells = [cell.cell_contents for cell in getattr(value, "__closure__", None) or () if _filled(cell)]
    plain_cells = [str(cell) for cell in cells if isinstance(cell, bool | int | float | str)]
    return f"{name}({', '.join(plain_cells)})" if plain_cells else str(name)


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
