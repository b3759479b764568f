"""Rows of a batch: checking, gathering and slicing, whatever the batch is made of.

A batch is a tensor, a TensorDict, a Mapping, a namedtuple or a dataclass of tensors, nested as one likes, each with the
rows as its leading dimension; ragged rows in nested tensors or lazy stacks. Lists in it have an item a row, such as a
prompt; None, numbers and strings are for all rows. What is taken is a copy, which whoever gets it may write into, and
no class is initialised anew for it.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping
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
        batch: as `row_shapes` found it sound.
        rows: indices (n,), or a slice.
    """
    if isinstance(batch, Tensor):
        if batch.dim() == 0:
            return batch.clone()
        if batch.is_nested:
            return _take_ragged(batch, rows)
        if batch.layout != torch.strided:
            return batch.index_select(0, _indices(rows, batch))
        return batch[rows].clone() if isinstance(rows, slice) else batch.index_select(0, rows)
    if is_tensor_collection(batch):
        return batch[rows].clone()  # an index of a lazy stack shares the rows it holds
    if isinstance(batch, list):
        return batch[rows] if isinstance(rows, slice) else [batch[row] for row in rows.tolist()]
    if isinstance(batch, FOR_ALL):
        return batch
    return _rebuild(batch, lambda part: take(part, rows))


def row_shapes(batch: Any, total: int, device: torch.device | None = None) -> tuple[tuple[int, ...], ...]:
    """The shape of one row of every tensor: what a row costs depends on it, and on nothing else of the batch.

    Args:
        batch: of tensors.
        total: the rows it has to have.
        device: where a batch has to be that was given by a caller, and without a graph; None: part of such a batch.

    Returns:
        A ragged dimension is -1, and so is what a row of nothing but lists may cost.

    Raises:
        ValueError: a tensor, which is named, has another leading dimension than `total`, is somewhere else than the
            advantages, has a graph, or is of a layout that rows cannot be taken from.
    """
    shapes, lists = [], False
    for name, shape, part in _shapes(batch, "batch"):
        if isinstance(part, list):
            if len(part) != total:
                raise ValueError(f"{name} is a list of {len(part)}; expected one of {total}, an item for each row.")
            lists = True
            continue
        for_all = not shape and part is not batch
        if not for_all and (not shape or shape[0] != total):
            raise ValueError(f"{name} has shape {shape}; expected a leading dimension of {total}, as advantages.")
        if device is not None and not for_all:
            checks.same_device(name, part, device)
        if device is not None and part.grad_fn is not None:
            raise ValueError(
                f"{name} has a graph, which the first of several backward passes would free; compute it inside the "
                "log-prob function, from rows without one, or give it detached where nothing is to learn from it."
            )
        if not for_all:
            shapes.append(shape[1:])
    return ((-1,),) if lists and not shapes else tuple(shapes)


def _shapes(batch: Any, name: str) -> Iterator[tuple[str, tuple[int, ...], Tensor | list[Any]]]:
    if isinstance(batch, Tensor):
        yield name, _shape(batch, name), batch
    elif is_tensor_collection(batch):
        yield from _shapes_of_collection(batch, name)
    else:
        for key, value in _parts(batch, name):
            if isinstance(value, list):
                yield key, (len(value),), value
            elif not isinstance(value, FOR_ALL):
                yield from _shapes(value, key)


def _shape(tensor: Tensor, name: str) -> tuple[int, ...]:
    if tensor.is_nested:
        return tuple(_size(tensor, dim) for dim in range(tensor.dim()))
    if tensor.layout not in (torch.strided, torch.sparse_coo):
        raise ValueError(
            f"{name} has the layout {tensor.layout}, of which rows cannot be taken; expected a dense or a nested "
            "tensor, such as its to_dense()."
        )
    return tuple(tensor.shape)


def _size(nested: Tensor, dim: int) -> int:
    """The size of a dimension of a nested tensor, -1 where it is ragged."""
    try:
        size: Any = nested.size(dim)
    except RuntimeError:  # how the strided layout says so
        return -1
    return size if isinstance(size, int) else -1


def _shapes_of_collection(batch: Any, name: str) -> Iterator[tuple[str, tuple[int, ...], Any]]:
    """Of a TensorDict or tensorclass; entries of a lazy stack are not put together, since they may be ragged."""
    if not batch.batch_size:
        raise ValueError(f"{name} is a {type(batch).__name__} of no batch_size; expected batch_size=[B].")
    if _is_lazy(batch):
        for key, value in batch[0].items(include_nested=True, leaves_only=True):
            if isinstance(value, Tensor):
                yield f"{name}[{key!r}]", tuple(batch.get_item_shape(key)), value
    else:
        for key, value in batch.items():
            yield from _shapes(value, f"{name}[{key!r}]")


def _parts(batch: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(batch, Mapping):
        yield from ((f"{name}[{key!r}]", value) for key, value in batch.items())
    elif isinstance(batch, tuple) and isinstance(getattr(batch, "_fields", None), tuple):
        names = batch._fields  # type: ignore[attr-defined]  # a namedtuple
        yield from ((f"{name}.{key}", value) for key, value in zip(names, batch, strict=True))
    elif is_dataclass(batch) and not isinstance(batch, type):
        yield from ((f"{name}.{field}", getattr(batch, field)) for field in _field_names(batch))
    else:
        raise ValueError(
            f"{name} is {checks.described(batch)}; expected a tensor, or a TensorDict, Mapping, namedtuple or "
            "dataclass of tensors with the rows as leading dimension, such as {'tokens': tokens}; beside them lists "
            "with an item a row, numbers, strings and None."
        )


def _rebuild(batch: Any, change: Callable[[Any], Any]) -> Any:
    """`batch` with its parts changed, made without its class's own `__init__` or `__new__`: those have run already."""
    if isinstance(batch, tuple):
        return batch._make(change(value) for value in batch)  # type: ignore[attr-defined]  # a namedtuple
    if type(batch) is dict:
        return {key: change(value) for key, value in batch.items()}
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


def _take_ragged(nested: Tensor, rows: Rows) -> Tensor:
    parts = nested.unbind()
    chosen = range(len(parts))[rows] if isinstance(rows, slice) else rows.tolist()
    return torch.nested.as_nested_tensor([parts[row] for row in chosen], layout=nested.layout)


def _indices(rows: Rows, tensor: Tensor) -> Tensor:
    return torch.arange(tensor.shape[0], device=tensor.device)[rows] if isinstance(rows, slice) else rows


def is_tensor_collection(batch: Any) -> bool:
    """Whether this is a TensorDict or tensorclass; who holds one has imported tensordict, so we need not."""
    tensordict = sys.modules.get("tensordict")
    return tensordict is not None and bool(tensordict.is_tensor_collection(batch))


def _is_lazy(collection: Any) -> bool:
    """Whether this is a lazy stack, which holds its rows one by one."""
    return isinstance(collection, sys.modules["tensordict"].LazyStackedTensorDict)
