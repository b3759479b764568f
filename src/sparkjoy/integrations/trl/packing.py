"""TRL's GRPOTrainer, packing: the kept completions of an optimizer step in few or small micro-batches.

TRL divides a micro-batch's loss by something of that micro-batch. A kept row remembers what its own was divided by, and
is scaled by what the packed one divides by over that, times its weight where the gate gave one. The scale goes on its
advantage, which every policy loss of TRL is proportional to. A dummy row is a copy of a row at scale and weight 0.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise, zip_longest
from typing import Any, Literal, NamedTuple

import torch
from accelerate.utils import gather_object, send_to_device
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sparkjoy.integrations.trl.comparing import ComparingMixin
from sparkjoy.integrations.trl.rows import Rows, loss_mask, whole
from sparkjoy.prefix_tree import fold

Normalizer = Literal["constant", "rows", "tokens"]
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


class PackingMixin(ComparingMixin):
    """What packs in `KondoGRPOMixin`, which see."""

    gate_normalizer: Normalizer | None = None

    def _prepare_inputs(self, generation_batch: Any) -> Rows:
        inputs: Rows = super()._prepare_inputs(generation_batch)
        if "gate_keep" not in inputs:
            return inputs  # evaluation, no gate, or packed before
        self._buffered_inputs = self._pack(self._buffered_inputs)
        place: int = self._step % self.args.steps_per_generation
        return self._buffered_inputs[place]

    def _pack(self, buffer: list[Rows]) -> list[Rows]:
        """The micro-batches of a generation batch with kept rows packed, never across two optimizer steps."""
        size = math.gcd(self.args.gradient_accumulation_steps, self.args.steps_per_generation)
        return [rows for first in range(0, len(buffer), size) for rows in self._packed(buffer[first : first + size])]

    def _packed(self, window: list[Rows]) -> list[Rows]:
        """The micro-batches of a window, which one optimizer step sees together, with their kept rows packed.

        Those left without rows come first and hold one dummy row, with `gate_idle` set: they need not run. Where rows
        share tokens, those of a prompt stay together, and a micro-batch holds any number of them.
        """
        normalizer, trims = self.gate_normalizer or LOSS_NORMALIZERS[self.loss_type], self._trims_prompts
        pad, size = self._tokenizer.pad_token_id, len(window[0]["gate_keep"])
        kept = [row for rows in window for row in _kept_rows(rows, normalizer, trims)]
        dummy = (min(kept, key=_length) if kept else _any_row(window[0], trims)) | {"gate_weight": 0.0}
        room = self._room(window[0])
        units, places = self._share_out(
            [Unit([row], _length(row)) for row in kept] if room is None else by_prompt(kept, room)
        )
        filled = [Unit([dummy], 0)] * (len(places) - len(units)) + sorted(units, key=lambda unit: unit.tokens)
        tokens, spread = [tokens for tokens, _ in places], self.args.gate_pack_for == "memory"
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
                rows += unit.rows + [unit.rows[0] | {"gate_weight": 0.0}] * (count - len(unit.rows))
            packed.append(_micro_batch(rows, normalizer, pad) | shared)
        idle = _micro_batch([dummy], normalizer, pad) | shared | {"gate_idle": True}
        return [idle] * (len(window) - len(packed)) + packed

    def _room(self, rows: Rows) -> int | None:
        """Tokens of a micro-batch of TRL's, padding included; the most of any process. None: tokens are not shared."""
        if not self._shares:
            return None
        return int(self._of_all(torch.tensor([whole(rows)[0].numel()], device=rows["advantages"].device)).max())

    def _share_out(self, units: list[Unit]) -> tuple[list[Unit], list[tuple[int, int]]]:
        """This process's share of the units of all, and the places that every process fills, by ascending tokens.

        A place is the tokens and rows of the largest unit that a process has there; who has none gets a dummy row.
        """
        processes = self.accelerator.num_processes
        if processes == 1 or not self._trims_prompts:  # or else prompts are padded to another length there
            own = sorted(((unit.tokens, len(unit.rows)) for unit in units), reverse=True)
            of_ranks = [list(rank) for rank in zip_longest(*gather_object([own]), fillvalue=(0, 0))][::-1]
        else:
            everyone = sorted(gather_object(send_to_device(units, "cpu")), key=lambda unit: unit.tokens)
            units = send_to_device(everyone[self.accelerator.process_index :: processes], self.accelerator.device)
            sizes = [(unit.tokens, len(unit.rows)) for unit in everyone]
            of_ranks = [sizes[max(0, stop - processes) : stop] for stop in range(len(sizes), 0, -processes)][::-1]
        return units, [(max(tokens), max(rows)) for tokens, rows in (zip(*rank, strict=True) for rank in of_ranks)]


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
    """The kept rows of a micro-batch without their padding, each with its weight and what its loss was divided by.

    Args:
        rows: with `gate_keep` (B,) bool.
        normalizer: what TRL divides the loss of a micro-batch by.
        trim_prompts: cut the padding left of prompts, which shifts absolute positions.
    """
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


def _length(row: Rows) -> int:
    """Tokens of a row's prompt and completion, which is what it costs."""
    return len(row["prompt_ids"]) + len(row["completion_ids"])


def _micro_batch(rows: Sequence[Rows], normalizer: Normalizer, pad_token_id: int) -> Rows:
    """Rows that were cut out, padded to one length, with the scales that give each the gradient it had.

    Args:
        rows: at least one.
        normalizer: what TRL divides the loss of a micro-batch by.
        pad_token_id: fills ids.
    """
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
