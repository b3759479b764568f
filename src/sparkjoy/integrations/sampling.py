"""Sampling with `generate` of transformers: each distinct prompt read once, and log-probs read off its passes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

ROOM = 16
"""Tokens that a layer of the cache has room for, and a quarter of those it holds, before it is copied once more."""

WITH_A_CACHE = {
    "num_beams": (1,),
    "use_cache": (True,),
    "cache_implementation": ("dynamic",),
    "guidance_scale": (1,),
    "prompt_lookup_num_tokens": (),
    "prefill_chunk_size": (),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
}
"""Options of generation that a cache made before goes with, if they are unset or have these values."""

ARGUMENTS = ("input_ids", "attention_mask", "generation_config", "logits_processor", "stopping_criteria", "streamer")
"""Other arguments of `generate` that it goes with."""


@contextmanager
def prompts_read_once(model: nn.Module, given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What to give `generate` besides, inside: a cache in which each distinct prompt was read once.

    `generate` wants to read the last token of each prompt itself. Its first pass is not run: it gets what is known.

    Args:
        model: what `generate` is a method of.
        given: its other arguments, by name. Where they do not go with a cache there is nothing to give.
    """
    base = base_of(model)
    if not _goes_with_a_cache(base, given):
        yield {}
        return
    ids, mask = given["input_ids"], given["attention_mask"]
    rows, of_row = torch.cat([ids, mask.to(ids)], dim=1).unique(dim=0, return_inverse=True)
    ids, mask = rows.split(ids.shape[1], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)  # as `generate` has them
    read = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        output = model(**read, use_cache=True, logits_to_keep=1)
    name = "cache" if "cache" in output else "past_key_values"  # the older name
    cache = output[name]
    cache.layers = [RoomyLayer(layer, of_row) for layer in cache.layers]
    output.logits = output.logits[of_row]
    forward, known = base.forward, [output]

    @wraps(forward)
    def known_first(*arguments: Any, **given: Any) -> Any:
        if not known:
            return forward(*arguments, **given)
        for layer in cache.layers:
            layer.show_all()
        return known.pop()

    with mock.patch.object(base, "forward", known_first):
        yield {name: cache}


def _goes_with_a_cache(base: Any, given: dict[str, Any]) -> bool:
    configs = [config for config in (given.get("generation_config"), base.generation_config) if config is not None]
    for name, allowed in WITH_A_CACHE.items():
        values = (given.get(name), *(getattr(config, name, None) for config in configs))
        if next((value for value in values if value is not None), None) not in (None, *allowed):
            return False
    if any(name not in ARGUMENTS and not hasattr(base.generation_config, name) for name in given):
        return False
    windows = getattr(base.config.get_text_config(), "sliding_window", None)
    return given["input_ids"].shape[1] > 1 and not (base._is_stateful or base.config.is_encoder_decoder or windows)


class RoomyLayer(DynamicLayer):  # type: ignore[misc]  # transformers' is untyped
    """A layer of a cache with room for tokens to come, where the one it replaces is copied for each token.

    At first it does not show the last token that it holds.

    Args:
        layer: of the rows that were read.
        rows: (n,), which of these each of n rows goes on from.
    """

    def __init__(self, layer: DynamicLayer, rows: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self._hold(layer.keys[rows], layer.values[rows])
        self._show(layer.keys.shape[2] - 1)

    def show_all(self) -> None:
        """Show the last token too."""
        self._show(self.keys.shape[2] + 1)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values of new tokens, (n, heads, T, size); all there are."""
        if self.keys.shape[2] + key_states.shape[2] > self._room[0].shape[2]:
            self._hold(torch.cat([self.keys, key_states], dim=2), torch.cat([self.values, value_states], dim=2))
        else:
            self._write(self.keys.shape[2], key_states, value_states)
        return self.keys, self.values

    def _hold(self, *states: Tensor) -> None:
        """Copy keys and values to where there is room for more tokens."""
        rows, heads, length, _ = states[0].shape
        self._room = [held.new_empty(rows, heads, length + length // 4 + ROOM, held.shape[3]) for held in states]
        self._write(0, *states)

    def _write(self, start: int, *states: Tensor) -> None:
        for room, new in zip(self._room, states, strict=True):
            room[:, :, start : start + new.shape[2]] = new
        self._show(start + states[0].shape[2])

    def _show(self, stop: int) -> None:
        self.keys, self.values = (room[:, :, :stop] for room in self._room)


def base_of(model: nn.Module) -> Any:
    """The model of transformers inside PEFT's adapters."""
    peft = sys.modules.get("peft")  # who has adapters has imported it, so we need not
    return model if peft is None or not isinstance(model, peft.PeftModel) else model.get_base_model()


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
    """Watch what `model` is run on and gives inside: its base, where adapters wrap it, whose `generate` runs that."""
    recorder = Recorder(temperature)

    def after_pass(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any], output: Any) -> None:
        ids, logits = given.get("input_ids", args[0] if args else None), getattr(output, "logits", None)
        if isinstance(ids, Tensor) and isinstance(logits, Tensor):
            recorder.see(ids, logits)

    hook = base_of(model).register_forward_hook(after_pass, with_kwargs=True)  # adapters' `generate` runs it inside
    try:
        yield recorder
    finally:
        hook.remove()
