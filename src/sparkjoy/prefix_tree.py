"""Rows of tokens as prefix trees, so that one forward pass of a causal model computes each distinct prefix once.

A causal model's state at a token depends on the tokens before it only. Rows that begin alike (answers to one prompt,
equal answers) share the nodes of what they have in common:

    12 + 3 = 15 .           12 + 3 = ─┬─ 15 ── .
    12 + 3 = 15 ,     ->              │    └── ,
    12 + 3 = 16 .                     └─ 16 ── .

A node has its token's position id, and it attends to its ancestors only: it computes what each of its rows would.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

UNSCORED = -100
"""The label of a node without one, which torch's losses ignore."""

SHORT = 0.1
"""Of `balance`: trees up to this long are not split, since attention is a small part of their work."""


@dataclass(frozen=True)
class PrefixTree:
    """Rows (n, T) folded into R rows of N places. Trees that share a row do not see each other.

    A node is a distinct prefix together with the next token to score, so that it has at most one label: where rows
    branch, the last common token has a node for each branch. Tokens after a row's last scored one have no node.

    Args:
        ids: (R, N), tokens; 0 where there is no node.
        columns: (R, N), in the rows that were folded.
        positions: (R, N), position ids.
        labels: (R, N), the token scored after a node, or `UNSCORED`.
        visible: (R, N) bool, nodes whose mask is 1: others may attend to them.
        ends: (R, N), the place after a node's last descendant.
        places: (n, T), where in R * N a token is scored: at the token before it.
        scored: (n, T) bool, tokens with a score.
        shares: (n,), the nodes of each row, each divided by the number of rows that have it.
    """

    ids: Tensor
    columns: Tensor
    positions: Tensor
    labels: Tensor
    visible: Tensor
    ends: Tensor
    places: Tensor
    scored: Tensor
    shares: Tensor

    def sees(self, window: int | None = None) -> Tensor:
        """(R, N, N) bool: whom each node attends to, which is itself at least.

        Args:
            window: columns that a sliding window shows to a token, its own included; None: all before it.
        """
        place = torch.arange(self.ids.shape[1], device=self.ids.device)
        other, node = place[None, None, :], place[None, :, None]
        sees = (other <= node) & (node < self.ends[:, None, :]) & self.visible[:, None, :]
        if window is not None:
            sees &= self.columns[:, :, None] - self.columns[:, None, :] < window
        return sees | (~sees.any(dim=2, keepdim=True) & (other == node))  # attention to nobody would be NaN

    def unfold(self, values: Tensor) -> Tensor:
        """(n, T): what was computed for the labels, (R, N), at the tokens they stand for; 0 where unscored."""
        return values.flatten()[self.places].where(self.scored, 0)


def fold(
    ids: Tensor, mask: Tensor, scored: Tensor, *, positions: Tensor | None = None, balance: float = torch.inf
) -> PrefixTree:
    """The rows as trees, laid out for the least work of a forward pass.

    >>> ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9], [5, 6, 4, 4]])
    >>> tree = fold(ids, torch.ones(3, 4), torch.tensor([[0, 0, 1, 1]] * 3))
    >>> tree.ids  # 6 twice, as 4 and 7 follow, and 7 twice, as 8 and 9 do
    tensor([[5, 6, 4, 6, 7, 7]])
    >>> tree.labels
    tensor([[-100,    4,    4,    7,    8,    9]])
    >>> tree.unfold(tree.labels)
    tensor([[0, 0, 7, 8],
            [0, 0, 7, 9],
            [0, 0, 4, 4]])

    Args:
        ids: (n, T) tokens.
        mask: (n, T), 0 for padding, on either side or in between.
        scored: (n, T), nonzero for tokens whose log-prob is wanted.
        positions: (n, T) position ids, which depend on the mask alone; None: a token's is its column.
        balance: as in `work`, which is kept small: large trees are split into some that repeat what they share.
    """
    valid, scored = mask.bool(), scorable(mask, scored)
    precedes = pad(scored[:, 1:], (0, 1))
    labels = ids.long().roll(-1, dims=1).where(precedes, UNSCORED)
    needed = precedes | valid & (scored.flip(1).cumsum(dim=1).flip(1) > scored.long())
    keys = (((ids.long() * 2 + valid) << 32) + labels - UNSCORED).where(needed, -1)
    whole = forest = _Forest(keys, torch.zeros_like(keys[:, 0]))
    rows = _rows_of(forest.sizes, balance)
    parts = 2
    while rows.nodes > SHORT * balance:
        split = _Forest(keys, whole.parts(parts))
        of_split = _rows_of(split.sizes, balance)
        if of_split.work >= rows.work:
            break
        forest, rows, parts = split, of_split, 2 * parts
    return forest.laid_out(rows, scored, positions)


def scorable(mask: Tensor, scored: Tensor) -> Tensor:
    """(n, T) bool: the valid tokens of `scored` that come after another valid one."""
    valid = mask.bool()
    return scored.bool() & valid & (valid.cumsum(dim=1) > 1)


def work(shape: Sequence[int], balance: float) -> float:
    """Of a forward pass, in tokens: rows * length * (1 + length / balance).

    Args:
        shape: (rows, length), padding included.
        balance: length of a row at which attention costs as much as all the rest.
    """
    rows, length = shape
    return rows * length * (1 + length / balance)


@dataclass(frozen=True)
class _Rows:
    """Where trees stand: the row of each, and the place in it that it begins at."""

    number: int
    nodes: int
    of_tree: list[int]
    begin: list[int]
    work: float


def _rows_of(sizes: Tensor, balance: float) -> _Rows:
    """Trees of these sizes in as many rows (a power of 2, or one for each) as makes for the least work."""
    trees: list[int] = sizes.tolist()
    numbers = {min(2**power, len(trees)) for power in range(len(trees).bit_length() + 1)}
    return min((_spread(trees, number, balance) for number in sorted(numbers)), key=lambda rows: rows.work)


def _spread(trees: Sequence[int], number: int, balance: float) -> _Rows:
    """The largest tree first, each in the row with the most room."""
    filled = [(0, row) for row in range(number)]
    of_tree, begin = [0] * len(trees), [0] * len(trees)
    for tree in sorted(range(len(trees)), key=lambda tree: -trees[tree]):
        place, row = filled[0]
        of_tree[tree], begin[tree] = row, place
        heapq.heapreplace(filled, (place + trees[tree], row))
    nodes = max(1, max(filled)[0])
    return _Rows(number, nodes, of_tree, begin, work((number, nodes), balance))


class _Forest:
    """The nodes of rows, numbered tree by tree and depth first in each.

    Args:
        keys: (n, T), equal where token, mask and label are; -1 where a row has no node.
        parts: (n,), rows of different parts share nothing.
    """

    def __init__(self, keys: Tensor, parts: Tensor) -> None:
        rows, self.of_row = torch.cat([parts.unsqueeze(1), keys], dim=1).unique(dim=0, return_inverse=True)
        common = torch.zeros_like(rows, dtype=torch.bool)  # with the row before
        common[1:] = (rows[1:] == rows[:-1]).cumprod(dim=1)
        self.keys, self.common = rows[:, 1:], common[:, 1:]
        self.new = ~self.common & (self.keys >= 0)
        numbers = self.new.flatten().cumsum(dim=0).view_as(self.keys) - 1
        self.node = numbers.where(self.new, -1).cummax(dim=0).values
        self.tree = (~(self.common & (self.keys >= 0)).any(dim=1)).cumsum(dim=0) - 1
        of_row = self.new.sum(dim=1)
        self.first = of_row.cumsum(dim=0) - of_row  # node of a row
        self.sizes = torch.zeros(int(self.tree[-1]) + 1, dtype=torch.long).to(of_row).index_add(0, self.tree, of_row)

    def parts(self, number: int) -> Tensor:
        """(n,): the rows of each tree in that many parts, alike rows in the same."""
        rows = self.tree.bincount()
        place = torch.arange(len(self.tree), device=rows.device) - (rows.cumsum(dim=0) - rows)[self.tree]
        part: Tensor = self.tree * number + place * number // rows[self.tree]
        return part[self.of_row]

    def laid_out(self, rows: _Rows, scored: Tensor, positions: Tensor | None) -> PrefixTree:
        """The trees in these rows."""
        device, size = self.keys.device, int(self.new.sum())
        row, column = self.new.nonzero().unbind(dim=1)  # where each node is new, in the order of their numbers
        start = torch.tensor(rows.of_tree, device=device) * rows.nodes
        begin = start + torch.tensor(rows.begin, device=device)
        moved = (begin - self.sizes.cumsum(dim=0) + self.sizes)[self.tree]  # (U,), from a number to a place in R * N
        place = torch.arange(size, device=device) + moved[row]
        # A node's descendants end where the next row begins that does not have the node.
        breaks = torch.arange(len(self.tree), device=device).unsqueeze(1).where(~self.common, len(self.tree))
        breaks = pad(breaks.flip(0).cummin(dim=0).values.flip(0)[1:], (0, 0, 0, 1), value=len(self.tree))
        ends = pad(self.first, (0, 1), value=size)[breaks[row, column]] + (moved - start[self.tree])[row]
        keys = self.keys[row, column]
        if positions is not None:
            any_row = torch.zeros_like(self.tree).scatter(0, self.of_row, torch.arange(len(positions), device=device))
            positions = positions[any_row[row], column]

        def placed(values: Tensor, empty: int = 0) -> Tensor:
            full = torch.full((rows.number * rows.nodes,), empty, device=device)
            return full.scatter_(0, place, values).view(rows.number, rows.nodes)

        nodes = self.node.where(self.keys >= 0, size)[self.of_row]  # (n, T); `size` where there is none
        users = nodes.flatten().bincount(minlength=size + 1)
        shares = pad(1 / users[:size], (0, 1))[nodes].sum(dim=1)
        places = pad(place, (0, 1))[pad(nodes[:, :-1], (1, 0), value=size)]
        return PrefixTree(
            ids=placed(keys >> 33),
            columns=placed(column),
            positions=placed(column if positions is None else positions),
            labels=placed((keys & (1 << 32) - 1) + UNSCORED, UNSCORED),
            visible=placed(keys >> 32 & 1).bool(),
            ends=placed(ends),
            places=places,
            scored=scored,
            shares=shares,
        )
