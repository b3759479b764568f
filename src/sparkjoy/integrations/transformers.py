"""Each distinct token of a batch computed once, by a causal language model of transformers: log-probs and sampling.

    shared = SharedTokens(model)
    answers = shared.generate(prompt_ids, prompt_mask, max_new_tokens=64, do_sample=True)
    log_probs = shared.log_probs(ids, mask, scored)

Answers to one prompt share its tokens, equal answers share all of them. Log-probs, and so every loss, are those of the
plain pass up to rounding. See docs/shared_tokens.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.nn.parallel import DistributedDataParallel

from sparkjoy import checks
from sparkjoy.integrations.sampling import base_of, prompts_read_once
from sparkjoy.prefix_tree import UNSCORED, PrefixTree, fold, scorable, work

BALANCE = 4
"""Times the hidden size: the length of a row whose attention takes as long as the rest of its pass, on a CPU."""

WORTH = 0.95
"""The tree runs where its work is at most this part of the padded rows'."""

SLIDING = "sliding_attention"


class SharedTokens:
    """Log-probs and samples of a causal language model of transformers, each distinct token computed once.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> size = dict(vocab_size=30, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(**size)).eval()
    >>> shared = SharedTokens(model)
    >>> ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9], [5, 6, 7, 8]])
    >>> answers = torch.tensor([[0, 0, 0, 1]] * 3)
    >>> log_probs = shared.log_probs(ids, torch.ones(3, 4), answers)
    >>> plain = model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    >>> torch.allclose(log_probs[:, 3], plain[:, 2], atol=1e-5)
    True
    >>> shared.distinct_tokens, shared.padded_tokens  # 5 and 6, and 7 for each of the tokens after it
    (4, 12)

    The first batch that shares tokens runs both ways, once, without a graph: where they differ by more than rounding,
    it warns and shares nothing from then on. A batch whose tree is hardly smaller than its padded rows runs as it is.

    Args:
        model: attends to all tokens before or to a sliding window of them, by "sdpa" or "eager" attention. It may be
            wrapped in DistributedDataParallel, `fully_shard` or PEFT's adapters.
        temperature: what logits are divided by.

    Raises:
        ValueError: a model that cannot share tokens, and why.
    """

    def __init__(self, model: nn.Module, *, temperature: float = 1.0) -> None:
        self.model = model
        self.temperature = checks.number("temperature", temperature, "a number above 0", lambda value: value > 0)
        self.distinct_tokens = 0
        """Tokens that went through the model so far, padding between trees included."""
        self.padded_tokens = 0
        """Tokens that the same batches have as padded rows."""
        self.agrees: bool | None = None
        """Whether log-probs with shared tokens are those without; None until a batch that shares some has told."""
        self._unwrapped: Any = model.module if isinstance(model, DistributedDataParallel) else model
        self._config = base_of(self._unwrapped).config.get_text_config()
        why = refusal(self._unwrapped)
        if why is not None:
            raise ValueError(why)

    def log_probs(self, ids: Tensor, mask: Tensor, scored: Tensor) -> Tensor:
        """Log-probs of the scored tokens, with a graph; (n, T), 0 elsewhere.

        Args:
            ids: (n, T) tokens, prompts and answers.
            mask: (n, T), 0 for padding, on either side; position ids count what it leaves, as `generate` has them.
            scored: (n, T), nonzero for the tokens wanted, an answer's. The first token of a row has no log-prob.
        """
        return self._values(ids, mask, scored, entropies=False)[0]

    def log_probs_and_entropies(self, ids: Tensor, mask: Tensor, scored: Tensor) -> tuple[Tensor, Tensor]:
        """As `log_probs`; and the entropies of the distributions that the scored tokens are drawn from, (n, T)."""
        log_probs, entropies = self._values(ids, mask, scored, entropies=True)
        return log_probs, entropies

    def generate(self, ids: Tensor, mask: Tensor, **options: Any) -> Any:
        """What `model.generate` returns, with each distinct prompt read once: by the same draws, the same answers.

        Args:
            ids: (n, P) prompts, padded on the left, each as often as it is to be answered.
            mask: (n, P), 0 for padding.
            options: those of `generate`. With beams, an assistant, a sliding window or another cache than the dynamic
                one, the prompts are read as often as they stand there.
        """
        given = {"input_ids": ids, "attention_mask": mask, **options}
        with prompts_read_once(self._unwrapped, given) as read:
            return self._unwrapped.generate(**given, **read)

    # The pass

    def _values(self, ids: Tensor, mask: Tensor, scored: Tensor, entropies: bool) -> tuple[Tensor, ...]:
        scored = scorable(mask, scored)
        positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)  # as `generate` has them
        tree = self.fold(ids, mask, scored, positions)
        if tree is not None and self.agrees is None:
            with torch.no_grad(), evaluating(self.model):
                of_rows = self._of_rows(ids, mask, scored, positions, False)
                self.compare(of_rows[0], self._of_tree(tree, False)[0])
            if not self.agrees:
                self.distinct_tokens += ids.numel() - tree.ids.numel()
                tree = None
        return self._of_tree(tree, entropies) if tree else self._of_rows(ids, mask, scored, positions, entropies)

    def _of_tree(self, tree: PrefixTree, entropies: bool) -> tuple[Tensor, ...]:
        found = label_scores(self.model, self.inputs(tree), tree.labels, self.temperature, entropies)
        return tuple(tree.unfold(values) for values in found)

    def _of_rows(
        self, ids: Tensor, mask: Tensor, scored: Tensor, positions: Tensor, entropies: bool
    ) -> tuple[Tensor, ...]:
        labels = pad(ids.where(scored, UNSCORED)[:, 1:], (0, 1), value=UNSCORED)
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": False}
        found = label_scores(self.model, given, labels, self.temperature, entropies)
        return tuple(pad(values[:, :-1], (1, 0)) for values in found)

    def fold(self, ids: Tensor, mask: Tensor, scored: Tensor, positions: Tensor | None = None) -> PrefixTree | None:
        """The tree to run in place of the rows, or None where these are to run; and count its tokens."""
        balance = BALANCE * self._config.hidden_size
        tree = None if self.agrees is False else fold(ids, mask, scored, positions=positions, balance=balance)
        if tree is not None and work(tree.ids.shape, balance) > WORTH * work(ids.shape, balance):
            tree = None
        self.padded_tokens += ids.numel()
        self.distinct_tokens += ids.numel() if tree is None else tree.ids.numel()
        return tree

    def inputs(self, tree: PrefixTree) -> dict[str, Any]:
        """What the model is called with in order to compute a tree."""
        window = getattr(self._config, "sliding_window", None)
        kinds = set(getattr(self._config, "layer_types", None) or ())
        if SLIDING in kinds:
            mask: Any = {kind: self._mask(tree, window if kind == SLIDING else None) for kind in kinds}
        else:
            mask = self._mask(tree, None if kinds else window)
        return {"input_ids": tree.ids, "attention_mask": mask, "position_ids": tree.positions, "use_cache": False}

    def _mask(self, tree: PrefixTree, window: int | None) -> Tensor:
        sees = tree.sees(window).unsqueeze(1)
        if self._config._attn_implementation == "sdpa":
            return sees
        dtype = next(self.model.parameters()).dtype  # "eager" adds the mask to its scores
        return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill(~sees, torch.finfo(dtype).min)

    def compare(self, plain: Tensor, of_tree: Tensor, everywhere: Callable[[bool], bool] = bool) -> None:
        """Share from now on, or not, by the log-probs of one batch both ways.

        Args:
            everywhere: tells of several processes whether all say so.
        """
        difference, device = float((plain - of_tree).abs().mean()), plain.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        rounding = torch.finfo(dtype or next(self.model.parameters()).dtype).eps ** 0.5
        self.agrees = everywhere(difference <= rounding)
        if not self.agrees:
            name = type(base_of(self._unwrapped)).__name__
            warnings.warn(
                f"tokens are not shared: {name}'s log-probs would be off by {difference:.2g} on average, more than by "
                f"rounding ({rounding:.2g}). It looks at more than its attention mask and position ids tell.",
                stacklevel=2,
            )


def label_scores(
    model: nn.Module, inputs: dict[str, Any], labels: Tensor, temperature: float, entropies: bool
) -> tuple[Tensor, ...]:
    """Log-probs of labels (R, N), each at the token before it, and maybe entropies; (R, N), 0 where there is no label.

    Logits are made of the columns that have a label only.
    """
    columns = (labels != UNSCORED).any(dim=0).nonzero().flatten()
    if len(columns) == 0:
        columns = columns.new_zeros(1)  # zeros with a graph, for whoever differentiates on all processes
    logits = model(**inputs, logits_to_keep=columns).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    wanted = labels[:, columns]
    if entropies:
        of_all = logits.log_softmax(dim=-1)
        found = [of_all.gather(2, wanted.clamp(min=0).unsqueeze(2)).squeeze(2), -(of_all.exp() * of_all).sum(dim=2)]
    else:
        losses = cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none", ignore_index=UNSCORED)
        found = [-losses.view(wanted.shape)]
    blank = torch.zeros(labels.shape, dtype=logits.dtype, device=logits.device)
    return tuple(blank.index_copy(1, columns, values.where(wanted != UNSCORED, 0)) for values in found)


def refusal(model: nn.Module) -> str | None:
    """Why this model (adapters included) cannot share tokens; None where nothing is known against it."""
    base = base_of(model)
    config, name = base.config.get_text_config(), type(base).__name__
    others = set(getattr(config, "layer_types", None) or ()) - {"full_attention", SLIDING}
    if prepends_tokens(model):
        return "tokens cannot be shared under prompt or prefix tuning, which puts tokens of its own before each row."
    if base.config.is_encoder_decoder:
        return f"tokens cannot be shared in {name}: an encoder's states depend on all its tokens."
    if others or base._is_stateful:
        kinds = ", ".join(sorted(others)) or "a recurrent state"
        return f"tokens cannot be shared in {name}: it has layers ({kinds}) whose state does not branch."
    if config.model_type in ("bloom", "mpt") or getattr(config, "alibi", False):
        return (
            f"tokens cannot be shared in {name}: ALiBi takes distances from the order of tokens, not from position ids."
        )
    if config._attn_implementation not in ("sdpa", "eager"):
        return (
            f"tokens cannot be shared under {config._attn_implementation!r} attention, which takes no mask of a tree. "
            "Load the model with attn_implementation='sdpa'."
        )
    return None


def longest_with_fixed_rotations(config: Any) -> float:
    """Tokens of a row beyond which a model's rotations depend on the longest row of its batch; for most, infinite."""
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    longest = torch.inf
    for kind in (rope, *(value for value in rope.values() if isinstance(value, dict))):  # one for each kind of layer
        if kind.get("rope_type") == "longrope":
            longest = min(longest, kind.get("original_max_position_embeddings", config.max_position_embeddings))
        elif kind.get("rope_type") == "dynamic":
            longest = min(longest, config.max_position_embeddings)
    return longest


def prepends_tokens(model: nn.Module) -> bool:
    """Whether an adapter (prompt, prefix or p-tuning) puts tokens of its own left of a row and its padding."""
    return base_of(model) is not model and bool(model.active_peft_config.is_prompt_learning)  # type: ignore[union-attr]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout or other draws; each module is as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
