"""Log-probs of sampled tokens, read off the forward passes that `generate` of transformers runs anyway."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Recorder:
    """What one call of `generate` saw: at each pass the tokens chosen before it, and their log-probs.

    Args:
        temperature: what logits are divided by.
    """

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature
        self._tokens: list[Tensor] = []
        self._log_probs: list[Tensor] = []
        self._logits: Tensor | None = None
        self._watches = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, passes are not taken."""
        self._watches = False
        yield
        self._watches = True

    @torch.no_grad()
    def see(self, ids: Tensor, logits: Tensor) -> None:
        """Take a forward pass on `ids` (B, n), the last of them just chosen, that gave `logits` (B, m, V)."""
        if not self._watches:
            return
        if self._logits is not None and len(ids) == len(self._logits):
            self._choose(ids[:, -1])
        self._logits = logits[:, -1]

    @torch.no_grad()
    def log_probs(self, completions: list[list[int]]) -> list[list[float]] | None:
        """Log-probs of each completion's tokens, or None where the passes seen were not those of these completions.

        Assisted decoding, beams, or a prompt read in several parts run other passes than one a token.
        """
        if self._logits is None or len(completions) != len(self._logits):
            return None
        last = len(self._tokens)
        if max(map(len, completions)) > last + 1:
            return None
        final = [tokens[last] if len(tokens) > last else 0 for tokens in completions]
        self._choose(torch.tensor(final, device=self._logits.device))
        seen, log_probs = torch.stack(self._tokens, dim=1).tolist(), torch.stack(self._log_probs, dim=1).tolist()
        if any(row[: len(tokens)] != tokens for row, tokens in zip(seen, completions, strict=True)):
            return None
        return [row[: len(tokens)] for row, tokens in zip(log_probs, completions, strict=True)]

    def _choose(self, tokens: Tensor) -> None:
        assert self._logits is not None  # both callers looked
        logits = self._logits.float()
        if self._temperature != 1:  # a copy of all of them
            logits = logits / self._temperature
        self._tokens.append(tokens)
        self._log_probs.append(logits.gather(1, tokens.unsqueeze(1)).squeeze(1) - logits.logsumexp(dim=1))


@contextmanager
def recording(model: nn.Module, temperature: float) -> Iterator[Recorder]:
    """Watch what `model` (its base, where adapters wrap it) is run on and gives inside."""
    recorder = Recorder(temperature)

    def after_pass(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any], output: Any) -> None:
        ids, logits = given.get("input_ids", args[0] if args else None), getattr(output, "logits", None)
        if isinstance(ids, Tensor) and isinstance(logits, Tensor):
            recorder.see(ids, logits)

    base: Any = model
    peft = sys.modules.get("peft.peft_model")  # who has adapters has imported it, so we need not
    if peft is not None and isinstance(model, peft.PeftModel):  # whose `generate` runs the model inside
        base = base.get_base_model()
    hook = base.register_forward_hook(after_pass, with_kwargs=True)
    try:
        yield recorder
    finally:
        hook.remove()
