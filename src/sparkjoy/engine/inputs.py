"""What a call of the engine was given, checked before anything is changed."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparkjoy import checks
from sparkjoy.checks import as_tensor, without_graph
from sparkjoy.engine.batches import Rows, row_shapes, take

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
        row_tokens: (B,) on the CPU, valid tokens of each row; None without a mask.
        row_shapes: the shape of one row of every tensor of the batch.
    """

    batch: Any
    advantages: Tensor
    log_probs: Tensor | None
    behavior_log_probs: Tensor | None
    mask: Tensor | None
    row_tokens: Tensor | None
    row_shapes: tuple[tuple[int, ...], ...]

    def take(self, rows: Rows) -> Inputs:
        """The given rows of everything, those of the batch as a copy that may be written into."""

        def part(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else _rows_of(tensor, rows)

        return Inputs(
            take(self.batch, rows),
            _rows_of(self.advantages, rows),
            part(self.log_probs),
            part(self.behavior_log_probs),
            part(self.mask),
            part(self.row_tokens)
            if isinstance(rows, slice) or self.row_tokens is None
            else self.row_tokens[rows.cpu()],
            self.row_shapes,
        )

    def with_columns(self, batch: Any, columns: slice, row_shapes: tuple[tuple[int, ...], ...]) -> Inputs:
        """These rows with only some columns of everything (B, T), and a batch that goes with them."""

        def part(tensor: Tensor | None) -> Tensor | None:
            return tensor if tensor is None or tensor.dim() == 1 else tensor[:, columns]

        advantages = self.advantages if self.advantages.dim() == 1 else self.advantages[:, columns]
        known, behavior, mask = part(self.log_probs), part(self.behavior_log_probs), part(self.mask)
        return Inputs(batch, advantages, known, behavior, mask, self.row_tokens, row_shapes)

    def without_log_probs(self) -> Inputs:
        """The same with nothing given to decide on; what was stays the denominator of a ratio that has no other."""
        behavior = self.log_probs if self.behavior_log_probs is None else self.behavior_log_probs
        return replace(self, log_probs=None, behavior_log_probs=behavior)

    @property
    def total(self) -> int:
        """The number of rows."""
        return self.advantages.shape[0]

    def tokens(self, log_probs: Tensor) -> int:
        """Valid tokens of all rows: without a mask as many as a row of `log_probs` has, 1 for (B,)."""
        if self.row_tokens is not None:
            return int(self.row_tokens.sum())
        return self.total * (log_probs.shape[1] if log_probs.dim() == 2 else 1)

    def blank_log_probs(self) -> Tensor:
        """Zeros, (B, T) where rows have tokens, for scores that do not read log-probs."""
        return torch.zeros_like(self.advantages if self.mask is None else self.mask, dtype=torch.float32)

    def check_finite(self) -> None:
        """Raise a ValueError that names a valid value that is NaN or infinite, if there is one."""
        check_finite("advantages", self.advantages)
        if self.log_probs is not None:
            check_finite("log_probs", self.log_probs)
        if self.behavior_log_probs is not None:
            check_finite("behavior_log_probs", self.behavior_log_probs)

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
    score_tells: bool = False,
) -> Inputs:
    """Check everything a call was given.

    Args:
        score_tells: a NaN or infinite value would show in the score, whose check need not be made twice.

    Raises:
        ValueError: what was given, what is expected and what to do.
    """
    of_list = not isinstance(advantages, Tensor | np.ndarray)
    advantages = as_tensor("advantages", advantages)
    if of_list or not advantages.is_floating_point():
        advantages = advantages.to(checks.at_least_float32())
    if advantages.dim() not in (1, 2):
        raise ValueError(f"advantages has shape {tuple(advantages.shape)}; expected (B,) or (B, T).")
    total = advantages.shape[0]
    if total == 0:
        raise ValueError("the batch is empty: advantages has 0 rows; expected at least one. Skip the step instead.")
    shapes = row_shapes(batch, total, advantages.device)
    for name, tensor in (("log_probs", log_probs), ("behavior_log_probs", behavior_log_probs), ("mask", mask)):
        if tensor is not None:
            checks.tensor(name, tensor, (), checks.REAL if name == "mask" else checks.FLOATING, beside=advantages)
    shape = _token_shape(advantages, log_probs, behavior_log_probs, mask)
    row_tokens = None
    if mask is not None:
        mask = _usable(checks.mask(mask, shape, "the tokens"))
        row_tokens = mask.sum(dim=1).cpu()
    behavior = behavior_log_probs
    inputs = Inputs(
        batch,
        _cleaned(advantages, mask),
        None if log_probs is None else _cleaned(log_probs, mask),
        None if behavior is None else _cleaned(behavior, mask),
        mask,
        row_tokens,
        shapes,
    )
    if not score_tells:
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
    others = {"the mask": inputs.mask, "the advantages": per_token, "log_probs": inputs.log_probs}
    like, expected = next(((name, tuple(t.shape)) for name, t in others.items() if t is not None), (None, None))
    if expected is None:
        fits = log_probs.dim() in (1, 2) and log_probs.shape[0] == inputs.total
    else:
        fits = tuple(log_probs.shape) == expected
    if not fits:
        wanted = (
            f"({inputs.total},) or ({inputs.total}, T)" if expected is None else f"{expected}, as {like} of these rows"
        )
        raise ValueError(
            f"{source} returned shape {tuple(log_probs.shape)} for {inputs.total} rows; expected "
            f"{wanted}: one log-prob per row, or one per token.{_one_column(per_token)}"
            f"{_squeezed(log_probs, inputs.total, expected)}"
        )
    if expected is None and _of_every_action(log_probs.detach()):
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
    if log_probs.dim() == 1 or min(log_probs.shape) < 2:
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
    tensor = _usable(without_graph(tensor))
    return tensor if mask is None else tensor.where(mask if tensor.dim() == 2 else mask.any(dim=1), 0)


def _rows_of(tensor: Tensor, rows: Rows) -> Tensor:
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)


def _usable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of one made under `torch.inference_mode`, which no loss could be differentiated with."""
    return tensor.clone() if tensor.is_inference() else tensor
