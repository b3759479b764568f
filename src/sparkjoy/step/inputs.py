"""What a call was given, checked before anything is changed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparkjoy import checks
from sparkjoy.signs import mixed, worth
from sparkjoy.step.batches import Rows, check_rows, take

LogProbFunction = Callable[[Any], Tensor]
"""`rows -> log-probs` of the actions taken in them: (n,) or (n, T)."""
SUM_TO_ONE = 1e-3
"""How near 1 the probabilities of a row add up where they are those of all actions."""


@dataclass(frozen=True)
class Inputs:
    """A checked batch: everything with a leading dimension of B, zeros where the mask is 0, nothing with a graph.

    Args:
        batch: what the log-prob function takes.
        advantages: (B,) or (B, T).
        log_probs: known ones, (B,) or (B, T), or None.
        behavior_log_probs: (B,) or (B, T), or None.
        mask: (B, T) bool, or None.
        row_tokens: (B,) valid tokens of each row, on the host; None without a mask.
        signs: how many rows are of positive and of negative worth, and whether one has tokens of both signs (see
            `sparkjoy.signs`); None where nobody asked.
    """

    batch: Any
    advantages: Tensor
    log_probs: Tensor | None
    behavior_log_probs: Tensor | None
    mask: Tensor | None
    row_tokens: np.ndarray[Any, Any] | None
    signs: tuple[int, int, bool] | None = None

    def take(self, rows: Rows) -> Inputs:
        """The given rows of everything, those of the batch as a copy that may be written into.

        Args:
            rows: indices (n,) on the host, or a slice.
        """
        device = self.advantages.device
        places = rows if isinstance(rows, slice) or device.type == "cpu" else rows.to(device)
        found = [
            tensor
            if tensor is None
            else tensor[places]
            if isinstance(places, slice)
            else tensor.index_select(0, places)
            for tensor in (self.advantages, self.log_probs, self.behavior_log_probs, self.mask)
        ]
        tokens = self.row_tokens
        if tokens is not None:
            tokens = tokens[rows] if isinstance(rows, slice) else tokens[rows.numpy()]
        return Inputs(take(self.batch, places), *found, row_tokens=tokens)  # type: ignore[arg-type, misc]  # four or None

    def with_columns(self, batch: Any, columns: slice) -> Inputs:
        """These rows with only some columns of everything (B, T), and a batch that goes with them."""
        check_rows(batch, self.total)
        found = [
            tensor if tensor is None or tensor.dim() == 1 else tensor[:, columns]
            for tensor in (self.advantages, self.log_probs, self.behavior_log_probs, self.mask)
        ]
        return Inputs(batch, *found, row_tokens=self.row_tokens)  # type: ignore[arg-type, misc]  # likewise

    @cached_property
    def total(self) -> int:
        """The number of rows."""
        return self.advantages.shape[0]

    def tokens(self, log_probs: Tensor, rows: Tensor | None = None) -> int:
        """Valid tokens of some rows (None: all): without a mask as many as a row of `log_probs` has, 1 for (B,)."""
        if self.row_tokens is not None:
            return int((self.row_tokens if rows is None else self.row_tokens[rows.numpy()]).sum())
        return (self.total if rows is None else len(rows)) * (log_probs.shape[1] if log_probs.dim() == 2 else 1)

    def blank_log_probs(self) -> Tensor:
        """Zeros, (B, T) where rows have tokens, for scores that do not read log-probs."""
        return torch.zeros_like(self.advantages if self.mask is None else self.mask, dtype=torch.float32)

    def check_finite(self) -> None:
        """Raise a ValueError that names a valid value that is NaN or infinite, if there is one."""
        for name in ("advantages", "log_probs", "behavior_log_probs"):
            if getattr(self, name) is not None:
                check_finite(name, getattr(self, name))

    def teaches(self) -> Tensor:
        """(B,) bool: rows with a non-zero advantage at a valid token. The others have no gradient."""
        nonzero = self.advantages != 0
        return nonzero if nonzero.dim() == 1 else nonzero.any(dim=1)


def check_inputs(
    batch: Any,
    advantages: Any,
    log_probs: Tensor | None,
    behavior_log_probs: Tensor | None,
    mask: Tensor | None,
    *,
    looks: bool = True,
    counts_signs: bool = False,
) -> Inputs:
    """Check everything a call was given, and read what the host has to know of it, in one wait for the device.

    Args:
        looks: whether to look for NaN and infinite values here; else they will show in the score.
        counts_signs: whether signs may decide.

    Raises:
        ValueError: what was given, what is expected and what to do.
    """
    if not isinstance(advantages, Tensor) or not advantages.is_floating_point():
        of_list = not isinstance(advantages, Tensor | np.ndarray)
        advantages = checks.as_tensor("advantages", advantages)
        if of_list or not advantages.is_floating_point():
            advantages = advantages.to(checks.at_least_float32())
    checks.tensor("advantages", advantages)
    if advantages.dim() not in (1, 2):
        raise ValueError(f"advantages has shape {tuple(advantages.shape)}; expected (B,) or (B, T).")
    total = advantages.shape[0]
    if total == 0:
        raise ValueError("the batch is empty: advantages has 0 rows; expected at least one. Skip the step instead.")
    check_rows(batch, total, advantages.device)
    for name, tensor in (("log_probs", log_probs), ("behavior_log_probs", behavior_log_probs), ("mask", mask)):
        if tensor is not None:
            checks.tensor(name, tensor, (), checks.REAL if name == "mask" else checks.FLOATING, beside=advantages)
    shape = _token_shape(advantages, log_probs, behavior_log_probs, mask)
    if mask is not None:
        mask = _usable(checks.mask(mask, shape, "the tokens"))
    behavior = behavior_log_probs
    found = [tensor if tensor is None else _cleaned(tensor, mask) for tensor in (advantages, log_probs, behavior)]
    cleaned, known, behavior = found
    assert cleaned is not None
    facts = [tensor.sum() for tensor in found if tensor is not None] if looks else []
    if counts_signs:
        value = worth(cleaned)
        both = mixed(cleaned) if cleaned.dim() == 2 else value.new_zeros(())
        facts += [(value > 0).count_nonzero(), (value < 0).count_nonzero(), both]
    tokens, numbers = None, []
    if mask is not None:
        every = mask.sum(dim=1)
        if facts:
            every = torch.cat([checks.together(*facts), every])
        every = every.cpu()
        numbers, tokens = every[: len(facts)].tolist(), every[len(facts) :].long().numpy()
    elif facts:
        numbers = checks.read(*facts)
    signs = None
    if counts_signs:
        *numbers, good, bad, differs = numbers
        signs = int(good), int(bad), bool(differs)
    inputs = Inputs(batch, cleaned, known, behavior, mask, tokens, signs)
    if not all(map(math.isfinite, numbers)):  # or a sum overflows
        inputs.check_finite()
    return inputs


def check_log_probs(log_probs: Any, inputs: Inputs, source: str) -> Tensor:
    """`log_probs` as `source` returned them for the rows of `inputs`, if shaped as expected.

    Raises:
        ValueError: not a floating-point tensor of (n,) or (n, T), or not the shape that mask, advantages or known
            log-probs have.
    """
    if not isinstance(log_probs, Tensor):
        raise ValueError(f"{source} returned a {type(log_probs).__name__}; expected a floating-point tensor.")
    checks.tensor(f"what {source} returned", log_probs, kinds=checks.FLOATING, beside=inputs.advantages)
    per_token = inputs.advantages if inputs.advantages.dim() == 2 else None
    like, expected = None, None
    for name, tensor in (("the mask", inputs.mask), ("the advantages", per_token), ("log_probs", inputs.log_probs)):
        if tensor is not None:
            like, expected = name, tuple(tensor.shape)
            break
    if expected is None:
        fits = log_probs.dim() in (1, 2) and log_probs.shape[0] == inputs.total
    else:
        fits = log_probs.shape == expected
    if not fits:
        wanted = (
            f"({inputs.total},) or ({inputs.total}, T)" if expected is None else f"{expected}, as {like} of these rows"
        )
        raise ValueError(
            f"{source} returned shape {tuple(log_probs.shape)} for {inputs.total} rows; expected "
            f"{wanted}: one log-prob per row, or one per token.{_one_column(per_token)}"
            f"{_squeezed(log_probs, inputs.total, expected)}"
        )
    if expected is None and log_probs.dim() == 2 and _of_every_action(log_probs.detach()):
        actions = log_probs.shape[1]
        warnings.warn(
            f"{source} returned {tuple(log_probs.shape)} numbers whose probabilities add up to 1 in every row, as "
            f"those of all {actions} actions do; they count as the log-probs of {actions} tokens a row. Gather those "
            "of the actions taken, log_probs.gather(1, actions.unsqueeze(1)).squeeze(1), which are (n,); or give a "
            "mask, if they are of tokens.",
            stacklevel=2,
        )
    return log_probs


def _of_every_action(log_probs: Tensor) -> bool:
    """Whether rows (n, T) look like distributions. Equal numbers do not tell: 1/T may be a token's probability."""
    if min(log_probs.shape) < 2:
        return False
    sums = log_probs.float().exp().sum(dim=1)
    return bool(((sums - 1).abs().amax() < SUM_TO_ONE) & (log_probs.amax() - log_probs.amin() > SUM_TO_ONE))


def _one_column(advantages: Tensor | None) -> str:
    """What to do where advantages (B, 1) do not fit."""
    if advantages is not None and advantages.dim() == 2 and advantages.shape[1] == 1:
        return " One advantage per row is (B,): advantages.squeeze(-1)."
    return ""


def _squeezed(log_probs: Tensor, total: int, expected: tuple[int, ...] | None) -> str:
    """What to do where the dimension of a single row is gone."""
    dims = (0, 1) if expected is None else (len(expected) - 1,)
    if total == 1 and log_probs.dim() in dims:
        return " A function is called with one row too: write .squeeze(1) or .squeeze(-1) instead of .squeeze()."
    return ""


def _token_shape(
    advantages: Tensor, log_probs: Tensor | None, behavior_log_probs: Tensor | None, mask: Tensor | None
) -> torch.Size:
    """(B, T) if anything given has tokens, else (B,)."""
    total = advantages.shape[0]
    known = [("log_probs", log_probs), ("behavior_log_probs", behavior_log_probs)]
    shape = next((t.shape for _, t in [*known, ("mask", mask)] if t is not None), advantages.shape)
    if advantages.dim() == 2 and advantages.shape != shape:
        raise ValueError(
            f"advantages has shape {tuple(advantages.shape)}, but the tokens are {tuple(shape)}."
            f"{_one_column(advantages)}"
        )
    if len(shape) not in (1, 2) or shape[0] != total or (mask is not None and mask.dim() != 2):
        raise ValueError(
            f"advantages has shape {tuple(advantages.shape)} and log_probs or mask {tuple(shape)}; expected (B,) or "
            "(B, T) with the same B, and a mask of (B, T)."
        )
    if shape.numel() == 0:
        raise ValueError(
            f"advantages, log_probs or mask has shape {tuple(shape)}, without a token; skip the step instead."
        )
    for name, tensor in known:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(shape)}.")
    return shape


def finite_where_valid(name: str, tensor: Tensor, mask: Tensor | None) -> Tensor:
    """`tensor` with zeros where the mask is 0; a ValueError where a valid value is NaN or infinite."""
    tensor = _cleaned(tensor, mask)
    check_finite(name, tensor)
    return tensor


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise a ValueError where a value is NaN or infinite."""
    checks.finite(name, tensor, " Where the mask is 0 anything may stand: mask such tokens, or drop such rows.")


def _cleaned(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """`tensor` without its graph, and zeros where the mask is 0."""
    tensor = tensor.detach() if tensor.requires_grad else tensor
    tensor = _usable(tensor) if tensor.is_inference() else tensor
    return tensor if mask is None else tensor.where(mask if tensor.dim() == 2 else mask.any(dim=1), 0)


def _usable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of one made under `torch.inference_mode`, which no loss could be differentiated with."""
    return tensor.clone() if tensor.is_inference() else tensor
