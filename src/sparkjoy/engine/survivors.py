"""Rows of a batch: checking, gathering and slicing, whatever the batch is made of.

A batch is a tensor, a TensorDict, a Mapping, a namedtuple or a dataclass of tensors, nested as one likes, each with the
rows as its leading dimension.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor

Rows = Tensor | slice


def take(batch: Any, rows: Rows) -> Any:
    """The given rows of every tensor: a copy for indices (n,), a view for a slice.

    >>> import torch
    >>> take({"x": torch.arange(4)}, torch.tensor([0, 3]))
    {'x': tensor([0, 3])}
    """
    if isinstance(batch, Tensor):
        return batch[rows] if isinstance(rows, slice) else batch.index_select(0, rows)
    if _is_tensor_collection(batch):
        return batch[rows]
    return _rebuild(batch, lambda part: take(part, rows))


def map_tensors(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The batch with every tensor changed; `change` gives all of them the same number of rows.

    >>> import torch
    >>> map_tensors({"x": torch.arange(4)}, lambda rows: rows[:1])
    {'x': tensor([0])}
    """
    if isinstance(batch, Tensor):
        return change(batch)
    if _is_tensor_collection(batch):
        return batch.apply(change, batch_size=[]).auto_batch_size_(batch_dims=1)
    return _rebuild(batch, lambda part: map_tensors(part, change))


def row_shapes(batch: Any, total: int, own_graphs: bool = False) -> tuple[tuple[int, ...], ...]:
    """The shape of one row of every tensor: what a row costs depends on it, and on nothing else of the batch.

    Args:
        batch: of tensors.
        total: the rows it has to have.
        own_graphs: tensors may have a graph, which is then of this pass alone.

    Raises:
        ValueError: the leading dimension of a tensor, which is named, is not `total`, or it was computed with a graph.
    """
    shapes = []
    for name, shape, has_graph in _shapes(batch, "batch"):
        if has_graph and not own_graphs:
            raise ValueError(
                f"{name} has a graph, which the first of several backward passes would free; compute it inside the "
                "log-prob function, from rows without one, or give it detached where nothing is to learn from it."
            )
        if not shape or shape[0] != total:
            raise ValueError(f"{name} has shape {shape}; expected a leading dimension of {total}, as advantages.")
        shapes.append(shape[1:])
    return tuple(shapes)


def _shapes(batch: Any, name: str) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    if isinstance(batch, Tensor):
        yield name, tuple(batch.shape), batch.grad_fn is not None
    elif _is_tensor_collection(batch):
        if not batch.batch_size:
            raise ValueError(f"{name} is a {type(batch).__name__} of no batch_size; expected batch_size=[B].")
        for key, value in batch.items(include_nested=True, leaves_only=True):
            yield f"{name}[{key!r}]", tuple(value.shape), getattr(value, "grad_fn", None) is not None
    else:
        for key, value in _parts(batch, name):
            yield from _shapes(value, key)


def _parts(batch: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(batch, Mapping):
        yield from ((f"{name}[{key!r}]", value) for key, value in batch.items())
    elif isinstance(batch, tuple) and isinstance(getattr(batch, "_fields", None), tuple):
        yield from ((f"{name}.{key}", value) for key, value in zip(batch._fields, batch, strict=True))  # type: ignore[attr-defined]
    elif is_dataclass(batch) and not isinstance(batch, type):
        yield from ((f"{name}.{field.name}", getattr(batch, field.name)) for field in fields(batch))
    else:
        raise ValueError(
            f"{name} is a {type(batch).__name__}; expected a tensor, or a TensorDict, Mapping, namedtuple or dataclass "
            "of tensors with the rows as leading dimension."
        )


def _rebuild(batch: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(batch, Mapping):
        parts = {key: change(value) for key, value in batch.items()}
        return parts if isinstance(batch, defaultdict) else type(batch)(parts)  # type: ignore[call-arg]
    if isinstance(batch, tuple):
        return type(batch)(*(change(value) for value in batch))
    return replace(batch, **{field.name: change(getattr(batch, field.name)) for field in fields(batch)})


def _is_tensor_collection(batch: Any) -> bool:
    """Whether this is a TensorDict or tensorclass; who holds one has imported tensordict, so we need not."""
    tensordict = sys.modules.get("tensordict")
    return tensordict is not None and bool(tensordict.is_tensor_collection(batch))
