"""Policy-gradient losses, term by term: the caller sums, weights and normalises.

A loss takes `(log_probs, advantages, behavior_log_probs, mask)` and returns terms to minimise, of the shape of
`log_probs`. Only `log_probs` carries a gradient. Terms are proportional to the advantage, so a row of zero advantage
adds nothing. The supervised oracle of the papers is `reinforce` on the log-probs of the labels with advantage 1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from sparkjoy import checks
from sparkjoy.scores import ScoreFunction, delightful_size, is_size, per_row, policy_gradient_size

Loss = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
LOSS = "a function (log_probs, advantages, behavior_log_probs, mask) -> terms, such as sparkjoy.reinforce"
UNITS = ("token", "sample")


def size_of(loss: Loss) -> ScoreFunction:
    """The size of a row's gradient in a loss, which it says of itself as `loss.size`, a score that `is_size`.

    Else that of REINFORCE.

    >>> size_of(reinforce).__name__, size_of(lambda log_probs, advantages, *rest: log_probs).__name__
    ('policy_gradient_size', 'policy_gradient_size')
    """
    size: Any = getattr(loss, "size", None)
    return size if is_size(size) else policy_gradient_size


def reinforce(
    log_probs: Tensor,
    advantages: Tensor,
    behavior_log_probs: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """REINFORCE, −U log π(a|s): the plain policy gradient (Williams 1992).

    >>> reinforce(torch.tensor([-0.5, -2.0]), torch.tensor([1.0, -1.0]))
    tensor([ 0.5000, -2.0000])

    Args:
        log_probs: (B,) or (B, T), differentiable.
        advantages: (B,), or (B, T) with (B, T).
        behavior_log_probs: not used.
        mask: not used.

    Returns:
        Terms to minimise, the shape of `log_probs`.
    """
    return -per_row(advantages, log_probs) * log_probs


def ratio(log_probs: Tensor, behavior_log_probs: Tensor | None, loss: str) -> Tensor:
    """π/π_behavior, at most e^20: far beyond any clip; beyond e^88 it would be infinite and its gradient NaN."""
    checks.tensor("log_probs", log_probs, kinds=checks.FLOATING)
    if behavior_log_probs is None:
        raise ValueError(f"{loss} needs behavior_log_probs, those the actions were sampled with.")
    checks.tensor("behavior_log_probs", behavior_log_probs, kinds=checks.FLOATING, beside=log_probs)
    if behavior_log_probs.shape != log_probs.shape:
        raise ValueError(
            f"behavior_log_probs has shape {tuple(behavior_log_probs.shape)}; expected that of log_probs, "
            f"{tuple(log_probs.shape)}."
        )
    return (log_probs - behavior_log_probs).clamp(max=20).exp()


def clipped(epsilon: float = 0.2) -> Loss:
    """PPO's clipped surrogate: −min(ρU, clip(ρ, 1 − ε, 1 + ε)U), ρ = π/π_behavior (Schulman et al., arXiv 1707.06347).

    Where the current policy is the one that sampled, its gradient is that of `reinforce`; it differs from the second
    update on the same batch on.

    >>> clipped(0.2)(torch.tensor([0.0]), torch.tensor([1.0]), torch.tensor([-1.0]), None)
    tensor([-1.2000])

    Args:
        epsilon: ε in (0, 1).

    Returns:
        A loss: `(log_probs, advantages, behavior_log_probs, mask) -> terms`; it needs `behavior_log_probs`.

    Raises:
        ValueError: ε outside (0, 1), or, when called, no `behavior_log_probs`.
    """
    epsilon = checks.number("epsilon", epsilon, "a number in (0, 1)", lambda epsilon: 0 < epsilon < 1)

    return partial(_clipped, epsilon=epsilon)


def _clipped(
    log_probs: Tensor,
    advantages: Tensor,
    behavior_log_probs: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    epsilon: float,
) -> Tensor:
    advantages = per_row(advantages, log_probs)
    found = ratio(log_probs, behavior_log_probs, "clipped")
    return -torch.minimum(found * advantages, found.clamp(1 - epsilon, 1 + epsilon) * advantages)


def delightful(temperature: float = 1.0, unit: Literal["token", "sample"] = "token") -> Loss:
    """The Delightful Policy Gradient: −σ(χ/η) U log π, the weight detached (arXiv 2603.14608).

    A rare success has weight near 1, a rare failure near 0; at χ = 0 it is 1/2.

    >>> loss = delightful()
    >>> loss(torch.tensor([-3.0, -3.0]), torch.tensor([1.0, -1.0]), None, None)
    tensor([ 2.8577, -0.1423])

    Args:
        temperature: η > 0; 1 in the papers.
        unit: whose delight weights a (B, T) term: its own token's, or the whole answer's, summed over valid tokens.

    Returns:
        A loss: `(log_probs, advantages, behavior_log_probs, mask) -> terms`.

    Raises:
        ValueError: a temperature that is not above 0, or an unknown unit.
    """
    temperature = checked_temperature(temperature)
    checks.choice("unit", unit, UNITS)

    loss = partial(_delightful, temperature=temperature, unit=unit)
    loss.__dict__["size"] = delightful_size(temperature, unit)
    return loss


def _delightful(
    log_probs: Tensor,
    advantages: Tensor,
    behavior_log_probs: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    temperature: float,
    unit: Literal["token", "sample"],
) -> Tensor:
    weight = delightful_weight(log_probs, advantages, mask, temperature, unit)
    return -weight * per_row(advantages, log_probs) * log_probs


def delightful_weight(
    log_probs: Tensor, advantages: Tensor, mask: Tensor | None, temperature: float, unit: Literal["token", "sample"]
) -> Tensor:
    """The weight of `delightful`, σ(χ/η), to multiply the advantages of another loss with; detached.

    >>> delightful_weight(torch.tensor([-3.0, -3.0]), torch.tensor([1.0, -1.0]), None, 1.0, "token")
    tensor([0.9526, 0.0474])

    Args:
        log_probs: (B,) or (B, T).
        advantages: (B,), or (B, T) with (B, T).
        mask: (B, T), 1 for tokens that count.
        temperature: η > 0.
        unit: as in `delightful`.

    Returns:
        The shape of `log_probs`; (B, 1) for samples of several tokens.
    """
    temperature = checked_temperature(temperature)
    checks.choice("unit", unit, UNITS)
    chi = -per_row(advantages, log_probs) * log_probs.detach()
    if unit == "sample" and chi.dim() == 2:
        chi = (chi if mask is None else chi.where(checks.mask(mask, chi.shape), 0)).sum(dim=1, keepdim=True)
    return torch.sigmoid(chi / temperature)


def checked_temperature(temperature: float) -> float:
    return checks.number("temperature", temperature, "a number above 0", lambda temperature: temperature > 0)
