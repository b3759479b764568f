"""TRL's GRPOTrainer, sharing tokens: what rows have in common is computed once, in every pass and while sampling."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from trl import GRPOTrainer
from trl.trainer import utils

from sparkjoy.integrations.sampling import Recorder, prompts_read_once
from sparkjoy.integrations.transformers import SharedTokens, evaluating, label_scores
from sparkjoy.integrations.trl.checkpoints import GateInCheckpoints
from sparkjoy.integrations.trl.config import KondoGRPOConfig
from sparkjoy.integrations.trl.rows import Rows, whole
from sparkjoy.prefix_tree import PrefixTree, fold

HAS_FUSED_HEAD = hasattr(utils, "add_fused_lm_head")
"""TRL 1.15 and later compute log-probs inside the model's forward pass, without its logits."""


class SharingMixin(GateInCheckpoints, GRPOTrainer):
    """What shares tokens in `KondoGRPOMixin`, which see."""

    args: Any  # a KondoGRPOConfig, or one of TRL's
    _shared: SharedTokens | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(self.args, KondoGRPOConfig) and self.args.share_tokens:
            try:
                self._shared = SharedTokens(self.model, temperature=self.temperature)
            except ValueError as error:
                raise ValueError(f"share_tokens=True: {error}") from None

    @property
    def _shares(self) -> bool:
        """Whether tokens are shared: asked for, and found to be right."""
        return self._shared is not None and bool(self._shared.agrees)

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **others: Any,
    ) -> Any:
        trls = functools.partial(super()._get_per_token_logps_and_entropies, model, compute_entropy=compute_entropy)
        if self._shared is None or not self._shares:
            return trls(input_ids, attention_mask, logits_to_keep, batch_size=batch_size, **others)
        found = []
        size = batch_size or len(input_ids)
        for ids, mask in zip(input_ids.split(size), attention_mask.split(size), strict=True):
            scored = mask * (torch.arange(ids.shape[1], device=mask.device) >= ids.shape[1] - logits_to_keep)
            tree = self._shared.fold(ids, mask, scored)
            if tree is None:
                found.append(trls(ids, mask, logits_to_keep)[:2])
            else:
                found.append(self._of_tree(model, tree, logits_to_keep, compute_entropy))
        log_probs, entropies = (None if values[0] is None else torch.cat(values) for values in zip(*found, strict=True))
        return log_probs, entropies, None

    def _of_tree(
        self, model: nn.Module, tree: PrefixTree, logits_to_keep: int, entropies: bool
    ) -> tuple[Tensor, Tensor | None]:
        assert self._shared is not None  # its callers looked
        inputs = self._shared.inputs(tree)
        with self.accelerator.autocast():
            if HAS_FUSED_HEAD:
                output = model(**inputs, shift_labels=tree.labels, fused_lm_head=True)
                found = [output.log_probs, output.entropy] if entropies else [output.log_probs]
            else:
                found = list(label_scores(model, inputs, tree.labels, self.temperature, entropies))
        log_probs, *more = (tree.unfold(values)[:, -logits_to_keep:] for values in found)
        return log_probs, more[0] if more else None

    def _compare_sharing(self, output: Rows) -> None:
        """Once, on the first rows of the first generation, with and without: all processes share or none does."""
        if self._shared is None or self._shared.agrees is not None:
            return
        ids, mask, scored = (rows[: self.args.per_device_train_batch_size] for rows in whole(output))
        tokens = output["completion_ids"].shape[1]
        with torch.no_grad(), evaluating(self.model), self.accelerator.autocast():
            plain, _, _ = super()._get_per_token_logps_and_entropies(self.model, ids, mask, tokens)
            of_tree, _ = self._of_tree(self.model, fold(ids, mask, scored), tokens, False)
            self._shared.compare(plain * scored[:, -tokens:], of_tree, self._everywhere)

    def _of_all(self, local: Tensor) -> Tensor:
        """What the processes have, one after another, on the CPU."""
        gathered: Tensor = self.accelerator.gather(local)
        return gathered.cpu()

    def _everywhere(self, true: bool) -> bool:
        """Whether it is so on every process."""
        return bool(self._of_all(torch.tensor([true], device=self.accelerator.device)).all())

    def _log_tokens(self) -> None:
        """Log the tokens of an optimizer step's passes, and count from there."""
        if self._shared is not None:
            for name in ("distinct_tokens", "padded_tokens"):
                self._metrics["train"][f"shared/{name}"].append(float(getattr(self._shared, name)))
                setattr(self._shared, name, 0)


@contextmanager
def reading_prompts_once(model: Any, recorder: Recorder | None, autocast: Callable[[], Any]) -> Iterator[None]:
    """Inside, `model.generate` reads each distinct prompt once, and casts the weights once and not in each pass.

    Args:
        model: what TRL generates with.
        recorder: is to see the passes after the prompts alone.
        autocast: of the accelerator, whose context is that of every pass of the model.
    """
    generate, own = model.generate, vars(model).get("generate")

    def sharing(**given: Any) -> Any:
        with autocast(), ExitStack() as stack:
            with nullcontext() if recorder is None else recorder.paused():
                read = stack.enter_context(prompts_read_once(model, given))
            return generate(**given, **read)

    model.generate = sharing
    try:
        yield
    finally:
        if own is None:
            del model.generate
        else:
            model.generate = own
