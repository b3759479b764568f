"""`GatedBackward` in one call."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparkjoy.engine.backward import GatedBackward
from sparkjoy.engine.report import BackwardReport
from sparkjoy.engine.screening import LogProbFunction
from sparkjoy.gates import Gate


def gated_backward(
    log_prob_fn: LogProbFunction,
    batch: Any,
    advantages: Tensor,
    gate: Gate | None,
    *,
    log_probs: Tensor | None = None,
    behavior_log_probs: Tensor | None = None,
    mask: Tensor | None = None,
    **options: Any,
) -> BackwardReport:
    """`GatedBackward` in one call: differentiate only the samples the gate keeps, adding to `.grad`.

    It remembers nothing from call to call, so that counting FLOPs measures at every call; in a loop, a `GatedBackward`
    made once measures once.

    >>> import torch, sparkjoy as sj
    >>> logits = torch.zeros(4, 2, requires_grad=True)
    >>> def log_prob_fn(rows):
    ...     return logits.log_softmax(1)[rows, 0]
    >>> advantages = torch.tensor([1.0, -1.0, 3.0, 0.0])
    >>> report = sj.gated_backward(log_prob_fn, torch.arange(4), advantages, sj.KondoGate(rate=0.25))
    >>> report.kept, report.backward_rows, logits.grad.abs().sum(dim=1)
    (1, 1, tensor([0.0000, 0.0000, 0.7500, 0.0000]))

    Args:
        log_prob_fn: `rows -> (n,)` or `(n, T)` differentiable log-probs of the actions taken in `rows`.
        batch: a tensor, or a TensorDict, Mapping, namedtuple or dataclass of tensors, with leading dimension B.
        advantages: (B,), or (B, T) with log-probs of (B, T).
        gate: decides which samples to keep; None: all of them.
        log_probs: known ones to decide on, such as the sampler's; then deciding is free. As in `GatedBackward`'s call.
        behavior_log_probs: the denominator of a loss's ratio; default `log_probs`, else the current ones, detached.
        mask: (B, T), 1 for tokens that count; anything may stand where it is 0, NaN too.
        options: the options of `GatedBackward`.

    Returns:
        A `BackwardReport`, counted from what ran.

    Raises:
        ValueError: as `GatedBackward`.
    """
    return GatedBackward(gate, **options)(
        log_prob_fn, batch, advantages, log_probs=log_probs, behavior_log_probs=behavior_log_probs, mask=mask
    )
