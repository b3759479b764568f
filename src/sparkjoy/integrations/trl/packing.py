"""Kept completions of several micro-batches packed into few, with the same gradient.

TRL divides a micro-batch's loss by something of that micro-batch. A kept row remembers what its own was divided by, and
is scaled by what the packed one divides by over that, times its weight where the gate gave one. The scale goes on its
advantage, which every policy loss of TRL is proportional to. A dummy row is a copy of a row at scale and weight 0.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sparkjoy.prefix_tree import fold

Normalizer = Literal["constant", "rows", "tokens"]
Rows = dict[str, Any]
"""A micro-batch as TRL has it: tensors with the row as leading dimension, and 0-dim ones for the whole batch."""

LOSS_NORMALIZERS: dict[str, Normalizer] = {
    "dapo": "constant",  # the tokens of the generation batch, a number that packing does not change
    "cispo": "constant",
    "vespo": "constant",
    "grpo": "rows",
    "sapo": "rows",
    "dr_grpo": "rows",
    "luspo": "rows",
    "bnpo": "tokens",
}
PROMPT = ("prompt_ids", "prompt_mask")
OWN = ("gate_keep", "gate_idle")
NUMBERS = ("gate_weight", "gate_divisor", "gate_entropy_divisor")


class Unit(NamedTuple):
    """Rows that stay in one micro-batch, and the tokens that a pass over them computes."""

    rows: list[Rows]
    tokens: int


def loss_mask(rows: Rows) -> Tensor:
    """(n, T), 1 for tokens that the loss counts."""
    mask: Tensor = rows["completion_mask"]
    return mask if rows.get("tool_mask") is None else mask * rows["tool_mask"]


def whole(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts and completions side by side: ids, mask, and which tokens are a completion's; each (n, P + T)."""
    ids = torch.cat([rows["prompt_ids"], rows["completion_ids"]], dim=1)
    mask = torch.cat([rows["prompt_mask"], rows["completion_mask"]], dim=1)
    scored = torch.cat([torch.zeros_like(rows["prompt_mask"]), rows["completion_mask"]], dim=1)
    return ids, mask, scored


def pack(
    window: Sequence[Rows],
    normalizer: Normalizer,
    pad_token_id: int,
    *,
    trim_prompts: bool,
    share_out: Callable[[list[Unit]], tuple[list[Unit], list[tuple[int, int]]]],
    spread: bool = False,
    room: int | None = None,
) -> list[Rows]:
    """The micro-batches of a window, which one optimizer step sees together, with their kept rows packed.

    Those left without rows come first and hold one dummy row, with `gate_idle` set: they need not run.

    Args:
        window: micro-batches of equal size, with `gate_keep` (B,) bool.
        normalizer: what TRL divides the loss of a micro-batch by.
        pad_token_id: fills ids.
        trim_prompts: cut the padding left of prompts, which shifts absolute positions.
        share_out: `units -> (units of this process, places)`: each process is to have a unit for each place, given as
            tokens and rows, tokens ascending, of which its own of that rank has no more.
        spread: have the largest micro-batch as small as can be, instead of as few as hold the rows.
        room: where rows share tokens, the distinct ones that a micro-batch holds, of the same number on all processes:
            rows of a prompt stay together then, and their number is not limited.
    """
    size = len(window[0]["gate_keep"])
    kept = [row for rows in window for row in _kept_rows(rows, normalizer, trim_prompts)]
    shortest = min(kept, key=length) if kept else _any_row(window[0], trim_prompts)
    dummy = {**shortest, "gate_weight": 0.0}
    units, places = share_out([Unit([row], length(row)) for row in kept] if room is None else by_prompt(kept, room))
    filled = [Unit([dummy], 0)] * (len(places) - len(units)) + sorted(units, key=lambda unit: unit.tokens)
    tokens = [tokens for tokens, _ in places]
    if room is None:
        cuts = least_memory(tokens, len(window), size) if spread else _fewest(len(tokens), size)
    else:
        batches = len(window) if spread else min(len(window), len(_cuts(tokens, len(tokens), room)) - 1)
        cuts = least_memory(tokens, batches, len(tokens))
    shared = {name: value for name, value in window[0].items() if isinstance(value, Tensor) and value.dim() == 0}
    packed = []
    for first, stop in pairwise(cuts):
        rows = []
        for unit, (_, count) in zip(filled[first:stop], places[first:stop], strict=True):
            rows += unit.rows + [{**unit.rows[0], "gate_weight": 0.0}] * (count - len(unit.rows))
        packed.append(_micro_batch(rows, normalizer, pad_token_id) | shared)
    idle = _micro_batch([dummy], normalizer, pad_token_id) | shared | {"gate_idle": True}
    return [idle] * (len(window) - len(packed)) + packed


def by_prompt(rows: Sequence[Rows], most: int) -> list[Unit]:
    """The rows of each prompt together, in parts where they have more than `most` distinct tokens."""
    groups: dict[tuple[int, ...], list[Rows]] = {}
    for row in rows:
        groups.setdefault(tuple(row["prompt_ids"].tolist()), []).append(row)
    pending = [sorted(group, key=lambda row: row["completion_ids"].tolist()) for group in groups.values()]
    units = []
    while pending:
        group = pending.pop()
        tokens, half = distinct_tokens(group), len(group) // 2
        if tokens > most and half:
            pending += [group[:half], group[half:]]
        else:
            units.append(Unit(group, tokens))
    return units


def distinct_tokens(rows: Sequence[Rows]) -> int:
    """Nodes of the prefix tree of one prompt's rows."""
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    batch = {name: pad_sequence([row[name] for row in rows], True) for name in names}
    return round(float(fold(*whole(batch)).shares.sum()))


def _fewest(rows: int, size: int) -> list[int]:
    """Where to cut rows for as few micro-batches of at most `size` rows as hold them."""
    batches = -(-rows // size)
    return [rows * batch // max(1, batches) for batch in range(batches + 1)]


def least_memory(lengths: Sequence[int], batches: int, size: int) -> list[int]:
    """Where to cut rows of ascending length for the least padded tokens in the largest micro-batch.

    Of the ways to do so it takes one with the fewest micro-batches.

    Args:
        lengths: ascending; at most `batches * size` of them.
        batches: micro-batches at most.
        size: rows of a micro-batch at most.

    >>> least_memory([1, 1, 1, 1, 8, 8], batches=4, size=4)
    [0, 4, 5, 6]
    """
    longest = max(lengths, default=0)
    costs = range(longest, longest * size + 1)
    fits = bisect_left(costs, True, key=lambda most: len(_cuts(lengths, size, most)) <= batches + 1)
    return _cuts(lengths, size, costs[fits])


def _cuts(lengths: Sequence[int], size: int, most: int) -> list[int]:
    """Where to cut for micro-batches that are full: at most `size` rows and `most` padded tokens, or a single row."""
    cuts = [0]
    for row, length in enumerate(lengths):
        rows = row + 1 - cuts[-1]
        if rows > 1 and (rows > size or rows * length > most):
            cuts.append(row)
    return [*cuts, len(lengths)] if lengths else cuts


def _kept_rows(rows: Rows, normalizer: Normalizer, trim_prompts: bool) -> list[Rows]:
    divisor, entropy_divisor = (_divides_by(rows, how) for how in (normalizer, "tokens"))
    weights = rows["gate_weight"].tolist() if "gate_weight" in rows else [1.0] * len(rows["gate_keep"])
    return [
        _row(rows, index, trim_prompts)
        | {"gate_weight": weights[index], "gate_divisor": divisor, "gate_entropy_divisor": entropy_divisor}
        for index in rows["gate_keep"].nonzero().flatten().tolist()
    ]


def _divides_by(rows: Rows, normalizer: Normalizer) -> float:
    """What TRL divides the loss of a micro-batch by; its entropy term is divided by tokens, whatever the loss."""
    mask = loss_mask(rows)
    return {"constant": 1.0, "rows": float(len(mask)), "tokens": max(1.0, float(mask.sum()))}[normalizer]


def _any_row(rows: Rows, trim_prompts: bool) -> Rows:
    """A row to fill with where none is kept: the shortest that has a token, if there is one."""
    tokens = loss_mask(rows).sum(dim=1)
    index = int(tokens.masked_fill(tokens == 0, torch.iinfo(tokens.dtype).max).argmin())
    return _row(rows, index, trim_prompts) | {"gate_divisor": 1.0, "gate_entropy_divisor": 1.0}


def _row(rows: Rows, index: int, trim_prompts: bool) -> Rows:
    """One row without its padding."""
    width = rows["completion_ids"].shape[1]
    present = (rows["completion_mask"][index] != 0).nonzero()
    length = int(present[-1]) + 1 if len(present) else 1
    start = int(rows["prompt_mask"][index].argmax()) if trim_prompts else 0
    row: Rows = {}
    for name, value in rows.items():
        if value is None or name in OWN or (isinstance(value, Tensor) and value.dim() == 0):
            continue
        of_row = value[index]
        if name in PROMPT:
            of_row = of_row[start:]
        elif isinstance(of_row, Tensor) and of_row.dim() and len(of_row) == width:  # of each token, whoever added it
            of_row = of_row[:length]
        row[name] = of_row
    return row


def length(row: Rows) -> int:
    """Tokens of a row's prompt and completion, which is what it costs."""
    return len(row["prompt_ids"]) + len(row["completion_ids"])


def _micro_batch(rows: Sequence[Rows], normalizer: Normalizer, pad_token_id: int) -> Rows:
    batch: Rows = {}
    lengths = [len(row["completion_ids"]) for row in rows]
    for name in rows[0]:
        values = [row[name] for row in rows]
        if name in PROMPT:
            batch[name] = pad_sequence(values, True, pad_token_id if name == "prompt_ids" else 0, padding_side="left")
        elif isinstance(values[0], Tensor) and values[0].dim() and list(map(len, values)) == lengths:
            batch[name] = pad_sequence(values, True, pad_token_id if name == "completion_ids" else 0)
        elif name in NUMBERS:
            batch[name] = torch.tensor(values, device=rows[0]["advantages"].device)
        else:
            batch[name] = torch.stack(values) if isinstance(values[0], Tensor) else values
    for scale, how in (("gate_scale", normalizer), ("gate_entropy_scale", "tokens")):
        batch[scale] = batch["gate_weight"] * _divides_by(batch, how) / batch.pop(scale.replace("scale", "divisor"))
    return batch | {"gate_idle": False}
