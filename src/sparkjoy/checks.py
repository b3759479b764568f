"""What arguments may be: every public function and constructor asks here, before anything is changed.

- A number is Python's or numpy's and finite. A bool is none, and neither is a tensor or an array: `.item()` makes one.
- A tensor is dense and on a device that has values; a list or an array is none, except where a function says that it
  takes what reward functions return (`as_tensor`).
- A mask is a tensor of bool, or of exactly 0 and 1.
- A function takes the arguments that it will be called with. A class is neither a function nor an object of that class.
- A state is that of an object made with the same options (`sparkjoy.states`).

Wrong type: TypeError. Wrong value, or a scalar of the wrong type: ValueError. Both say what was given, what is expected
and what to do.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

Kind = TypeVar("Kind")

FLOATING = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
REAL = FLOATING | {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
LARGEST = 2**48
"""Of whole numbers: far beyond any memory, and within what a float counts exactly."""


def described(value: Any) -> str:
    """What was given, in a few words.

    >>> described(0.5), described(dict), described([0.5] * 1000), described(torch.ones(2)), described(described)
    ('0.5', 'the class dict', 'a list of 1000', 'a tensor of torch.float32 (2,)', 'the function described')
    """
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, FunctionType):
        return f"the function {value.__name__}"
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} {'nested' if value.is_nested else tuple(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} {value.shape}"
    if isinstance(value, nn.Module):
        return f"a {type(value).__name__}"
    try:
        text = repr(value)
    except Exception:  # a user's own, or that of a number of too many digits
        text = ""
    if text and len(text) <= 80:
        return text
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, list | tuple | dict | str) else "")


def number(name: str, value: Any, expected: str, fits: Callable[[float], bool] = lambda value: True) -> float:
    """`value` as a float.

    >>> number("epsilon", np.float32(0.5), "a number in (0, 1)", lambda epsilon: 0 < epsilon < 1)
    0.5

    Args:
        name: of the argument.
        value: what was given.
        expected: what is, in words.
        fits: whether a finite number is in range.

    Raises:
        ValueError: no number, not finite, or out of range.
    """
    if is_number(value) and fits(float(value)):
        return float(value)
    way_out = " Give the number, by .item()." if isinstance(value, Tensor | np.ndarray) else ""
    raise ValueError(f"{name} is {described(value)}; expected {expected}.{way_out}")


def whole(name: str, value: Any, expected: str = "a whole number of at least 1", least: int = 1) -> int:
    """`value` as an int.

    >>> whole("window", np.int64(3))
    3
    """
    if isinstance(value, int | np.integer) and not isinstance(value, bool) and least <= int(value) <= LARGEST:
        return int(value)
    raise ValueError(f"{name} is {described(value)}; expected {expected}.")


def rate(value: Any, name: str = "rate") -> float:
    """`value` as a fraction to keep, in (0, 1]."""
    return number(
        name, value, "the fraction to keep, a number in (0, 1], such as 0.03 for 3%", lambda rate: 0 < rate <= 1
    )


def choice(name: str, value: Any, allowed: Iterable[str | None]) -> None:
    """`value` is one of the words allowed."""
    allowed = tuple(allowed)
    if not (value is None or isinstance(value, str)) or value not in allowed:
        *first, last = map(repr, allowed)
        raise ValueError(f"{name} is {described(value)}; expected {', '.join(first)} or {last}.")


def flag(name: str, value: Any) -> bool:
    """`value` as a bool."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise TypeError(f"{name} is {described(value)}; expected True or False.")


def instance(name: str, value: Any, kind: type[Kind] | tuple[type[Kind], ...], expected: str) -> Kind:
    """`value`, which is of a kind."""
    if isinstance(value, kind):
        return value
    raise TypeError(f"{name} is {not_made(value)}; expected {expected}.")


def generator(value: Any) -> torch.Generator | None:
    """`value`, which draws random numbers."""
    if value is None:
        return None
    return instance("generator", value, torch.Generator, "a torch.Generator, or None for torch's global one")


def function(name: str, value: Any, expected: str, *arguments: Any) -> Any:
    """`value`, which can be called with as many arguments as given here (none: it is not asked).

    >>> function("score", max, "a function (advantages, log_probs) -> score", 1, 2).__name__
    'max'

    Raises:
        TypeError: a class, nothing that can be called, or something that takes other arguments.
    """
    if isinstance(value, type) or not callable(value):
        raise TypeError(f"{name} is {not_made(value)}; expected {expected}.")
    if arguments:
        try:
            inspect.signature(value).bind(*arguments)
        except ValueError:  # some of C's do not say what they take
            pass
        except TypeError as error:
            raise TypeError(
                f"{name} is {described(value)}, which cannot be called with {len(arguments)} arguments ({error}); "
                f"expected {expected}."
            ) from None
    return value


def tensor(
    name: str,
    value: Any,
    dims: tuple[int, ...] = (),
    kinds: frozenset[torch.dtype] = REAL,
    shape: str = "",
    beside: Tensor | None = None,
) -> Tensor:
    """`value`, a dense tensor of one of these dtypes and numbers of dimensions (none: any), on the device of another.

    Raises:
        TypeError: something else than a tensor.
        ValueError: a tensor of another dtype or shape, or without values to look at.
    """
    if not isinstance(value, Tensor):
        way_out = f" Make it one by torch.as_tensor({name})." if isinstance(value, list | tuple | np.ndarray) else ""
        raise TypeError(f"{name} is {not_made(value)}; expected a tensor{f' of {shape}' if shape else ''}.{way_out}")
    if value.dtype not in kinds:
        wanted = "floating point: float32, float64, bfloat16 or float16" if kinds is FLOATING else "real numbers"
        raise ValueError(f"{name} is {value.dtype}; expected {wanted}.")
    if beside is not None and value.device != beside.device:
        same_device(name, value, beside.device)
    if value.is_nested or value.layout is not torch.strided or value.is_meta:
        kind = "nested" if value.is_nested else "on the device meta" if value.is_meta else f"of layout {value.layout}"
        raise ValueError(f"{name} is {kind}; expected a dense tensor of values, such as its to_dense().")
    if dims and value.dim() not in dims:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {shape}.")
    return value


def row(name: str, value: Any) -> Tensor:
    """`value`, floating-point (N,) of at least one."""
    found = tensor(name, value, (1,), FLOATING, "(N,)")
    if len(found) == 0:
        raise ValueError(f"{name} has shape (0,); expected (N,) of at least one. Skip the step instead.")
    return found


def cost(value: Any, score: Tensor) -> Tensor:
    """`value`, a finite number of at least 0 for each score."""
    found = one_each("cost", value, score)
    if bool((found.isfinite() & (found >= 0)).all()):
        return found
    raise ValueError(f"cost has values {found[:3].tolist()} ...; {COST.format(len(score))}")


COST = "expected a finite number of at least 0 for each of {} scores, such as its tokens."


def one_each(name: str, value: Any, score: Tensor) -> Tensor:
    """`value`, a tensor with a number for each score."""
    found = tensor(name, value, shape="(N,), such as the tokens of each row")
    if found.shape != score.shape:
        raise ValueError(f"{name} has shape {tuple(found.shape)}; {COST.format(len(score))}")
    return found


def advantages(value: Any) -> Tensor:
    """`value` without its graph, in floating point: rewards of 0 and 1 may be whole numbers or bool."""
    return floating(tensor("advantages", value))


def floating(values: Tensor) -> Tensor:
    """The tensor without its graph, in floating point."""
    values = without_graph(values)
    return values if values.is_floating_point() else values.to(at_least_float32())


def at_least_float32() -> torch.dtype:
    """What whole numbers and lists become: torch's default, if that is not coarser."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


def same_device(name: str, value: Tensor, device: torch.device, other: str = "advantages") -> None:
    """`value` is where another argument is."""
    if value.device != device:
        raise ValueError(
            f"{name} is on {value.device} and {other} on {device}; expected one device. Move one of them, for instance "
            f'by torch.as_tensor({other}, device="{value.device}").'
        )


def mask(value: Any, shape: torch.Size, of: str = "log_probs") -> Tensor:
    """`value` as a mask of bool.

    >>> mask(torch.tensor([1, 0]), torch.Size([2]))
    tensor([ True, False])

    Raises:
        TypeError: no tensor.
        ValueError: another shape, or values other than 0 and 1.
    """
    found = tensor("mask", value, shape="bool, 1 where a token counts")
    if found.shape != shape:
        raise ValueError(f"mask has shape {tuple(found.shape)}; expected that of {of}, {tuple(shape)}.")
    if found.dtype == torch.bool:
        return found
    if not bool(((found == 0) | (found == 1)).all()):
        raise ValueError("mask has values other than 0 and 1; give 1 for tokens that count and 0 for the others.")
    return found.bool()


def as_tensor(name: str, values: Any) -> Tensor:
    """Real numbers as a tensor without a graph, whatever a reward function made them: tensor, array or list.

    Those of a list are as exact as Python has them, whatever torch's default is: float32 where that holds them all.

    >>> as_tensor("rewards", [True, False])
    tensor([ True, False])

    Raises:
        ValueError: not numbers, or complex ones.
    """
    made = values
    if not isinstance(values, Tensor):
        try:
            # np.array copies what torch does not take: read-only memory, negative strides.
            made = torch.tensor(np.array(values, order="C") if hasattr(values, "__array__") else values, device="cpu")
            if made.is_floating_point() and not hasattr(values, "__array__"):
                made = torch.tensor(values, dtype=torch.float64, device="cpu")
                made = made.float() if bool((made.float() == made).all()) else made
        except Exception as error:  # whatever torch, numpy or an object of the user's own finds wrong
            raise ValueError(
                f"{name} is a {type(values).__name__} that no tensor can be made of ({error}); expected a tensor, an "
                "array or a list of numbers."
            ) from error
    return without_graph(tensor(name, made))


def without_graph(values: Tensor) -> Tensor:
    """The tensor without its graph; itself where it has none, since on a tiny model every operation counts."""
    return values.detach() if values.requires_grad else values


def finite(name: str, values: Tensor, advice: str = "") -> None:
    """Raise a ValueError where a value is NaN or infinite."""
    # The sum is finite unless a value is not (or it overflows): one cheap pass, and the exact one only in doubt.
    if math.isfinite(values.sum().item()) or bool(values.isfinite().all()):
        return
    bad = ~values.isfinite()
    place = bad.nonzero()[0].tolist()
    first = place[0] if len(place) == 1 else tuple(place)
    raise ValueError(
        f"{name} has {int(bad.sum())} of {values.numel()} values NaN or infinite, the first at {first}; expected "
        f"finite numbers.{advice}"
    )


NO_WAIT = {"cpu"}
"""Devices on which reading a number waits for nothing, so that reading several one by one is quicker."""


def read(*values: Tensor) -> list[float]:
    """Numbers (0-dim) as the host has them, by one wait for the device.

    >>> read(torch.tensor(1.5), torch.tensor(True))
    [1.5, 1.0]
    """
    if values[0].device.type in NO_WAIT:
        return [float(value) for value in values]
    return together(*values).tolist()


def together(*values: Tensor) -> Tensor:
    """Numbers (0-dim) in one tensor, in float64, or in float32 on Apple's GPUs, which have no float64."""
    dtype = torch.float32 if values[0].device.type == "mps" else torch.float64
    return torch.stack([value.to(dtype) for value in values])


def add_sentence(error: BaseException, sentence: str) -> None:
    """Put a sentence at the end of an error's message, or beside it where the message is not its own.

    >>> error = ValueError("no such row.")
    >>> add_sentence(error, "Take another.")
    >>> error
    ValueError('no such row. Take another.')
    """
    text = str(error)
    if error.args == (text,) and text:
        error.args = (f"{text.rstrip('.')}. {sentence}",)
    else:
        error.add_note(sentence)


def is_number(value: Any) -> bool:
    """Whether this is a finite real number, of Python's or numpy's."""
    try:
        real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
        return real and math.isfinite(value)
    except OverflowError:  # an int beyond all floats
        return False


def not_made(value: Any) -> str:
    """`value` in words; of a class, that it was not called."""
    if isinstance(value, type) and value.__module__ != "builtins":
        return f"the class {value.__name__}, which was not called; write {value.__name__}(...)"
    return described(value)
