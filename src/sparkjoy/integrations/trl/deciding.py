"""What is known of the completions of a generation batch when it is decided which to keep, and what to log about it."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparkjoy import signs
from sparkjoy.gates import Decision
from sparkjoy.scores import ScoreFunction
from sparkjoy.step.deciding import row_scores
from sparkjoy.step.inputs import check_inputs

PROMPT_LETTERS = 40
"""Of a prompt's name."""


def worth(advantages: Tensor, own_advantages: Tensor, mask: Tensor) -> Tensor:
    """(B,) what tells a row's sign: its advantage to the gate, 0 where it has no token or the loss no term.

    Args:
        advantages: (B,) or (B, T), those the gate ranks by.
        own_advantages: (B,) or (B, T), those of the loss.
        mask: (B, T), 1 for tokens that the loss has a term of.
    """
    teaches = (own_advantages.reshape(len(mask), -1) * mask != 0).any(dim=1)
    return signs.worth(advantages, mask).where(teaches, 0)


def score_of_rows(score: ScoreFunction, advantages: Tensor, log_probs: Tensor, mask: Tensor) -> Tensor:
    """(n,) a score of rows (n, T), summed over the tokens that count; a delight has the advantage's sign, always."""
    return row_scores(score, check_inputs({}, advantages, log_probs, None, mask, looks=False), log_probs)


@dataclass(frozen=True)
class Scored:
    """N completions, of all processes, as a hard gate sees them.

    Args:
        worth: (N,), 0 where a row teaches nothing.
        known: (N,) bool, whose delight is in `delights`.
        delights: (N,)
        other: (N,), another score to decide on than delight.
    """

    worth: Tensor
    known: Tensor
    delights: Tensor
    other: Tensor | None = None

    @property
    def score(self) -> Tensor:
        """(N,), what the gate decides on: where the delight is not known it does not matter, but for its sign."""
        return torch.where(self.known, self.delights, self.worth) if self.other is None else self.other

    def figures(self, keep: Tensor) -> dict[str, float]:
        """What to log about a decision; NaN where there is nothing to tell."""
        figures, delights, kept = kept_rates(self.worth, keep), self.delights[self.known], self.score[keep].abs()
        if len(delights):
            quantiles = torch.quantile(delights, torch.tensor([0.1, 0.5, 0.9]))
            figures |= dict(zip(("delight_p10", "delight_p50", "delight_p90"), quantiles.tolist(), strict=True))
            figures["delight_std"] = float(delights.std(unbiased=False))
        marginal = len(kept) > 0 and bool(self.known[keep][kept.argmin()])
        return figures | ({"price": float(kept.min())} if marginal else {})


def sized_figures(size: Tensor, decision: Decision) -> dict[str, float]:
    """What to log about the decision of a weighted gate on sizes (N,): the effective sample size is (Σs)² / Σs²."""
    figures, squares = kept_rates(size, decision.keep), size.square().sum()
    figures["effective_size"] = float(size.abs().sum().square() / squares) if bool(squares > 0) else 0.0
    return figures | ({} if decision.price is None else {"price": float(decision.price)})


def kept_rates(worth: Tensor, keep: Tensor) -> dict[str, float]:
    """How many of all, of the good, of the bad were kept, and how many teach anything; NaN of none."""
    return {
        "kept_rate": float(keep.float().mean()),
        "kept_rate_positive": float(keep[worth > 0].float().mean()),
        "kept_rate_negative": float(keep[worth < 0].float().mean()),
        "teaching_rate": float((worth != 0).float().mean()),
    }


def part_of(example: dict[str, Any], column: str | None) -> str:
    """The part of the data that an example belongs to: what `column` says, or its prompt, shortened but told apart.

    An environment's example may have no prompt, but then names the environment.

    Raises:
        ValueError: there is no such column.
    """
    if column is None:
        prompt = repr(example.get("prompt", example.get("environment")))
        short = len(prompt) <= PROMPT_LETTERS
        return prompt if short else f"{prompt[:PROMPT_LETTERS]}... ({zlib.crc32(prompt.encode())})"
    if column not in example:
        raise ValueError(f"gate_parts is {column!r}; the dataset has the columns {', '.join(example)}.")
    return str(example[column])


def draws(*seed: int) -> torch.Generator:
    """The draws of one decision. Its seed is of the run, the step and the place in it: a resumed run draws the same."""
    return torch.Generator().manual_seed(random.Random(repr(seed)).getrandbits(63))


def other_score(name: str, worth: Tensor, generator: torch.Generator) -> Tensor:
    """The scores that need no log-probs, (N,): "advantage", "absolute-advantage", "uniform"; 0 stays 0."""
    if name == "advantage":
        return worth
    if name == "absolute-advantage":
        return worth.abs()
    uniform = torch.rand(len(worth), generator=generator)
    return signs.with_sign(uniform, worth.abs()).where(worth != 0, 0)
