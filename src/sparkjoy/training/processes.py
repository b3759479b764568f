"""The processes of one run, as torchrun starts them: each samples and differentiates its share of every batch."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """One process's part of what all do together. The first writes the files and speaks.

    >>> Share(rank=1, count=2).of(10)
    slice(5, 10, None)

    Args:
        rank: of this process.
        count: of all.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes the files and speaks."""
        return self.rank == 0

    def of(self, total: int) -> slice:
        """This process's rows of `total`, which `count` divides."""
        size = total // self.count
        return slice(self.rank * size, (self.rank + 1) * size)

    def whole(self, part: Tensor) -> Tensor:
        """All processes' rows, in order, from equally many of each."""
        if self.count == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.count)]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a 0-dim tensor over the processes."""
        return value if self.count == 1 else self.whole(value.view(1)).mean()

    def told(self, value: Any) -> Any:
        """What the first process has for `value`."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def handed_over(self, counts: list[float]) -> list[float]:
        """The processes' sums for the first, zeros for the others."""
        if self.count == 1:
            return counts
        sums = self.whole(torch.tensor(counts, dtype=torch.float64)).view(self.count, -1).sum(dim=0)
        return sums.tolist() if self.first else [0.0] * len(counts)


WHOLE = Share()


def share_of_this_process() -> Share:
    """As torchrun says by the environment; all of it without torchrun."""
    return Share(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


@contextmanager
def joined(share: Share) -> Iterator[None]:
    """Around work in which the processes meet; an error of one that is not the first is told here."""
    if share.count == 1:
        yield
        return
    dist.init_process_group("gloo")
    try:
        yield
    except ValueError as error:
        if share.first:
            raise
        print(f"sparkjoy, rank {share.rank}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        dist.destroy_process_group()


def refuse_several_processes(command: str) -> None:
    """Raise a ValueError under torchrun with more than one process."""
    count = share_of_this_process().count
    if count > 1:
        raise ValueError(
            f"{command} runs in one process, not in {count}; start it without torchrun. `sparkjoy train reversal` runs "
            "in several."
        )
