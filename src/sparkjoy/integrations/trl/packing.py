"""Kept completions of several micro-batches packed into few, with the same gradient.

TRL divides a micro-batch's loss by something of that micro-batch. A kept row remembers what its own was divided by, and
is scaled by what the packed one divides by over that, times its weight where the gate gave one. The scale goes on its
advantage, which every policy loss of TRL is proportional to. A filler is a copy of a row at scale and weight 0.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

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
COMPLETION = (
    "advantages",  # where a trainer has them for each token
    "completion_ids",
    "completion_mask",
    "tool_mask",
    "old_per_token_logps",
    "sampling_per_token_logps",
    "ref_per_token_logps",
    "importance_sampling_ratio",
)
OWN = ("gate_keep", "gate_idle")
NUMBERS = ("gate_weight", "gate_divisor", "gate_entropy_divisor")


def loss_mask(rows: Rows) -> Tensor:
    """(n, T), 1 for tokens that the loss counts."""
    mask: Tensor = rows["completion_mask"]
    return mask if rows.get("tool_mask") is None else mask * rows["tool_mask"]


def pack(
    window: Sequence[Rows],
    normalizer: Normalizer,
    pad_token_id: int,
    *,
    trim_prompts: bool,
    share_out: Callable[[list[Rows]], tuple[list[Rows], list[int]]],
    spread: bool = False,
) -> list[Rows]:
    """The micro-batches of a window, which one optimizer step sees together, with their kept rows packed.

    Those left without rows come first and hold one filler, with `gate_idle` set: they need not run.

    Args:
        window: micro-batches of equal size, with `gate_keep` (B,) bool.
        normalizer: what TRL divides the loss of a micro-batch by.
        pad_token_id: fills ids.
        trim_prompts: cut the padding left of prompts, which shifts absolute positions.
        share_out: `rows -> (rows of this process, lengths)`: every process is to have a row for each length, of which
            its own of that rank, ascending, is no longer.
        spread: have the largest micro-batch as small as can be, instead of as few as hold the rows.
    """
    size = len(window[0]["gate_keep"])
    kept, lengths = share_out([row for rows in window for row in _kept_rows(rows, normalizer, trim_prompts)])
    each = len(lengths)
    filler = min(kept, key=length) if kept else _any_row(window[0], trim_prompts)
    filler = {**filler, "gate_weight": 0.0}
    kept = sorted(kept + [filler] * (each - len(kept)), key=length)
    cuts = least_memory(lengths, len(window), size) if spread else _fewest(each, size)
    batches = len(cuts) - 1
    shared = {name: value for name, value in window[0].items() if isinstance(value, Tensor) and value.dim() == 0}
    packed = [_micro_batch(kept[first:stop], normalizer, pad_token_id) | shared for first, stop in pairwise(cuts)]
    idle = _micro_batch([filler], normalizer, pad_token_id) | shared | {"gate_idle": True}
    return [idle] * (len(window) - batches) + packed


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

    def filled(most: int) -> list[int]:
        cuts = [0]
        for row, length in enumerate(lengths):
            rows = row + 1 - cuts[-1]
            if rows > size or rows * length > most:
                cuts.append(row)
        return [*cuts, len(lengths)] if lengths else cuts

    costs = range(max(lengths, default=0), max(lengths, default=0) * size + 1)
    return filled(costs[bisect_left(costs, True, key=lambda most: len(filled(most)) <= batches + 1)])


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
        elif name in COMPLETION and of_row.dim() and len(of_row) == width:  # a ratio may be of the whole row, (B, 1)
            of_row = of_row[:length]
        row[name] = of_row
    return row


def length(row: Rows) -> int:
    """Tokens of a row's prompt and completion, which is what it costs."""
    return len(row["prompt_ids"]) + len(row["completion_ids"])


def _micro_batch(rows: Sequence[Rows], normalizer: Normalizer, pad_token_id: int) -> Rows:
    batch: Rows = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if name in PROMPT:
            batch[name] = pad_sequence(values, True, pad_token_id if name == "prompt_ids" else 0, padding_side="left")
        elif name in COMPLETION and values[0].dim():
            batch[name] = pad_sequence(values, True, pad_token_id if name == "completion_ids" else 0)
        elif name in NUMBERS:
            batch[name] = torch.tensor(values, device=rows[0]["advantages"].device)
        else:
            batch[name] = torch.stack(values) if isinstance(values[0], Tensor) else values
    for scale, how in (("gate_scale", normalizer), ("gate_entropy_scale", "tokens")):
        batch[scale] = batch["gate_weight"] * _divides_by(batch, how) / batch.pop(scale.replace("scale", "divisor"))
    return batch | {"gate_idle": False}
