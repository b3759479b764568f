"""How much each sample is worth a backward pass, from numbers a forward pass already gives.

Start here. `delight` is the product score of the papers. Every score is computed without a graph, and a score function
takes `(advantages, log_probs)`, so one of your own can be given to `GatedBackward(score=...)`; the laboratory has
others to compare it with.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from sparkjoy import checks
from sparkjoy.checks import without_graph

ScoreFunction = Callable[[Tensor, Tensor], Tensor]
"""`(advantages, log_probs) -> score`: (B,), or (B, T), which the engine sums over the valid tokens of a row.

What a function may say of itself, by `says` or as an attribute: `reads_log_probs = False`, so that none are computed
for it; `sign_of_advantage = True`, so that signs may decide without them; `is_size = True`, for the size of a gradient,
whose squares are summed over tokens instead.
"""
FACTS = ("reads_log_probs", "sign_of_advantage", "is_size")

SCORE = "a function (advantages, log_probs) -> score, such as sparkjoy.delight, or None"


def says(**facts: bool) -> Callable[[ScoreFunction], ScoreFunction]:
    """Say of a score what the engine may rely on: `reads_log_probs=False`, `sign_of_advantage=True`, `is_size=True`.

    >>> @says(reads_log_probs=False)
    ... def gains(advantages, log_probs):
    ...     return advantages.clamp(min=0)
    >>> reads_log_probs(gains), sign_of_advantage(gains)
    (False, False)

    Raises:
        ValueError: another name, or something else than a bool.
    """
    for name, value in facts.items():
        checks.choice("a fact", name, FACTS)
        checks.flag(name, value)

    def said(score: ScoreFunction) -> ScoreFunction:
        score.__dict__.update(facts)
        return score

    return said


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32 where it has lower precision: sums over tokens in bfloat16 would tie what differs."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def surprisal(log_probs: Tensor) -> Tensor:
    """Surprisal of the actions taken, ℓ = −log π(a|s), in nats (arXiv 2603.20526).

    >>> surprisal(torch.tensor([0.5, 0.125]).log())
    tensor([0.6931, 2.0794])

    Args:
        log_probs: log-probabilities of the actions taken, any shape.

    Returns:
        The same shape, detached, at least in float32, never negative: what rounding lifts above a log-probability of 0
        counts as 0.

    Raises:
        ValueError: a log-probability above 0 beyond the rounding of its dtype (or of a coarser one that all of them
            were converted from), which no discrete action has. The surprisal of a density has no zero, so that its
            sign tells nothing: decide by another score, such as `advantage_score`.
    """
    log_probs = without_graph(checks.tensor("log_probs", log_probs, kinds=checks.FLOATING))
    greatest = log_probs.max().item() if log_probs.numel() else 0.0
    if greatest > _rounding(log_probs.dtype) and not _rounded_elsewhere(log_probs, greatest):
        raise ValueError(
            f"log_probs has a value of {greatest:g}; the log-probability of a discrete action is at most 0. If these "
            "are probabilities: give their logarithm. If they are densities: their surprisal is below 0 where the "
            "policy is sharp, and delight would rank failures above successes. Decide by the advantage, "
            "score=sparkjoy.scores.advantage_score, or by a score of your own, for instance the advantage times "
            "log π(mode) - log π(a), which is never below 0."
        )
    log_probs = at_least_float32(log_probs)
    return -log_probs.clamp(max=0) if greatest > 0 else -log_probs  # NaN passes, for the caller to find


def _rounding(dtype: torch.dtype) -> float:
    """How far above 0 a log-probability may lie that was computed in `dtype`."""
    return 16 * max(torch.finfo(dtype).eps, 1e-5)


def _rounded_elsewhere(log_probs: Tensor, greatest: float) -> bool:
    """Whether every value has the few digits of a coarser dtype, within whose rounding the greatest lies."""
    coarser = (torch.bfloat16, torch.float16) if torch.finfo(log_probs.dtype).bits >= 32 else ()
    return any(greatest <= _rounding(dtype) and bool((log_probs == log_probs.to(dtype)).all()) for dtype in coarser)


@says(sign_of_advantage=True)
def delight(advantages: Tensor, log_probs: Tensor) -> Tensor:
    """Delight, χ = U · ℓ: advantage times surprisal (arXiv 2603.14608 and 2603.20526).

    Positive for a success, the more so the less it was expected; negative for a failure; 0 where either factor is 0.

    >>> delight(torch.tensor([1.0, 1.0, -1.0]), torch.tensor([0.5, 0.125, 0.125]).log())
    tensor([ 0.6931,  2.0794, -2.0794])

    Args:
        advantages: (B,), or (B, T) when `log_probs` is (B, T).
        log_probs: (B,) or (B, T), log-probabilities of the actions taken.

    Returns:
        The shape of `log_probs`, detached: never differentiated through.

    Raises:
        ValueError: shapes that do not go together, or a log-probability above 0.
    """
    return per_row(advantages, log_probs) * surprisal(log_probs)


def sequence_delight(advantages: Tensor, log_probs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Delight of whole answers, χ = Σ_t U_t ℓ_t over the valid tokens (arXiv 2603.20526).

    >>> log_probs = torch.tensor([[0.5, 0.5], [0.25, 0.125]]).log()
    >>> sequence_delight(torch.tensor([1.0, -1.0]), log_probs, mask=torch.tensor([[1, 1], [1, 0]]))
    tensor([ 1.3863, -1.3863])

    Args:
        advantages: (B,) one per answer, or (B, T) one per token.
        log_probs: (B, T), log-probabilities of the tokens taken.
        mask: (B, T), 1 for tokens that count; anything may stand where it is 0, NaN too. None: all count.

    Returns:
        (B,), detached. A row without a valid token has 0.

    Raises:
        ValueError: shapes that do not go together, or a valid log-probability above 0.
    """
    checks.tensor("log_probs", log_probs, (2,), checks.FLOATING, "(B, T)")
    advantages = at_least_float32(per_row(advantages, log_probs)).expand_as(log_probs)
    if mask is not None:
        mask = checks.mask(mask, log_probs.shape)
        advantages, log_probs = advantages.where(mask, 0), log_probs.where(mask, 0)
    return delight(advantages, log_probs).sum(dim=1)


@says(reads_log_probs=False, sign_of_advantage=True)
def advantage_score(advantages: Tensor, log_probs: Tensor) -> Tensor:
    """The advantage alone, U: better than expected, however likely it was. Shape of `advantages`, detached.

    >>> advantage_score(torch.tensor([0.5, -0.5]), torch.tensor([-1.0, -3.0]))
    tensor([ 0.5000, -0.5000])
    """
    return checks.advantages(advantages)


def reads_log_probs(score: ScoreFunction) -> bool:
    """Whether a score depends on the log-probs; False where its function says so: `score.reads_log_probs = False`.

    >>> reads_log_probs(delight), reads_log_probs(advantage_score)
    (True, False)
    """
    return bool(getattr(score, "reads_log_probs", True))


def sign_of_advantage(score: ScoreFunction) -> bool:
    """Whether a score has the sign of the advantage; True where its function says so: `score.sign_of_advantage = True`.

    >>> sign_of_advantage(delight), sign_of_advantage(lambda advantages, log_probs: -log_probs)
    (True, False)
    """
    return bool(getattr(score, "sign_of_advantage", False))


def per_row(advantages: Tensor, log_probs: Tensor) -> Tensor:
    """`advantages`, detached and shaped to multiply `log_probs`: (B,) becomes (B, 1) beside (B, T)."""
    advantages = checks.advantages(advantages)
    checks.tensor("log_probs", log_probs, kinds=checks.FLOATING, beside=advantages)
    if advantages.shape == log_probs.shape:
        return advantages
    if advantages.dim() == 1 and log_probs.dim() == 2 and len(advantages) == len(log_probs):
        return advantages.unsqueeze(1)
    raise ValueError(
        f"advantages has shape {tuple(advantages.shape)} and log_probs {tuple(log_probs.shape)}; expected (B,) with "
        "(B,), or (B,) or (B, T) with (B, T)."
    )


def checked_score(score: Tensor, looks: bool = True) -> Tensor:
    """The score (N,) without its graph and at least in float32, as a gate takes it.

    Args:
        score: as it was given.
        looks: whether to look that it is finite; a gate that waits for the device anyway looks then.

    Raises:
        TypeError, ValueError: something else than a row of finite floating-point numbers.
    """
    score = at_least_float32(checks.without_graph(checks.row("score", score)))
    if looks:
        checks.finite("score", score)
    return score


# How far a row moves the policy in a loss: the sizes that `UnbiasedGate` keeps rows in proportion to.
#
# A term U log π(a) has a gradient of length |U| · ‖e_a − π‖ at the logits, which lies between |U| (1 − π(a)) and √2
# times that; 1 − π(a) needs the taken action's log-prob only. Sizes have the sign of U, by which draws are ordered. A
# size that is off costs noise, never a bias, unless it is 0 where the gradient is not.


@says(is_size=True)
def policy_gradient_size(advantages: Tensor, log_probs: Tensor) -> Tensor:
    """Size of a term of REINFORCE, PPO and GRPO: U (1 − π(a)).

    Of a clipped loss it is the size while the policy is the one that sampled; later, rows that the clip stops keep
    theirs, which costs a few rows and can never drop one that the clip lets through.

    >>> policy_gradient_size(torch.tensor([1.0, -1.0]), torch.tensor([0.5, 0.75]).log())
    tensor([ 0.5000, -0.2500])

    Args:
        advantages: (B,), or (B, T) when `log_probs` is (B, T).
        log_probs: (B,) or (B, T), log-probabilities of the actions taken.

    Returns:
        The shape of `log_probs`, detached; over a row's tokens the engine adds squares.

    Raises:
        ValueError: shapes that do not go together, or a log-probability above 0.
    """
    return -per_row(advantages, log_probs) * torch.expm1(-surprisal(log_probs))


@says(is_size=True)
def update_size(advantages: Tensor, log_probs: Tensor) -> Tensor:
    """Size of a term of DG: σ(χ) U (1 − π(a)), χ the delight (arXiv 2603.14608).

    >>> update_size(torch.tensor([1.0, -1.0]), torch.tensor([0.5, 0.5]).log())
    tensor([ 0.3333, -0.1667])

    Args:
        advantages: (B,), or (B, T) when `log_probs` is (B, T).
        log_probs: (B,) or (B, T), log-probabilities of the actions taken.

    Returns:
        The shape of `log_probs`, detached; over a row's tokens the engine adds squares.

    Raises:
        ValueError: shapes that do not go together, or a log-probability above 0.
    """
    return _delightful_size(advantages, log_probs, 1.0, "token")


def delightful_size(temperature: float, unit: Literal["token", "sample"]) -> Callable[[Tensor, Tensor], Tensor]:
    """`update_size` at another temperature, or with the delight of the whole answer."""
    return says(is_size=True)(partial(_delightful_size, temperature=temperature, unit=unit))


@says(is_size=True, reads_log_probs=False)
def advantage_size(advantages: Tensor, log_probs: Tensor) -> Tensor:
    """|U| alone, for each token: a size that needs no log-probs, and so no forward pass; more rows are kept by it.

    >>> advantage_size(torch.tensor([1.0, -1.0]), torch.zeros(2, 3)).shape
    torch.Size([2, 3])
    """
    return per_row(advantages, log_probs).expand_as(log_probs)


def is_size(score: Any) -> bool:
    """Whether a score function gives sizes.

    >>> is_size(update_size), is_size(delight)
    (True, False)
    """
    return bool(getattr(score, "is_size", False))


def _delightful_size(advantages: Tensor, log_probs: Tensor, temperature: float, unit: str) -> Tensor:
    advantages, surprised = per_row(advantages, log_probs), surprisal(log_probs)
    chi = advantages * surprised
    if unit == "sample" and chi.dim() == 2:
        chi = chi.sum(dim=1, keepdim=True)
    return -torch.sigmoid(chi / temperature) * advantages * torch.expm1(-surprised)
