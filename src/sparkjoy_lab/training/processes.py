"""The processes of one run, as torchrun starts them: each samples and differentiates its share of every batch."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparkjoy.processes.meeting import absent

BEAT_SECONDS = 1.0
LOST_BEATS = 30
ADVICE = "The run ends here; started again, it goes on from its last checkpoint."


@dataclass(frozen=True)
class Share:
    """One process's part of what all do together. The first writes the files and speaks.

    >>> Share(rank=1, count=2).rows(10)
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

    def rows(self, total: int) -> slice:
        """This process's rows of `total`, which `count` divides."""
        size = total // self.count
        return slice(self.rank * size, (self.rank + 1) * size)

    def all_gather(self, part: Tensor) -> Tensor:
        """All processes' rows, in order, from equally many of each."""
        if self.count == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.count)]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a 0-dim tensor over the processes."""
        return value if self.count == 1 else self.all_gather(value.view(1)).mean()

    def broadcast(self, value: Any) -> Any:
        """What the first process has for `value`."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def reduce(self, counts: list[float]) -> list[float]:
        """The processes' sums to the first, zeros to the others."""
        if self.count == 1:
            return counts
        sums = self.all_gather(torch.tensor(counts, dtype=torch.float64)).view(self.count, -1).sum(dim=0)
        return sums.tolist() if self.first else [0.0] * len(counts)


WHOLE = Share()


class LogProbs(nn.Module):
    """A policy's log-probs as a forward pass, the one method that a wrapper such as DistributedDataParallel has."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, rows: Any) -> Tensor:
        log_probs: Tensor = self.policy.log_probs(rows)
        return log_probs


def share_of_this_process() -> Share:
    """As torchrun says by the environment; all of it without torchrun.

    Raises:
        ValueError: somebody else has set the environment, to what torchrun would not.
    """
    rank, count = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and count.isdecimal() and int(rank) < int(count)):
        raise ValueError(
            f"the environment has RANK={rank} and WORLD_SIZE={count}; expected both as torchrun sets them, or neither."
        )
    return Share(int(rank), int(count))


@contextmanager
def joined(share: Share) -> Iterator[None]:
    """Around work in which the processes meet: why it ended, if it did, one of them says and none is left waiting.

    Each process beats once a second, and looks whether the next one does. One that is stopped or lost ends the run
    after LOST_BEATS seconds; one that has ended, at once.

    Raises:
        SystemExit: status 2, after a sentence that one process has written to stderr.
    """
    if share.count == 1:
        yield
        return
    dist.init_process_group("gloo")
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(share, ended), daemon=True)
    watch.start()
    try:
        yield
        dist.barrier()  # a process that is done goes on to beat while the others work
    except ValueError as error:
        say_once(str(error))
        raise SystemExit(2) from None
    except RuntimeError as error:
        if not _lost_contact(error):
            raise
        lost = ", ".join(absent(share.rank, share.count, "run"))
        say_once(f"rank {lost} of {share.count} has ended. {ADVICE}")
        raise SystemExit(2) from None
    finally:
        ended.set()
        watch.join()  # an interpreter that shuts down around a thread in C++ aborts
        dist.destroy_process_group()


def say_once(sentence: str) -> None:
    """Write a line to stderr, unless another process of this run was the first to do so."""
    if _is_first_to_say():
        print(f"sparkjoy: {sentence}", file=sys.stderr, flush=True)


def _is_first_to_say() -> bool:
    try:
        share = share_of_this_process()
    except ValueError:  # which is what is to be said
        return True
    if share.count > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        with contextlib.suppress(RuntimeError):  # the store may have gone
            return bool(_store().add("said", 1) == 1)
    return share.first


def _store() -> Any:
    """A connection of one's own to the store through which the processes have found each other."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    within = timedelta(seconds=10)
    store = dist.TCPStore(address, port, timeout=within)  # type: ignore[attr-defined]  # torch has it, unlisted
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"sparkjoy/{start}", store)  # type: ignore[attr-defined]  # torch has it, unlisted


def _watch(share: Share, ended: threading.Event) -> None:
    """Beat, and end this process when the next one has missed too many beats."""
    other = (share.rank + 1) % share.count
    count, missed = 0, 0  # in beats of one's own, not on the clock, which goes on while all are stopped
    with contextlib.suppress(RuntimeError):  # the store goes with who started the processes, and so do they
        store = _store()
        while not ended.wait(BEAT_SECONDS):
            store.add(f"beat/{share.rank}", 1)
            before, count = count, store.add(f"beat/{other}", 0)
            missed = missed + 1 if count == before else 0
            if missed >= LOST_BEATS and not ended.is_set():
                seconds = LOST_BEATS * BEAT_SECONDS
                say_once(
                    f"rank {other} of {share.count} was stopped or lost: nothing was heard of it for {seconds:g} "
                    f"seconds. {ADVICE}"
                )
                os._exit(2)  # the main thread waits where nothing can wake it


def _lost_contact(error: RuntimeError) -> bool:
    """Whether another process is not there, as torch, gloo or the engine say it."""
    return isinstance(error, dist.DistError) or any(part in str(error) for part in ("gloo", "does not answer"))


def refuse_several_processes(command: str) -> None:
    """Raise a ValueError under torchrun with more than one process."""
    count = share_of_this_process().count
    if count > 1:
        raise ValueError(
            f"{command} runs in one process, not in {count}; start it without torchrun. `sparkjoy train reversal` runs "
            "in several."
        )
