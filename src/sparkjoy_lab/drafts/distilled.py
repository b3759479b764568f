"""A small policy that learns to foresee the large one's log-probs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparkjoy import checks, states
from sparkjoy_lab.drafts.policy import checked_policy, load_into, log_probs_of


class DistilledDraft:
    """Screen with a small policy, taught from the exact log-probs that every step computes anyway.

    It minimises the squared difference of log-probs. Survivors are no fair sample of what the policy does, so that
    maximising their likelihood would teach what delights instead of what is likely; a regression asks only that the
    target be right where it is given.

    >>> from sparkjoy.testing import TinyPolicy
    >>> policy, draft = TinyPolicy(4, 3), DistilledDraft(TinyPolicy(4, 3, seed=1), learning_rate=0.1)
    >>> rows = {"state": torch.eye(4), "action": torch.tensor([0, 2, 1, 0])}
    >>> exact = policy.log_probs(rows).detach()
    >>> before = (draft(rows) - exact).square().mean()
    >>> for _ in range(20): draft.learn([(rows, exact)])
    >>> bool((draft(rows) - exact).square().mean() < 0.1 * before)
    True

    Args:
        student: a module with `log_probs(rows)`, of the same shape as the policy's.
        learning_rate: Adam's.
        every: steps from one lesson to the next; what is seen between is not taught.
        mask: `rows -> (n, T)`, 1 for tokens that count; None: all.

    Raises:
        ValueError: no such module, or a number outside its range.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        learning_rate: float = 3e-3,
        every: int = 1,
        mask: Callable[[Any], Tensor] | None = None,
    ) -> None:
        learning_rate = checks.number("learning_rate", learning_rate, "a number above 0", lambda rate: rate > 0)
        self.student = checked_policy(student, "student")
        self.every = checks.whole("every", every)
        if mask is not None:
            checks.function("mask", mask, "a function from rows to a mask (n, T), or None", ...)
        self._mask = mask
        self._optimizer = torch.optim.Adam(student.parameters(), lr=learning_rate, fused=True)
        self._steps = 0

    def __call__(self, rows: Any) -> Tensor:
        """Log-probs (n,) or (n, T) by the student."""
        return log_probs_of(self.student, rows)

    def learn(self, seen: Sequence[tuple[Any, Tensor]]) -> None:
        """One step of Adam towards the exact log-probs of the rows seen, where there are any."""
        checks.instance("seen", seen, Sequence, "pairs of rows and their exact log_probs")
        self._steps += 1
        if not seen or self._steps % self.every:
            return
        for pair in seen:
            checks.instance("of seen, each", pair, tuple, "a pair (rows, exact log_probs)")
        with torch.enable_grad():
            for rows, exact in seen:
                difference = self.student.log_probs(rows) - exact  # type: ignore[operator]  # checked_policy saw to it
                if self._mask is not None:
                    difference = difference.where(self._valid(rows, difference.shape), 0)
                difference.square().mean().backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _valid(self, rows: Any, shape: torch.Size) -> Tensor:
        assert self._mask is not None  # `learn` saw to it
        try:
            found = self._mask(rows)
        except Exception as error:
            checks.add_sentence(error, "It was raised by the draft's mask, which is called with rows of the batch.")
            raise
        return checks.mask(found, shape)

    def state_dict(self) -> dict[str, Any]:
        return {
            "student": self.student.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "steps": self._steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        states.check("DistilledDraft", state, student=states.is_state, optimizer=states.is_state, steps=states.is_count)
        load_into("student", self.student, state["student"])
        load_into("optimizer", self._optimizer, state["optimizer"])
        self._steps = state["steps"]
