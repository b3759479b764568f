"""Run by torchrun: gradients of gated trainers in a process group, written to a folder for the test to compare.

Needs no pytest; every case is trained packed and masked, and each process writes what it had.
"""

import json
import os
import sys
import zlib
from pathlib import Path

import torch
from launching import leave
from transformers import GPT2Config, GPT2LMHeadModel
from trl_cases import Masked, drawn, far_from, trained

from sparkjoy.integrations.trl import KondoGRPOTrainer
from sparkjoy.integrations.trl.packing import LOSS_NORMALIZERS

torch.set_num_threads(1)


def forced(cls, wanted):
    """`cls` with a decision of our own: `wanted(rank, generation, rows) -> which to keep`."""

    class Forced(cls):
        generation = 0

        def _decide(self, gate, output):
            size = len(output["advantages"])
            self.generation += 1
            rank = self.accelerator.process_index
            return torch.tensor([wanted(rank, self.generation, row) for row in range(size)])

    return Forced


def absolute():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=14, n_positions=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=1)
    )


def fixed_rollouts(prompts, trainer):
    """Completions that depend on the prompt and its repetition only, so that any number of processes has the same."""
    seen, ids = {}, []
    for prompt in prompts:
        seen[prompt] = seen.get(prompt, 0) + 1
        draws = torch.Generator().manual_seed(zlib.crc32(f"{prompt} {seen[prompt]}".encode()))
        length = int(torch.randint(1, 8, (1,), generator=draws))
        ids.append([*torch.randint(3, 13, (length,), generator=draws).tolist(), 1])
    words = trainer.processing_class
    log_probs = [[-2.5] * len(completion) for completion in ids]
    return {"prompt_ids": words(prompts)["input_ids"], "completion_ids": ids, "logprobs": log_probs}


FORCED = {
    "one rank only": ({"loss_type": "grpo"}, lambda rank, generation, row: rank == 0 and row in (1, 6, 7)),
    "one row": ({"loss_type": "bnpo"}, lambda rank, generation, row: rank == 1 and row == 3),
    "none": ({"loss_type": "dapo"}, lambda rank, generation, row: False),
    "none in the last generation of a step": (
        {"loss_type": "dapo", "steps_per_generation": 2},
        lambda rank, generation, row: generation == 1 and row < 2,
    ),
    "an epoch's last, shorter step": (
        # 3 generations of 2 micro-steps: an optimizer step of 4 and one of 2, whose rows are all skipped.
        {"loss_type": "dapo", "steps_per_generation": 2, "max_steps": 2, "train_rows": 12},
        lambda rank, generation, row: generation != 3 and row == rank,
    ),
}
GATED = {
    f"gated, {loss}": {"loss_type": loss, "gate_rate": 0.3, "max_steps": 2, "num_iterations": 2}
    for loss in ("dapo", "grpo", "bnpo")
} | {
    "gated, lora, checkpointing": {"gate_rate": 0.3, "lora": True, "gradient_checkpointing": True},
    "gated, more generations a step": {"gate_rate": 0.3, "steps_per_generation": 2, "loss_type": "grpo"},
    "weighted": {"gate_noise": 0.5, "gate_rate": None, "max_steps": 2, "loss_type": "bnpo"},
    "gated, absolute positions": {"gate_rate": 0.3, "loss_type": "bnpo", "model": absolute, "disable_dropout": True},
    "shared": {"gate_rate": None, "share_tokens": True, "loss_type": "bnpo", "max_steps": 2, "num_iterations": 2},
    "shared, gated": {"gate_rate": 0.4, "share_tokens": True, "loss_type": "grpo", "gate_log_probs": "exact"},
    "shared, absolute positions": {
        "gate_rate": 0.4,
        "share_tokens": True,
        "loss_type": "bnpo",
        "model": absolute,
        "disable_dropout": True,
    },
    "packed for memory": {"gate_rate": 0.4, "loss_type": "grpo", "gate_pack_for": "memory"},
    "packed for memory, absolute positions": {
        "gate_noise": 0.5,
        "gate_rate": None,
        "gate_pack_for": "memory",
        "loss_type": "bnpo",
        "model": absolute,
        "disable_dropout": True,
    },
}


def main(folder, only):
    folder, rank = Path(folder), int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    results, tensors = {}, {}
    cases = {name: (changes, None) for name, changes in GATED.items()} | FORCED
    if only == "fixed":
        cases = {}
        for loss in ("dapo", "grpo"):
            made, steps = trained(
                folder / "out",
                gate_rate=0.3,
                loss_type=loss,
                gradient_accumulation_steps=4 // world,
                arguments={"rollout_func": fixed_rollouts},
            )
            tensors[f"fixed, {loss}"] = steps
            results[f"fixed, {loss}"] = made.state.log_history[0]
    if only == "noise":
        cases = {}
        for number, loss in enumerate(LOSS_NORMALIZERS):
            sizes = ("exact", "stale", "none")[number % 3]
            steps, dense, made = drawn(folder / "out", 20, sizes, loss_type=loss, gradient_accumulation_steps=2)
            tensors[loss] = steps[-1]
            figures = ("kept_rate", "noise", "price")
            results[loss] = {name: made.state.log_history[0][f"gate/{name}"] for name in figures} | {
                "far": far_from(steps, dense),
                "differs": (steps.std(dim=0).norm() / dense.norm()).item(),
            }
    for name, (changes, wanted) in cases.items():
        for side, cls in (("packed", KondoGRPOTrainer), ("masked", Masked)):
            options = {"gate_rate": 0.3} | changes
            if wanted is not None:
                cls = forced(cls, wanted)
            if "model" in options:
                options["model"] = options["model"]()
            if side == "masked":
                options.pop("share_tokens", None)
            made, steps = trained(folder / "out", cls=cls, **options)
            tensors[f"{name}: {side}"] = steps
            results[f"{name}: {side}"] = made.state.log_history[0]
    torch.save(tensors, folder / f"{rank}.pt")
    (folder / f"{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
