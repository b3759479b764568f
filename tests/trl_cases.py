"""Small TRL trainers, gated and masked, whose gradients can be compared."""

import gc

import torch
import trl_task
from transformers import TrainerCallback

from sparkjoy.integrations.trl import KondoGRPOConfig, KondoGRPOTrainer

gc.freeze()  # every `train()` collects garbage, which over all that these imports made takes most of a small run

SETTINGS = {
    "accumulation": {},
    "fewer steps a generation": {"steps_per_generation": 2},
    "more steps a generation": {"steps_per_generation": 8, "max_steps": 2},
    "neither divides": {"gradient_accumulation_steps": 4, "steps_per_generation": 6, "max_steps": 3},
    "two iterations": {"num_iterations": 2, "max_steps": 2},
    "lora": {"lora": True},
    "checkpointing": {"gradient_checkpointing": True},
}


class Masked(KondoGRPOTrainer):
    """What the gradient must equal: every row runs, those the gate skips with an advantage of 0."""

    def _pack(self, buffer):
        return [
            {name: value for name, value in rows.items() if name != "gate_keep"}
            | {"advantages": rows["advantages"] * rows["gate_keep"]}
            for rows in buffer
        ]


class Gradients(TrainerCallback):
    """The gradient of every optimizer step, as one vector, before it is used."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        self.steps.append(
            torch.cat(
                [
                    (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).flatten()
                    for parameter in model.parameters()
                    if parameter.requires_grad
                ]
            ).clone()
        )


def trainer(
    folder,
    cls=KondoGRPOTrainer,
    config=KondoGRPOConfig,
    lora=False,
    model=None,
    arguments=None,
    train_rows=64,
    **changes,
):
    """A trainer of `cls` on the copy task, and the gradients it will have."""
    if lora:
        from peft import LoraConfig

        arguments = {
            "peft_config": LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "down_proj"])
        } | (arguments or {})
    options = trl_task.options(output_dir=str(folder), optim="sgd", learning_rate=0.5, max_grad_norm=0.0) | changes
    gradients = Gradients()
    made = cls(
        model=model or trl_task.model(),
        reward_funcs=(arguments or {}).pop("reward_funcs", trl_task.copied),
        args=config(**options),
        train_dataset=trl_task.prompts(train_rows, 2, 5),
        processing_class=trl_task.tokenizer(),
        callbacks=[gradients],
        **(arguments or {}),
    )
    return made, gradients


def trained(folder, **options):
    """A trainer after `train()`, and the gradients it had; at once, since TRL seeds when it is made."""
    made, gradients = trainer(folder, **options)
    made.train()
    return made, gradients.steps


def relative_error(given, expected):
    return ((given - expected).norm() / expected.norm()).item()
