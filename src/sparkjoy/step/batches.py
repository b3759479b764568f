"""Rows of a batch: checking, gathering and slicing, whatever the batch is made of.

A batch is a tensor, a TensorDict, a Mapping, a namedtuple or a dataclass of tensors, nested as one likes, each with the
rows as its leading dimension; ragged rows in nested tensors of the jagged layout. Lists in it have an item a row, such
as a prompt; None, numbers and strings are for all rows. What is taken is a copy, which whoever gets it may write into,
and no class is initialised anew for it.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparkjoy import checks

Rows = Tensor | slice
FOR_ALL = (NoneType, str, bool, int, float, np.generic)
"""What a batch may hold that is the same for all rows, as a tensor of no dimension is."""


def take(batch: Any, rows: Rows) -> Any:
    """A copy of the given rows of every tensor.

    >>> take({"x": torch.arange(4)}, torch.tensor([0, 3]))
    {'x': tensor([0, 3])}

    Args:
        batch: as `check_rows` found it sound.
        rows: indices (n,) on its device, or a slice.
    """
    if isinstance(batch, Tensor):
        if batch.is_nested:
            parts = batch.unbind()
            chosen = range(len(parts))[rows] if isinstance(rows, slice) else rows.tolist()
            return torch.nested.as_nested_tensor([parts[row] for row in chosen], layout=batch.layout)
        if isinstance(rows, slice):
            return batch[rows].clone() if batch.dim() else batch.clone()
        return batch.index_select(0, rows) if batch.dim() else batch.clone()
    if type(batch) is dict:
        return {key: take(part, rows) for key, part in batch.items()}
    if isinstance(batch, list):
        return batch[rows] if isinstance(rows, slice) else [batch[row] for row in rows.tolist()]
    if isinstance(batch, FOR_ALL):
        return batch
    if is_tensor_collection(batch):
        return batch[rows].clone()
    return _rebuild(batch, lambda part: take(part, rows))


def check_rows(batch: Any, total: int, device: torch.device | None = None, name: str = "batch") -> None:
    """Whether rows of the batch can be taken.

    Args:
        batch: of tensors.
        total: the rows it has to have.
        device: where a batch has to be that was given by a caller, and without a graph; None: part of such a batch.
        name: how to call it.

    Raises:
        ValueError: a tensor, which is named, has another leading dimension than `total`, is somewhere else than the
            advantages, has a graph, or is of a layout that rows cannot be taken from.
    """
    if isinstance(batch, Tensor):
        _check_tensor(batch, total, device, name)
    elif type(batch) is not dict and is_tensor_collection(batch):
        _check_collection(batch, total, device, name)
    else:
        for key, part in _parts(batch, name):
            if isinstance(part, Tensor):
                _check_tensor(part, total, device, key, for_all=part.dim() == 0)
            elif isinstance(part, list):
                if len(part) != total:
                    raise ValueError(f"{key} is a list of {len(part)}; expected one of {total}, an item for each row.")
            elif not isinstance(part, FOR_ALL):
                check_rows(part, total, device, key)


def _check_tensor(tensor: Tensor, total: int, device: torch.device | None, name: str, for_all: bool = False) -> None:
    if tensor.layout not in (torch.strided, torch.jagged) or (tensor.is_nested and tensor.layout is torch.strided):
        kind = "nested in the strided layout" if tensor.is_nested else f"of the layout {tensor.layout}"
        raise ValueError(
            f"{name} is {kind}, of which rows cannot be taken; expected a dense tensor or a nested one of the jagged "
            "layout. Or give indices as the batch, and look the rows up in the log-prob function."
        )
    if not for_all and (tensor.dim() == 0 or tensor.shape[0] != total):
        shape = tuple(tensor.shape) if not tensor.is_nested else f"({tensor.size(0)}, ...)"
        raise ValueError(f"{name} has shape {shape}; expected a leading dimension of {total}, as advantages.")
    if device is None:
        return
    if not for_all and tensor.device != device:
        checks.same_device(name, tensor, device)
    if tensor.grad_fn is not None:
        raise ValueError(
            f"{name} has a graph, which the first of several backward passes would free; compute it inside the "
            "log-prob function, from rows without one, or give it detached where nothing is to learn from it."
        )


def _check_collection(batch: Any, total: int, device: torch.device | None, name: str) -> None:
    """Of a TensorDict or tensorclass."""
    if not batch.batch_size:
        raise ValueError(f"{name} is a {type(batch).__name__} of no batch_size; expected batch_size=[B].")
    if isinstance(batch, sys.modules["tensordict"].LazyStackedTensorDict):
        raise ValueError(
            f"{name} is a lazy stack, which holds its rows one by one; expected a TensorDict, such as its "
            "contiguous(). Or give indices as the batch, and look the rows up in the log-prob function."
        )
    for key, part in batch.items():
        if isinstance(part, Tensor) or not sys.modules["tensordict"].is_non_tensor(part):
            check_rows(part, total, device, f"{name}[{key!r}]")


def _parts(batch: Any, name: str) -> list[tuple[str, Any]]:
    if isinstance(batch, Mapping):
        return [(f"{name}[{key!r}]", value) for key, value in batch.items()]
    if isinstance(batch, tuple) and isinstance(getattr(batch, "_fields", None), tuple):
        names = batch._fields  # type: ignore[attr-defined]  # a namedtuple
        return [(f"{name}.{key}", value) for key, value in zip(names, batch, strict=True)]
    if is_dataclass(batch) and not isinstance(batch, type):
        return [(f"{name}.{field}", getattr(batch, field)) for field in _field_names(batch)]
    raise ValueError(
        f"{name} is {checks.described(batch)}; expected a tensor, or a TensorDict, Mapping, namedtuple or dataclass of "
        "tensors with the rows as leading dimension, such as {'tokens': tokens}; beside them lists with an item a row, "
        "numbers, strings and None."
    )


def _rebuild(batch: Any, change: Callable[[Any], Any]) -> Any:
    """`batch` with its parts changed, made without its class's own `__init__` or `__new__`: those have run already."""
    if isinstance(batch, tuple):
        return batch._make(change(value) for value in batch)  # type: ignore[attr-defined]  # a namedtuple
    if isinstance(batch, MutableMapping):
        changed = copy.copy(batch)
        for key, value in batch.items():
            changed[key] = change(value)
        return changed
    if isinstance(batch, Mapping):
        return type(batch)({key: change(value) for key, value in batch.items()})  # type: ignore[call-arg]  # as dict's
    changed = object.__new__(type(batch))
    if hasattr(batch, "__dict__"):
        vars(changed).update(vars(batch))
    for field in _field_names(batch):
        object.__setattr__(changed, field, change(getattr(batch, field)))  # frozen ones too
    return changed


def _field_names(batch: Any) -> list[str]:
    """Fields of a dataclass that have a value: not those of init=False that nothing has set."""
    return [field.name for field in fields(batch) if hasattr(batch, field.name)]


def is_tensor_collection(batch: Any) -> bool:
    """Whether this is a TensorDict or tensorclass; who holds one has imported tensordict, so we need not."""
    tensordict = sys.modules.get("tensordict")
    return tensordict is not None and bool(tensordict.is_tensor_collection(batch))
