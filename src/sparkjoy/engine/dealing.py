"""Survivors moved between processes, so that each has equally many to differentiate.

Only the surplus moves: the last survivors of ranks that have more than their share, as bytes, in one exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sparkjoy.engine.inputs import Inputs
from sparkjoy.engine.survivors import map_tensors
from sparkjoy.gates import Decision

Layout = list[tuple[tuple[int, ...], torch.dtype]]
"""Of every tensor of a batch the shape of a row and the type."""


def row_layout(inputs: Inputs) -> Layout:
    """How a row looks; rows move only between ranks where they look alike."""
    return [(tuple(tensor.shape[1:]), tensor.dtype) for tensor in _tensors(inputs)]


def deal(
    inputs: Inputs,
    decision: Decision,
    sizes: list[int],
    rank: int,
    layout: Layout,
    all_gather: Callable[[Tensor], Tensor],
) -> tuple[Inputs, Decision]:
    """The survivors this rank is to differentiate, all of them kept, each with its weight.

    Args:
        inputs: this rank's rows.
        decision: about all rows.
        sizes: rows of every rank.
        rank: this one.
        layout: of a row, the same on all ranks.
        all_gather: (n, ...) on every rank -> (ranks, n, ...).
    """
    first = sum(sizes[:rank])
    kept_rows = decision.keep[first : first + sizes[rank]].nonzero().squeeze(1)
    counts = [int(part.count_nonzero()) for part in decision.keep.split(sizes)]
    shares = fair_shares(counts)
    surplus = [max(0, count - share) for count, share in zip(counts, shares, strict=True)]
    own = inputs.take(kept_rows)
    weight = decision.weight[first : first + sizes[rank]][kept_rows]
    if any(surplus):
        leaving = kept_rows.shape[0] - surplus[rank]
        columns = [_as_bytes(tensor[leaving:]) for tensor in (*_tensors(own), weight)]
        parcel = torch.cat(columns, dim=1)
        parcels = all_gather(torch.nn.functional.pad(parcel, (0, 0, 0, max(surplus) - surplus[rank])))
        moved = torch.cat([rows[:count] for rows, count in zip(parcels, surplus, strict=True)])
        lacking = [max(0, share - count) for count, share in zip(counts, shares, strict=True)]
        begin = sum(lacking[:rank])
        arrived = moved[begin : begin + lacking[rank]]
        widths = [column.shape[1] for column in columns]
        *rows, weights = arrived.split(widths, dim=1)
        parts = iter([_from_bytes(part, shape, dtype) for part, (shape, dtype) in zip(rows, layout, strict=True)])
        own = _map_inputs(own, lambda tensor: torch.cat([tensor[:leaving], next(parts).to(tensor.device)]))
        weight = torch.cat([weight[:leaving], _from_bytes(weights, (), weight.dtype).to(weight.device)])
    ones = torch.ones_like(weight)
    return own, Decision(ones.bool(), decision.price, ones, weight)


def fair_shares(counts: list[int]) -> list[int]:
    """Equal shares of the sum of `counts`; who has more keeps one of the remainder, so that little moves.

    >>> fair_shares([5, 0, 2])
    [3, 2, 2]
    """
    each, over = divmod(sum(counts), len(counts))
    richest = sorted(range(len(counts)), key=lambda rank: -counts[rank])[:over]
    return [each + (rank in richest) for rank in range(len(counts))]


def _tensors(inputs: Inputs) -> Iterator[Tensor]:
    """All that has rows, in the order in which `_map_inputs` changes it."""
    seen: list[Tensor] = []
    _map_inputs(inputs, lambda tensor: seen.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return iter(seen)


def _map_inputs(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    def part(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else change(tensor)

    return Inputs(
        map_tensors(inputs.batch, change),
        change(inputs.advantages),
        part(inputs.log_probs),
        part(inputs.behavior_log_probs),
        part(inputs.mask),
        part(inputs.row_tokens),
        inputs.row_shapes,
    )


def _as_bytes(rows: Tensor) -> Tensor:
    """(n, bytes of a row)."""
    width = rows.element_size() * rows.shape[1:].numel()
    return rows.detach().contiguous().view(-1).view(torch.uint8).cpu().view(len(rows), width)


def _from_bytes(rows: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """(n, *shape)."""
    return rows.clone(memory_format=torch.contiguous_format).view(-1).view(dtype).view(len(rows), *shape)
