"""The noise that a weighted gate's draws added to a step's gradient, from what the step has seen."""

from __future__ import annotations

import torch
from torch import Tensor

from sparkjoy.engine.deciding import row_scores
from sparkjoy.engine.inputs import Inputs
from sparkjoy.engine.processes.ranks import Ranks, Scored
from sparkjoy.gates import Decision
from sparkjoy.noise import NoiseSums, expected_noise, noise_sums
from sparkjoy.scores import ScoreFunction


def added_noise(
    size: ScoreFunction,
    inputs: Inputs,
    scored: Scored,
    decision: Decision,
    exact: bool,
    differentiated: Tensor | None,
    ranks: Ranks,
) -> tuple[float, NoiseSums | None]:
    """The second moment that skipping added, over the batch's own, about the rows of all processes.

    Where the sizes decided on are exact it is a sum over all rows. Else the exact sizes of the kept rows, by the
    log-probs they were differentiated with, correct it, and are returned for the gate to learn from.

    Args:
        size: of a row's gradient in the loss.
        inputs: this process's rows.
        scored: what the gate decided on.
        decision: the gate's, about all rows.
        exact: whether those were exact sizes.
        differentiated: (B,) or (B, T) log-probs of the kept rows; None: there were none.
        ranks: the processes.
    """
    used = scored.score if scored.teaches is None else scored.score.where(scored.teaches.bool(), 0)
    noise = expected_noise(used, decision.probability)
    if exact:
        return noise, None
    used, keep, weight = (ranks.own(part) for part in (scored.score, decision.keep, decision.weight))
    sums = NoiseSums(*ranks.add(_own_sums(size, differentiated, inputs, used, keep, weight)).tolist())
    return noise * sums.ratio, sums


def _own_sums(
    size: ScoreFunction, differentiated: Tensor | None, inputs: Inputs, used: Tensor, keep: Tensor, weight: Tensor
) -> Tensor:
    """(4,) this process's part of the `NoiseSums`."""
    rows = keep.nonzero().squeeze(1)
    if differentiated is None or len(rows) == 0:
        return torch.zeros(4, dtype=torch.float64, device="cpu")
    exact = row_scores(size, inputs, differentiated)[rows]
    return noise_sums(exact, used[rows], weight[rows]).cpu()
