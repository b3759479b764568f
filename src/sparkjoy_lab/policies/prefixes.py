"""Which answers are equal so far: so are their states, and a sampler needs to read each distinct prefix only once."""

from __future__ import annotations

import torch
from torch import Tensor

OFTEN, MANY = 0.5, 0.2
"""New columns per old one, and columns per answer, from which on sharing would soon save less than it costs."""


class SharedPrefixes:
    """Columns of a sampler's cache, one for each distinct prefix, and which of them each answer reads.

    A prompt's answers begin in one column. Where their newest tokens differ, some move to new columns, copies of the
    old one.

    >>> prefixes = SharedPrefixes(prompts=3, answers_per_prompt=2, device=torch.device("cpu"))
    >>> prefixes.columns, prefixes.leaders
    (tensor([0, 0, 1, 1, 2, 2]), tensor([0, 2, 4]))
    >>> prefixes.split(torch.tensor([5, 5, 4, 5, 4, 4]))
    tensor([0, 1, 2, 1])
    >>> prefixes.columns, prefixes.leaders
    (tensor([0, 0, 1, 3, 2, 2]), tensor([0, 2, 4, 3]))

    Args:
        prompts: P.
        answers_per_prompt: A.
        device: where the columns are kept. Elsewhere than on a CPU every answer has a column of its own from the start:
            to see which differ, the host would have to wait for the device at every token.
    """

    def __init__(self, prompts: int, answers_per_prompt: int, device: torch.device) -> None:
        self._answers = prompts * answers_per_prompt
        self.copies = 1 if device.type == "cpu" else answers_per_prompt
        """Columns a prompt begins with."""
        every = torch.arange(self._answers, device=device)
        self.leaders = every[:: answers_per_prompt // self.copies]
        """(columns,), the number of an answer that reads each column."""
        self.columns = torch.div(every, answers_per_prompt // self.copies, rounding_mode="floor")
        """(P * A,), the column each answer reads."""

    @property
    def apart(self) -> bool:
        """Whether every answer has a column of its own."""
        return len(self.leaders) == self._answers

    def split(self, tokens: Tensor) -> Tensor | None:
        """Part the answers whose newest `tokens` (P * A,) differ from those of others in their column.

        Returns:
            The old column of every column there is now, or None where nothing changes. Old columns stay where they are,
            but for the last time, when every answer gets the column of its own number.
        """
        if self.apart:
            return None
        movers = (tokens != tokens[self.leaders][self.columns]).nonzero().squeeze(1)
        if not len(movers):
            return None
        moved_from, have = self.columns[movers], len(self.leaders)
        prefixes, number = (moved_from * (int(tokens.max()) + 1) + tokens[movers]).unique(return_inverse=True)
        total = have + len(prefixes)
        if total == self._answers or (len(prefixes) >= OFTEN * have and total >= MANY * self._answers):
            old, self.columns = self.columns, torch.arange(self._answers, device=tokens.device)
            self.leaders = self.columns
            return old
        first = movers.new_full((len(prefixes),), self._answers).scatter_reduce_(0, number, movers, "amin")
        old = torch.cat([torch.arange(have, device=tokens.device), self.columns[first]])
        self.columns[movers] = number + have
        self.leaders = torch.cat([self.leaders, first])
        return old
