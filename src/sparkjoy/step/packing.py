"""How rows are divided into micro-batches: in order, or by length under a token budget with the padding cut off."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparkjoy import checks
from sparkjoy.step.batches import Rows, is_tensor_collection
from sparkjoy.step.inputs import Inputs

Trim = Callable[[Any, Tensor], tuple[Any, slice]]
"""`(batch, mask) -> (batch without needless padding, the columns of the mask that are left)`."""


@dataclass(frozen=True)
class TrimRight:
    """Cut the padding to the right that all rows of a micro-batch share, off the named tensors of a batch.

    What the mask ends with, the tensors end with: (n, T), (n, prompt + T) or any shape whose second dimension ends as
    the mask's does.

    >>> batch = {"tokens": torch.arange(8).view(2, 4), "id": torch.tensor([7, 8])}
    >>> TrimRight("tokens")(batch, torch.tensor([[1, 0, 0], [1, 1, 0]]).bool())
    ({'tokens': tensor([[0, 1, 2],
            [4, 5, 6]]), 'id': tensor([7, 8])}, slice(None, 2, None))

    Args:
        names: keys of a Mapping or TensorDict.
        multiple: round the length that is left up to a multiple of this: fewer shapes, where each new one costs a
            compilation.
    """

    names: tuple[str, ...]
    multiple: int

    def __init__(self, *names: str, multiple: int = 1) -> None:
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError(
                f"TrimRight got names {checks.described(names)}; expected the names of tensors, such as 'x'."
            )
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "multiple", checks.whole("multiple", multiple))

    def __call__(self, batch: Any, mask: Tensor) -> tuple[Any, slice]:
        """The batch, and the columns of the mask, without the shared padding."""
        names = set(batch.keys()) if isinstance(batch, Mapping) or is_tensor_collection(batch) else ()
        absent = [name for name in self.names if name not in names]
        if absent:
            raise ValueError(
                f"TrimRight finds no {absent[0]!r} in a {type(batch).__name__}; expected names of tensors in a Mapping "
                "or TensorDict. Trim other batches by a function of your own."
            )
        mask = checks.mask(checks.tensor("mask", mask, (2,), shape="(n, T)"), mask.shape)
        rows, width = mask.shape
        for name in self.names:
            tensor = batch[name]
            fits = isinstance(tensor, Tensor) and tensor.dim() > 1 and len(tensor) == rows and tensor.shape[1] >= width
            if not fits:
                raise ValueError(
                    f"batch[{name!r}] is {checks.described(tensor)}; expected a tensor of the mask's {rows} rows, "
                    f"whose second dimension ends as that of the mask does, of {width}."
                )
        length = int(self.lengths(mask).max())
        if length == width:
            return batch, slice(None)
        trimmed = batch.copy()
        for name in self.names:
            trimmed[name] = batch[name][:, : batch[name].shape[1] - (width - length)]
        return trimmed, slice(None, length)

    def lengths(self, mask: Tensor) -> Tensor:
        """(n,) columns that are left of each row (n, T) by itself."""
        last = (torch.arange(1, mask.shape[1] + 1, device=mask.device) * mask).amax(dim=1).clamp(min=1)
        return (-(-last // self.multiple) * self.multiple).clamp(max=mask.shape[1])


class Packing:
    """How rows become micro-batches.

    Args:
        rows: the most in one; None: no limit.
        tokens: the most columns of the mask in one, padding included; a single longer row goes alone. None: no limit.
        trim: cuts off padding; rows are then sorted by length, the longest first.
        group_by: entry of the batch; rows of equal values go together, and a micro-batch ends with its last group.

    Raises:
        TypeError, ValueError: one that `GatedBackward` does not take.
    """

    def __init__(self, rows: Any = None, tokens: Any = None, trim: Any = None, group_by: Any = None) -> None:
        expected = "a whole number of at least 1, or None for all at once"
        self.rows = None if rows is None else checks.whole("micro_batch_size", rows, expected)
        self.tokens = None if tokens is None else checks.whole("micro_batch_tokens", tokens, expected)
        if trim is not None:
            checks.function("trim", trim, "a function (batch, mask) -> (batch, columns), or None", ..., ...)
        if group_by is not None:
            checks.instance("group_by", group_by, str, "the name of an entry of the batch, or None")
        self.trim: Trim | None = trim
        self.group_by: str | None = group_by
        self.at_once = rows is tokens is trim is group_by is None
        """Whether all rows are one micro-batch, in their order."""

    def holds(self, inputs: Inputs, rows: int) -> bool:
        """Whether that many rows fit one micro-batch."""
        return self.at_once or rows <= (self._limit(inputs) or rows)

    def divide(self, inputs: Inputs, rows: Tensor | None) -> list[Rows]:
        """The micro-batches of `rows`, (n,) indices on the host (None: all), which together hold each row once."""
        total = inputs.total if rows is None else rows.shape[0]
        if total == 0:
            return []
        if self.group_by is not None:
            return self._by_group(inputs, torch.arange(total, device="cpu") if rows is None else rows)
        if self.trim is None or inputs.mask is None:
            size = self._limit(inputs) or total
            parts = [slice(start, min(start + size, total)) for start in range(0, total, size)]
            if rows is None:
                return list(parts)
            return [rows] if len(parts) == 1 else [rows[part] for part in parts]
        lengths_of = getattr(self.trim, "lengths", _spans)  # a user's function need not say what it leaves
        lengths = lengths_of(inputs.mask if rows is None else inputs.mask[rows]).cpu()
        lengths, order = lengths.sort(descending=True, stable=True)
        rows, spans = order if rows is None else rows[order], lengths.tolist()
        parts, start = [], 0
        while start < total:
            size = total - start if self.rows is None else self.rows
            if self.tokens is not None:
                size = min(size, max(1, self.tokens // max(1, spans[start])))
            parts.append(slice(start, start + size))
            start += size
        return [rows[part] for part in parts]

    def _by_group(self, inputs: Inputs, rows: Tensor) -> list[Rows]:
        if not hasattr(inputs.batch, "keys") or self.group_by not in inputs.batch.keys():  # noqa: SIM118  # TensorDict
            raise ValueError(
                f"group_by={self.group_by!r} names nothing in a {type(inputs.batch).__name__}; expected an entry of a "
                "Mapping or TensorDict, such as the prompts."
            )
        _, group = inputs.batch[self.group_by][rows].unique(dim=0, return_inverse=True)
        group, most, room, sizes = group.cpu(), self._limit(inputs) or len(rows), 0, []
        for size in group.bincount().tolist():
            if size > room:  # a new micro-batch, and for large groups full ones before it
                sizes += [most] * (size // most) + [size % most]
                room = most - size % most
            else:
                sizes[-1] += size
                room -= size
        return list(rows[group.argsort(stable=True)].split([size for size in sizes if size]))

    def trimmed(self, part: Inputs) -> tuple[Inputs, slice]:
        """`part` without needless padding, and the columns that are left."""
        if self.trim is None or part.mask is None:
            return part, slice(None)
        trimmed = self.trim(part.batch, part.mask)
        if not isinstance(trimmed, tuple) or len(trimmed) != 2 or not isinstance(trimmed[1], slice):
            raise TypeError(f"trim returned {checks.described(trimmed)}; expected a batch and a slice of columns.")
        batch, columns = trimmed
        if int(part.mask[:, columns].count_nonzero()) != int(part.mask.count_nonzero()):
            raise ValueError(f"trim left the columns {columns} of the mask, without some that count; expected all.")
        return part.with_columns(batch, columns), columns

    def _limit(self, inputs: Inputs) -> int | None:
        """Rows of full length in one micro-batch."""
        by_tokens = None
        if self.tokens is not None and inputs.mask is not None:
            by_tokens = max(1, self.tokens // max(1, inputs.mask.shape[1]))
        return min((limit for limit in (self.rows, by_tokens) if limit is not None), default=None)


def _spans(mask: Tensor) -> Tensor:
    """(n,) columns from the first to the last that counts: what the best of trims leaves."""
    positions = torch.arange(1, mask.shape[1] + 1, device=mask.device) * mask
    last = positions.amax(dim=1)
    first = positions.where(mask, mask.shape[1] + 1).amin(dim=1)
    return (last - first + 1).clamp(min=0)
