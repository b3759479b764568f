"""What is refused before it is differentiated: a graph that is missing, a loss or a gradient that is no number."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparkjoy.gradients import leaves
from sparkjoy.scores import surprisal


def check_graph(loss: Tensor, log_probs: Tensor) -> None:
    """Raise a ValueError where there is nothing to differentiate."""
    if not log_probs.requires_grad:
        raise ValueError(
            "the log-prob function returned log-probs without a graph, so there is nothing to differentiate; compute "
            "them with gradients enabled, from parameters that require them."
        )
    if not loss.requires_grad:
        raise ValueError("the loss has no graph; expected terms computed from the log-probs it was given.")


def check_numbers(loss: Tensor, log_probs: Tensor, mask: Tensor | None, where: str, unbounded: bool = False) -> bool:
    """Whether all log-probs are finite, padding too; a ValueError that names the pass where the loss is not.

    Args:
        loss: 0-dim.
        log_probs: of the pass.
        mask: which of them count; None: all.
        where: the pass, in words.
        unbounded: the loss is infinite where a log-prob is, so that one number tells. A bounded loss is finite with an
            infinite log-prob, and its gradient may not be: then both are read, at once.
    """
    seen = log_probs.detach()
    if mask is None and unbounded:
        total, of_all = loss.item(), 0.0
    else:
        precise = torch.promote_types(loss.dtype, torch.float32)
        total, of_all = torch.stack((loss.detach().to(precise), seen.sum(dtype=precise))).tolist()
    all_finite = math.isfinite(of_all) or bool(seen.isfinite().all())
    if not math.isfinite(total) or not (all_finite or bool(valid(seen, mask).isfinite().all())):
        raise ValueError(
            f"{where}: the loss is {total}, from log-probs between {seen.min().item():g} and "
            f"{seen.max().item():g}; expected finite numbers."
        )
    return all_finite


def check_discrete(log_probs: Tensor, mask: Tensor | None, where: str) -> None:
    """Raise a ValueError where a log-prob is above 0, as no discrete action's is."""
    try:
        surprisal(valid(log_probs.detach(), mask))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def check_padding(log_probs: Tensor, where: str) -> None:
    """Raise a ValueError where padding that is no number would make the gradients of the rest NaN.

    By a backward pass of zeros, which leaves `.grad` alone, for the rare function that returns padding as NaN or
    infinite. Where a graph does not allow two, as a compiled function's, nothing is known, and that is refused too.
    """
    try:
        zeros = torch.zeros_like(log_probs)
        gradients = torch.autograd.grad(log_probs, leaves(log_probs), zeros, retain_graph=True, allow_unused=True)
        arrives = all(gradient is None or bool(gradient.isfinite().all()) for gradient in gradients)
    except RuntimeError:
        arrives = False
    if not arrives:
        raise ValueError(
            f"{where}: log-probs are NaN or infinite where the mask is 0, and the gradient of the others would "
            "be NaN with them (0 times NaN); replace the padding before it is computed with, as by "
            "logits.where(mask, 0), not afterwards."
        )


def valid(log_probs: Tensor, mask: Tensor | None) -> Tensor:
    """Log-probs, 0 where the mask is."""
    return log_probs if mask is None else log_probs.where(mask, 0)
