"""A tiny Qwen2 in verl's FSDP engines on the CPU, and mini-batches as verl's trainer hands them over."""

import contextlib
import os

os.environ["VERL_PLATFORM"] = "cpu"

import cpu_platform  # noqa: F401, I001  # before verl asks which platform this is
import torch
import torch.distributed.fsdp._init_utils
from functools import partial
from torch.distributed.tensor import DTensor
from transformers import Qwen2Config, Qwen2ForCausalLM
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPActorConfig, FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.utils.losses import ppo_loss

from sparkjoy.integrations.verl import gated

# FSDP 1 sends weights from one process to the others on accelerators only; here both have read the same.
torch.distributed.fsdp._init_utils._check_module_states_for_sync_module_states = lambda states: None
FP32 = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
VOCABULARY = 30


def save_model(folder):
    """A Qwen2 of 5,000 parameters, the same on every call."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)


def engine(folder, strategy="fsdp2", lr=1e-2, cls=None, **gate):
    """verl's engine, with a gate where one is given."""
    model = HFModelConfig(
        path=str(folder), load_tokenizer=False, use_remove_padding=False, enable_gradient_checkpointing=False,
        override_config={"attn_implementation": "sdpa"},
    )  # fmt: skip
    options = {"strategy": strategy, "mixed_precision": FP32, "use_torch_compile": False, "model_dtype": "fp32"}
    if strategy == "fsdp":
        options["use_orig_params"] = True
    made = gated(**options, **gate) if gate else FSDPEngineConfig(**options)
    optimizer = FSDPOptimizerConfig(lr=lr, total_training_steps=100, weight_decay=0.0, clip_grad=1e9)
    arguments = {
        "model_config": model,
        "engine_config": made,
        "optimizer_config": optimizer,
        "checkpoint_config": CheckpointConfig(),
    }
    built = EngineRegistry.new("language_model", strategy, **arguments) if cls is None else cls(**arguments)
    built.initialize()
    return built


def dense(folder, **options):
    """verl's own engine."""
    return engine(folder, cls=FSDPEngineWithLMHead, **options)


def actor_loss(**options):
    """verl's ppo_loss as its actor worker makes it."""
    config = {"strategy": "fsdp2", "rollout_n": 4, "ppo_micro_batch_size_per_gpu": 1} | options
    return partial(ppo_loss, config=FSDPActorConfig(**config))


def mini_batch(rows=8, seed=0, rank=0, dynamic=0, micro=1, advantages=None, all_rows=16, **more):
    """Rows of unlike lengths as verl's V1 trainer has them: nested tensors, and what it says of the batch."""
    draw = torch.Generator().manual_seed(1000 * seed + rank)
    prompts, responses = (
        [
            torch.randint(VOCABULARY, (int(torch.randint(low, high, (1,), generator=draw)),), generator=draw)
            for _ in range(rows)
        ]
        for low, high in ((2, 6), (2, 9))
    )
    own = torch.randn(rows, generator=draw) if advantages is None else torch.as_tensor(advantages, dtype=torch.float32)
    fields = {
        "prompts": prompts,
        "responses": responses,
        "input_ids": [torch.cat(pair) for pair in zip(prompts, responses, strict=True)],
        "position_ids": [torch.arange(len(a) + len(b)) for a, b in zip(prompts, responses, strict=True)],
        "response_mask": [torch.ones(len(answer), dtype=torch.int64) for answer in responses],
        "advantages": [value.expand(len(answer)) for value, answer in zip(own, responses, strict=True)],
        "old_log_probs": [-3.4 + 0.3 * torch.randn(len(answer), generator=draw) for answer in responses],
        "ref_log_prob": [-3.4 + 0.3 * torch.randn(len(answer), generator=draw) for answer in responses],
    }
    fields["loss_mask"] = fields["response_mask"]
    data = tu.get_tensordict(
        {
            name: torch.nested.as_nested_tensor(list(map(torch.clone, values)), layout=torch.jagged)
            for name, values in fields.items()
        },
    )
    settings = {
        "global_batch_size": all_rows, "temperature": 1.0, "use_remove_padding": False, "use_fused_kernels": False,
        "calculate_entropy": False, "use_dynamic_bsz": bool(dynamic), "micro_batch_size_per_gpu": micro,
        "max_token_len_per_gpu": dynamic or 10**6,
    }  # fmt: skip
    return tu.assign_non_tensor(data, **(settings | more))


def with_advantages(data, change):
    """The same rows with other advantages: `change` is given those of one row after the other."""
    changed = data.clone()
    parts = [change(row, values.clone()) for row, values in enumerate(data["advantages"].unbind())]
    changed["advantages"] = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
    return changed


def gradient(engine, data, loss, part=lambda gradient: whole(gradient)):
    """The whole gradient of one mini-batch, in one vector in float64, with the metrics and the passes that it took."""
    with engine.train_mode(), counted(engine) as passes:
        engine.optimizer_zero_grad()
        output = engine.forward_backward_batch(data.clone(), loss)
        parts = [part(parameter.grad) for parameter in engine.module.parameters()]
    return torch.cat(parts).double(), output["metrics"], len(passes)


@contextlib.contextmanager
def counted(engine):
    """A list that grows by one with each micro-batch that the engine runs."""
    passes, step = [], engine.forward_step
    engine.forward_step = lambda *arguments, **named: passes.append(1) or step(*arguments, **named)
    yield passes
    engine.forward_step = step


def whole(tensor):
    """All of a tensor that may be sharded, flat; under FSDP 1 what is local, which every process compares."""
    if tensor is None:
        return torch.zeros(0)
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone().flatten()


def own(tensor):
    """What this process has of a tensor: no collective."""
    return tensor.to_local().detach().clone().flatten()


def train(engine, data, loss):
    """One optimizer step as the worker takes it: its metrics and passes."""
    with engine.train_mode(), counted(engine) as passes:
        output = engine.train_batch(data.clone(), loss)
        engine.lr_scheduler_step()
    return output["metrics"], len(passes)


def weights(engine):
    """All weights in one vector."""
    return torch.cat([whole(parameter) for parameter in engine.module.parameters()]).double()


def distance(found, expected):
    """Relative."""
    return float((found - expected).norm() / expected.norm())
