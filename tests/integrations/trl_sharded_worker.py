"""Run by torchrun: gated trainers whose weights or gradients are sharded, on CPUs, for the test to compare.

accelerate shards on accelerators only: with `use_cpu` it makes DDP of DeepSpeed and FSDP without a word. So it is told
that these processes have some, and that their device is the CPU.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from launching import leave
from torch.distributed.tensor import DTensor
from trl_cases import Masked, trained
from trl_worker import FORCED, forced

from sparkjoy.integrations.trl import KondoGRPOTrainer

torch.set_num_threads(1)
PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
CASES = {
    "dapo": ({"max_steps": 2}, None),
    "grpo, screened": ({"loss_type": "grpo", "gate_log_probs": "exact", "max_steps": 2}, None),
    "bnpo, two iterations": ({"loss_type": "bnpo", "num_iterations": 2, "max_steps": 2}, None),
    "weighted": ({"gate_noise": 0.5, "gate_rate": None, "max_steps": 2}, None),
    "shared": ({"gate_rate": None, "share_tokens": True, "max_steps": 2, "gradient_checkpointing": True}, None),
    "shared, gated": ({"share_tokens": True, "loss_type": "grpo", "gate_log_probs": "exact", "max_steps": 2}, None),
    "packed for memory, checkpointing": ({"gate_pack_for": "memory", "gradient_checkpointing": True}, None),
} | {name: FORCED[name] for name in ("one rank only", "none", "none in the last generation of a step")}


def sharding(kind):
    """Options of the trainer for "fsdp2", "fsdp1", "zero1", "zero2" or "zero3"."""
    if kind.startswith("fsdp"):
        wraps = {"fsdp_version": int(kind[-1]), "transformer_layer_cls_to_wrap": ["Qwen2DecoderLayer"]}
        return {"fsdp": True, "fsdp_config": wraps}
    import deepspeed

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # it would be compiled first
    del deepspeed
    automatic = ("gradient_accumulation_steps", "train_micro_batch_size_per_gpu", "train_batch_size")
    config = {"zero_optimization": {"stage": int(kind[-1])}, "zero_allow_untested_optimizer": True}
    return {"gate_empty_step": "momentum", "deepspeed": config | dict.fromkeys(automatic, "auto")}


def weights(trainer, kind):
    """All weights in one vector; of plain SGD, they have moved by the sum of the steps' gradients."""
    parameters = list(trainer.model.parameters())
    if kind == "zero3":
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters):
            return torch.cat([parameter.detach().flatten() for parameter in parameters])
    whole = [value.full_tensor() if isinstance(value, DTensor) else value for value in parameters]
    return torch.cat([value.detach().flatten() for value in whole])


def main(folder, kind):
    folder, rank = Path(folder), os.environ["RANK"]
    tensors, logs = {}, {}
    for name, (changes, wanted) in CASES.items():
        for side, cls in (("packed", KondoGRPOTrainer), ("masked", Masked)):
            options = {"gate_rate": 0.3} | sharding(kind) | changes
            if side == "masked":
                options.pop("share_tokens", None)
            cls = cls if wanted is None else forced(cls, wanted)
            made, _ = trained(folder / "out", cls=cls, use_cpu=False, record=False, **options)
            tensors[f"{name}: {side}"] = weights(made, kind)
            logs[f"{name}: {side}"] = made.state.log_history[0]
            logs["kind"] = str(made.accelerator.distributed_type)
    torch.save(tensors, folder / f"{rank}.pt")
    (folder / f"{rank}.json").write_text(json.dumps(logs))


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
