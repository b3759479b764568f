"""Baselines of the studies: PMPO's weights, and the expected confidence of the papers' MNIST."""

from __future__ import annotations

from torch import Tensor

from sparkjoy import checks
from sparkjoy.baselines import Rewards, float_dtype
from sparkjoy.checks import as_tensor, without_graph
from sparkjoy.scores import at_least_float32


def good_and_bad_advantage(advantages: Rewards, alpha: float = 0.5) -> Tensor:
    """PMPO's weights as advantages: αB/n₊ on the n₊ good answers, −(1 − α)B/n₋ on the n₋ bad ones (arXiv 2410.04166).

    Averaged over the batch, −U log π is then PMPO's loss: −α times the mean log-prob of the good answers plus (1 − α)
    times that of the bad ones. How good or bad they were no longer counts.

    >>> import torch
    >>> good_and_bad_advantage(torch.tensor([0.9, 0.1, 0.0, -0.3]))
    tensor([ 1.,  1.,  0., -2.])

    Args:
        advantages: (B,); above 0 is good, below 0 bad.
        alpha: weight of the good ones, in [0, 1].

    Raises:
        ValueError: `advantages` not (B,) or not finite, or `alpha` outside [0, 1].
    """
    given = as_tensor("advantages", advantages)
    if given.dim() != 1:
        raise ValueError(f"advantages has shape {tuple(given.shape)}; expected (B,).")
    alpha = checks.number("alpha", alpha, "a number in [0, 1]", lambda alpha: 0 <= alpha <= 1)
    checks.finite("advantages", given)
    good, bad = (signs.to(float_dtype(advantages, given)) for signs in (given > 0, given < 0))
    of_good, of_bad = good / good.sum().clamp(min=1), bad / bad.sum().clamp(min=1)
    return len(given) * (alpha * of_good - (1 - alpha) * of_bad)


def expected_confidence_advantage(rewards: Rewards, probabilities: Tensor) -> Tensor:
    """Advantage over the expected confidence, U = r − Σ_a π(a|s)² (arXiv 2603.14608).

    The baseline is the probability that two draws from the policy agree. It needs no label and no second sample, and
    tracks how sure the policy is; it suits rewards of 1 for the right action and 0 otherwise.

    >>> import torch
    >>> expected_confidence_advantage(torch.tensor([1.0, 0.0]), torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    tensor([ 0.5000, -1.0000])

    Args:
        rewards: (B,).
        probabilities: (B, K), the policy's over all K actions.

    Returns:
        (B,).

    Raises:
        ValueError: shapes that do not go together.
    """
    given = as_tensor("rewards", rewards)
    checks.tensor("probabilities", probabilities, (2,), checks.FLOATING, "(B, K)", given)
    if given.dim() != 1 or len(given) != len(probabilities):
        raise ValueError(
            f"rewards has shape {tuple(given.shape)} and probabilities {tuple(probabilities.shape)}; expected (B,) "
            "and (B, K)."
        )
    checks.finite("rewards", given)
    if probabilities.numel() and not all(-1e-3 <= extreme <= 1.01 for extreme in map(float, probabilities.aminmax())):
        raise ValueError("probabilities has values outside [0, 1]; expected probabilities, such as log_probs.exp().")
    probabilities = at_least_float32(without_graph(probabilities))
    return given.to(float_dtype(rewards, given)) - probabilities.square().sum(dim=1)
