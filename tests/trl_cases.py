"""Small TRL trainers, gated and masked, whose gradients can be compared."""

import gc

import torch
import trl_task
from transformers import TrainerCallback
from trl import GRPOTrainer

from sparkjoy.integrations.trl import KondoGRPOConfig, KondoGRPOMixin, KondoGRPOTrainer

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
    """What the gradient must equal: every row runs, those that the gate skips with advantage 0, the others weighted."""

    def _pack(self, buffer):
        return [
            {name: value for name, value in rows.items() if not name.startswith("gate_")}
            | {"advantages": rows["advantages"] * rows["gate_keep"] * rows.get("gate_weight", 1)}
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
    record=True,
    **changes,
):
    """A trainer of `cls` on the copy task, and the gradients it will have, unless not to be recorded."""
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
        callbacks=[gradients] if record else [],
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


class Repeating(GRPOTrainer):
    """The completions of the first generation again in every step, in the same order: what differs is what is drawn."""

    first = None

    def _generate_and_score_completions(self, inputs):
        if self.first is None:
            self.first = super()._generate_and_score_completions(inputs)
        torch.manual_seed(0)  # TRL shuffles next
        return dict(self.first)


class Dense(KondoGRPOMixin, Repeating):
    """`Repeating`, in which a delightful weight is part of the loss."""


class Drawing(KondoGRPOMixin, Repeating):
    """`Repeating`, gated by sizes of log-probs that are "exact", "stale" (off by noise), or "none" at all."""

    sizes = "exact"

    def _log_probs_at_hand(self, output):
        log_probs = super()._log_probs_at_hand(output)
        if self.sizes == "stale":
            off = torch.randn(log_probs.shape, generator=torch.Generator().manual_seed(0))
            return (log_probs + off).clamp(max=0)
        return log_probs if self.sizes == "exact" else None


def drawn(folder, count, sizes="exact", cls=Drawing, gate_noise=0.5, arguments=None, **changes):
    """Gradients of `count` draws over the same completions, (count, D), the dense gradient (D,), and the trainer."""
    _, (expected, *_) = trained(folder, cls=Dense, arguments=dict(arguments or {}), **changes)
    drawing = type(cls.__name__, (cls,), {"sizes": sizes})
    every = max(1, changes.get("steps_per_generation", 4) // 4)  # optimizer steps of a generation; the first counts
    changes = {"learning_rate": 0.0, "max_steps": every * count, "logging_steps": every * count} | changes
    made, steps = trained(folder, cls=drawing, gate_noise=gate_noise, arguments=dict(arguments or {}), **changes)
    return torch.stack(steps[::every]), expected, made


def far_from(draws, expected):
    """Standard errors that the mean of `draws` is from `expected`: along it, and in all directions together."""
    draws, expected = draws.double(), expected.double()
    along, off, root = draws @ expected / expected.norm(), draws.mean(dim=0) - expected, len(draws) ** 0.5
    errors = (along.mean() - expected.norm()).abs() / along.std(), off.norm() / draws.std(dim=0).norm()
    return tuple(error.item() * root for error in errors)
