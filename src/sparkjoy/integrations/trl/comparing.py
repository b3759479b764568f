"""TRL's GRPOTrainer, comparing: now and then TRL's own gradient of a step beside the gated one, which it leaves alone.

After the last backward pass of an optimizer step its micro-batches run again as they were before packing, every
completion at weight 1, through the same loss; what that adds to `.grad` is read and taken away again.
"""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from sparkjoy.gradients import Comparisons, Gradients, inner_products, same_random_state, sketches
from sparkjoy.integrations.trl.deciding import DecidingMixin
from sparkjoy.integrations.trl.rows import Rows

STATE = "gate_comparisons.pt"
OLD = "gate_old_per_token_logps"  # the column with those of skipped rows too
FIGURES = ("cosine", "relative_error", "norm_ratio")
STEPS_IN_HOOK = "gate_compare_every would run it on TRL's own gradient too; leave one of the two out."


class ComparingMixin(DecidingMixin):
    """What compares in `KondoGRPOMixin`, which see."""

    _buffered_inputs: list[Rows]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        every = None if self._gate is None else self.args.gate_compare_every
        self._gate_comparisons = None if every is None else Comparisons(every, instead="gate_noise=0.3")
        self._gate_compares = False  # whether the dense passes are running
        self._gate_unpacked: list[Rows] = []  # the micro-batches of the generation batch, as TRL made them
        self._gate_step_rows: list[Rows] = []  # those of the optimizer step
        self._gate_gradients: Gradients | None = None

    def _refuse_unproven_comparisons(self) -> None:
        several = self.accelerator.num_processes > 1 or self.is_deepspeed_enabled or self.is_fsdp_enabled
        if self._gate_comparisons is not None and (several or self.accelerator.mixed_precision == "fp16"):
            what = "several processes, FSDP or DeepSpeed" if several else "float16, whose gradients are scaled"
            raise ValueError(
                f"gate_compare_every={self.args.gate_compare_every} is not proven with {what}. Leave it out, or "
                "compare on one process in float32 or bfloat16; the gate itself goes with it, and so does training "
                "without the gate."
            )

    def _due_within(self, steps: int) -> bool:
        """Whether one of the next optimizer steps is to be compared: by their number, which a resumed run keeps."""
        if self._gate_comparisons is None:
            return False
        first, every = self.state.global_step, self._gate_comparisons.every
        return bool(first // every < (first + steps) // every)

    def _keep_old_log_probs(self, output: Rows, skipped: Tensor) -> None:
        """Add a column of old log-probs that has those of skipped rows (B,) too, if a comparison will need them."""
        size, micro_steps = self.args.gradient_accumulation_steps, self.args.steps_per_generation * self.num_iterations
        if not self._due_within((micro_steps + 2 * size - 2) // size):  # the steps that they can have a part in
            return
        output[OLD] = output["old_per_token_logps"] + self._screen(output, skipped.nonzero().flatten())

    def _prepare_inputs(self, generation_batch: Any) -> Rows:
        if self._gate_compares:
            return generation_batch  # type: ignore[no-any-return]  # a micro-batch
        trains = self.model.training  # before a reward function may have the policy evaluate
        inputs: Rows = super()._prepare_inputs(generation_batch)
        if self._gate_comparisons is not None and trains:
            if "gate_idle" not in inputs:  # not packed yet, or never to be
                self._gate_unpacked = self._buffered_inputs
            self._gate_step_rows.append(self._gate_unpacked[self._step % self.args.steps_per_generation])
        return inputs

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        due = self._due_within(1)
        if due and self._gate_gradients is None:
            self._gate_gradients = Gradients(STEPS_IN_HOOK, model.parameters())
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self._gate_comparisons is not None and self.accelerator.sync_gradients:
            window = self._gate_step_rows[-self.current_gradient_accumulation_steps :]  # a broken-off step leaves more
            gradients, self._gate_step_rows, self._gate_gradients = self._gate_gradients, [], None
            if due and gradients is not None:
                self._compare(gradients, self._gate_comparisons, model, window, num_items_in_batch)
        return loss

    def _compare(
        self, gradients: Gradients, comparisons: Comparisons, model: nn.Module, window: list[Rows], num_items: Any
    ) -> None:
        """Run the micro-batches of an optimizer step once more, and log how near the gated gradient came to theirs.

        The step has been finished: what these passes count or log of one goes into figures that are thrown away.
        """
        start, metrics = time.perf_counter(), self._metrics["train"]
        self._metrics["train"], self._gate_compares = defaultdict(list), True
        gated = gradients.snapshot()
        try:  # the trainer owns its process: no thread draws meanwhile what is drawn again afterwards
            with same_random_state(self.accelerator.device), gradients.set_aside():
                for micro_batch in window:
                    Trainer.training_step(self, model, as_of_trl(micro_batch), num_items)  # it knows what to divide by
                both = inner_products(gradients.pairs_with(gated)), sketches(gradients.pairs_with(gated))
        finally:
            self._metrics["train"], self._gate_compares = metrics, False
        rows = sum(len(micro_batch["completion_ids"]) for micro_batch in window)
        found = comparisons.compared(*both, rows, rows, time.perf_counter() - start)
        for name in FIGURES:
            if getattr(found, name) is not None:
                metrics[f"gate/{name}"].append(getattr(found, name))

    # Checkpoints

    def _save_gate(self, folder: Path) -> None:
        super()._save_gate(folder)
        if self._gate_comparisons is not None:
            torch.save(self._gate_comparisons.state_dict(), folder / STATE)

    def _load_gate(self, folder: Path) -> None:
        super()._load_gate(folder)
        if self._gate_comparisons is not None and (folder / STATE).exists():
            self._gate_comparisons.load_state_dict(torch.load(folder / STATE, weights_only=True))


def as_of_trl(rows: Rows) -> Rows:
    """A micro-batch without the gate's columns: all rows at weight 1, with old log-probs of all."""
    own = {name: value for name, value in rows.items() if not name.startswith("gate_")}
    return own | ({"old_per_token_logps": rows[OLD]} if OLD in rows else {})
