"""An experiment: keep or skip single tokens instead of whole answers.

A kept row's tokens all go through the model whatever is kept of them, since later tokens attend to earlier ones. What
can truly be saved is rows without a kept token and the tail after the last kept one. `docs/lab_notebook.md` says how it
learns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparkjoy import checks, states
from sparkjoy.gates import Decision, Gate
from sparkjoy.gates.decision import GATE, load_state, state_of
from sparkjoy.losses import Loss, reinforce
from sparkjoy.scores import delight
from sparkjoy.step.backward import GatedBackward
from sparkjoy.step.inputs import LogProbFunction
from sparkjoy.step.report import BackwardReport


class TokenGatedBackward:
    """The gradient of the tokens worth a backward pass, each by its own delight, χ_t = U_t ℓ_t.

    The gradient equals that of the full batch with skipped tokens' terms multiplied by zero, divided by all tokens.

    >>> import sparkjoy as sj
    >>> from sparkjoy.testing import TinyPolicy
    >>> policy = TinyPolicy(4, 3)
    >>> batch = {"state": torch.ones(10, 5, 4), "action": torch.zeros(10, 5, dtype=torch.long)}
    >>> advantages = torch.arange(10.0)
    >>> step = TokenGatedBackward(sj.KondoGate(rate=0.1))
    >>> report = step(policy.log_probs, batch, advantages, log_probs=policy.log_probs(batch).detach())
    >>> report.kept, int(report.decision.keep.sum()), report.backward_tokens  # one row has all five kept tokens
    (1, 5, 5)

    Args:
        gate: decides on all B · T tokens at once.
        loss: as `GatedBackward`'s.
        trim: `(batch, length) -> batch` with answers cut to their first `length` tokens; None: no tail is saved.
        backward: as `GatedBackward`'s.
    """

    def __init__(
        self,
        gate: Gate,
        *,
        loss: Loss = reinforce,
        trim: Callable[[Any, int], Any] | None = None,
        backward: Callable[[Tensor], Any] = torch.Tensor.backward,
    ) -> None:
        self.gate = checks.function("gate", gate, GATE, ..., ...)
        if trim is not None:
            checks.function("trim", trim, "a function (batch, length) -> batch, or None", ..., ...)
        self.trim = trim
        self._options: dict[str, Any] = {"loss": loss, "backward": backward}

    def __call__(
        self,
        log_prob_fn: LogProbFunction,
        batch: Any,
        advantages: Tensor,
        *,
        log_probs: Tensor,
        mask: Tensor | None = None,
    ) -> BackwardReport:
        """Add the gradient of the kept tokens to `.grad`.

        Args:
            log_prob_fn: as `GatedBackward`'s; after trimming it returns (n, length).
            batch: likewise.
            advantages: (B,) or (B, T).
            log_probs: (B, T), known ones to decide on.
            mask: (B, T), 1 for tokens that count.

        Returns:
            A report whose decision is about all B · T tokens, in order; its `kept` and rows count answers, its backward
            tokens the positions that were differentiated, kept or not.
        """
        checks.tensor("log_probs", log_probs, (2,), checks.FLOATING, "(B, T)")
        valid = torch.ones_like(log_probs, dtype=torch.bool) if mask is None else checks.mask(mask, log_probs.shape)
        decision = self.gate(delight(advantages, log_probs.where(valid, 0)).where(valid, 0).flatten())
        keep = decision.keep.view_as(valid) & valid
        positions = keep.any(dim=0).nonzero()
        length = int(positions[-1]) + 1 if len(positions) and self.trim is not None else log_probs.shape[1]
        if self.trim is not None:
            batch = self.trim(batch, length)
        step = GatedBackward(_every_row_that_teaches, normalizer=max(1, int(valid.sum())), **self._options)
        report = step(
            log_prob_fn,
            batch,
            advantages if advantages.dim() == 1 else advantages[:, :length],
            log_probs=log_probs[:, :length],
            mask=keep[:, :length],
        )
        ran = report.backward_rows * length
        return replace(report, decision=decision, forward_tokens=ran, backward_tokens=ran)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"gate": state_of(self.gate)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        states.check("TokenGatedBackward", state, gate=states.is_state)
        load_state(self.gate, state["gate"])


def _every_row_that_teaches(score: Tensor, cost: Tensor | None = None) -> Decision:
    """The engine itself drops rows without a kept token: their advantage is 0 at every token that counts."""
    ones = torch.ones_like(score)
    return Decision(ones.bool(), score.new_zeros(()), ones, ones)
