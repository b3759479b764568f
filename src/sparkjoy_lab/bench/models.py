"""Decoders of the shapes people train, with random weights, and a batch to take one step on; needs transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparkjoy_lab.policies.adapters import LowRankAdapter
from sparkjoy_lab.training.memory import FLOAT, check_memory

Model = Literal["gpt2-2m", "gpt2-14m", "gpt2-60m", "llama-2m", "llama-14m", "llama-60m", "qwen-0.5b"]

SIZES: dict[str, tuple[int, int, int]] = {"2m": (128, 4, 4), "14m": (384, 6, 6), "60m": (704, 9, 11)}
"""Width, layers and heads; parameters with tied embeddings of 8,192 tokens."""


@dataclass(frozen=True)
class Workload:
    """One step's work: a model and its batch, the same in every process for the same seed."""

    model: Model = "gpt2-2m"
    """Decoder, tied embeddings: GPT-2-shaped, Llama-shaped, or the shape of Qwen2.5-0.5B (for an accelerator)."""
    rows: int = 64
    """Answers in the batch."""
    length: int = 128
    """Tokens of an answer."""
    prompt: int = 1
    """Tokens before an answer."""
    group: int = 8
    """Answers to each prompt; they follow one another."""
    vocabulary: int = 8_192
    """Size of the vocabulary."""
    positive: float = 0.5
    """Fraction of the rows with a positive advantage."""
    zero: float = 0.0
    """Fraction of the rows with an advantage of zero: groups that all fail or all succeed."""
    checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    train_only: Literal["everything", "lora"] = "everything"
    """lora: a frozen body, with rank-8 adapters on the attention's projections."""
    bfloat16: bool = False
    """Weights and activations in bfloat16."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where it runs."""
    seed: int = 0
    """Of weights, tokens and advantages."""

    def __post_init__(self) -> None:
        for name in ("rows", "length", "prompt", "group", "vocabulary"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: expected at least 1.")
        if not (self.positive >= 0 and self.zero >= 0 and self.positive + self.zero <= 1):
            raise ValueError(f"--positive {self.positive} --zero {self.zero}: expected fractions of at most 1 in all.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees none here; leave the flag out to run on the CPU.")
        if self.device == "cpu":
            tokens = 8 * self.rows * (self.prompt + self.length)
            logits = FLOAT * self.length * self.vocabulary
            flags = f"--rows {self.rows} --length {self.length} --prompt {self.prompt} --vocabulary {self.vocabulary}"
            check_memory(tokens + logits + 2 * FLOAT * SIZES["2m"][0] * self.vocabulary, flags)


@dataclass(frozen=True)
class Problem:
    """What a step needs: the model, its log-probs of rows (sharing tokens too), the rows, and what they are worth."""

    module: nn.Module
    log_prob_fn: Callable[[dict[str, Tensor]], Tensor]
    sharing: Callable[[dict[str, Tensor]], Tensor]
    batch: dict[str, Tensor]
    advantages: Tensor
    log_probs: Tensor


def build(workload: Workload) -> Problem:
    """The problem, with the log-probs a sampler would have recorded.

    Raises:
        ValueError: transformers is not installed.
    """
    module = _module(workload)  # says what to install
    from sparkjoy.integrations.transformers import SharedTokens

    dtype = torch.bfloat16 if workload.bfloat16 else torch.float32
    module = module.to(device=workload.device, dtype=dtype)
    if workload.train_only == "lora":
        _freeze_all_but_adapters(module)
    if workload.checkpointing:
        module.activation_checkpointing_enable()
    module.train()
    generator = torch.Generator().manual_seed(workload.seed)
    shape = (workload.rows, workload.prompt + workload.length)
    tokens = torch.randint(workload.vocabulary, shape, generator=generator)
    first_of_group = torch.arange(workload.rows) // workload.group * workload.group
    tokens[:, : workload.prompt] = tokens[first_of_group, : workload.prompt]
    successes, nothing = round(workload.positive * workload.rows), round(workload.zero * workload.rows)
    advantages = 0.5 + torch.rand(workload.rows, generator=generator)
    advantages[successes:] *= -1
    advantages[workload.rows - nothing :] = 0
    advantages = advantages[torch.randperm(workload.rows, generator=generator)]
    batch = {"tokens": tokens.to(workload.device)}

    def log_prob_fn(rows: dict[str, Tensor]) -> Tensor:
        targets = rows["tokens"][:, workload.prompt :]
        logits = module(rows["tokens"][:, :-1], use_cache=False, logits_to_keep=targets.shape[1]).logits
        losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        return -losses.view_as(targets)

    shared = SharedTokens(module)

    def sharing(rows: dict[str, Tensor]) -> Tensor:
        ids = rows["tokens"]
        scored = (torch.arange(ids.shape[1], device=ids.device) >= workload.prompt).expand_as(ids)
        return shared.log_probs(ids, torch.ones_like(ids), scored)[:, workload.prompt :]

    with torch.no_grad():
        parts = [log_prob_fn({"tokens": part}) for part in batch["tokens"].split(4)]
    return Problem(module, log_prob_fn, sharing, batch, advantages.to(workload.device), torch.cat(parts))


def _module(workload: Workload) -> Any:
    try:
        import transformers
    except ImportError:
        raise ValueError('sparkjoy bench needs transformers: pip install "sparkjoy[bench]".') from None
    torch.manual_seed(workload.seed)
    family, size = workload.model.split("-")
    if family == "qwen":
        qwen = transformers.Qwen2Config(
            vocab_size=workload.vocabulary,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
        return transformers.Qwen2ForCausalLM(qwen)
    width, layers, heads = SIZES[size]
    if family == "gpt2":
        gpt2 = transformers.GPT2Config(
            vocab_size=workload.vocabulary,
            n_positions=workload.prompt + workload.length,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
        return transformers.GPT2LMHeadModel(gpt2)
    llama = transformers.LlamaConfig(
        vocab_size=workload.vocabulary,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(llama)


def _freeze_all_but_adapters(module: nn.Module) -> None:
    reference = next(module.parameters())
    module.requires_grad_(False)
    names = [name for name, _ in module.named_modules() if name.endswith(("c_attn", "q_proj", "v_proj"))]
    for name in names:
        parent_name, _, own_name = name.rpartition(".")
        adapted = LowRankAdapter(module.get_submodule(name), rank=8)
        nn.init.normal_(adapted.up, std=0.02)  # as after some steps: at zero, half of the gradients would be
        setattr(module.get_submodule(parent_name), own_name, adapted.to(reference))
