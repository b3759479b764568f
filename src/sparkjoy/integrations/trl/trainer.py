"""TRL's GRPOTrainer with the gate: decide where the whole generation batch is known, pack, and let TRL do the loss.

_generate_single_turn             TRL's, watched for the log-probs of what it samples; prompts may be read once
_generate_and_score_completions   TRL's, then one decision over all processes (`deciding.py`): a column `gate_keep`
_prepare_inputs                   TRL's, then: the kept rows of an optimizer step in micro-batches, few or small
_compute_loss                     TRL's on a packed micro-batch; nothing on one left without rows
_get_per_token_logps_and_entropies   TRL's, or those of a prefix tree (`sharing.py`); the weights go on here
training_step                     TRL's, then at times a comparison with TRL's own gradient (`comparing.py`)
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence, Sized
from contextlib import ExitStack
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from trl import GRPOTrainer

from sparkjoy.gates.decision import rule_of
from sparkjoy.integrations.gates import refuse
from sparkjoy.integrations.sampling import recording
from sparkjoy.integrations.transformers import longest_with_fixed_rotations
from sparkjoy.integrations.trl.packing import PackingMixin
from sparkjoy.integrations.trl.rows import Rows, loss_mask, whole
from sparkjoy.integrations.trl.sharing import reading_prompts_once
from sparkjoy.losses import delightful_weight
from sparkjoy.noise import noise_sums
from sparkjoy.scores import per_row, reads_log_probs
from sparkjoy.signs import Rule

TEXT_ONLY = (
    "the gate and share_tokens pack text only, and these prompts come with images. Train without the gate and "
    "share_tokens, or leave the images out."
)


class KondoGRPOMixin(PackingMixin):
    """Gives a GRPOTrainer the gate: `class Mine(KondoGRPOMixin, YourTrainer)`, with a `KondoGRPOConfig` as `args`.

    With any other config, or one without a gate, every method is the trainer's own.

    A trainer with a `_compute_loss` of its own says what that divides a micro-batch's loss by, as
    `gate_normalizer = "constant"`, "rows" (of the micro-batch) or "tokens" (of it); TRL's own losses are known.

    Raises:
        ValueError: a set-up that the gate does not go with.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._gate_running: tuple[Rows, Rows] | None = None  # the micro-batch in TRL's loss, and what that was given
        self._gate_micro_steps = 0  # run since the last optimizer step
        self._packs = self._gate is not None or self._shared is not None
        if self._packs:
            self._refuse_unproven_setups()

    def _refuse_unproven_setups(self) -> None:
        version_1 = self.is_fsdp_enabled and not self.accelerator.is_fsdp2
        empties = self._gate is not None and self.args.gate_empty_step != "momentum"
        liger = getattr(self, "use_liger_kernel", False)  # of TRL before 1.15; later ones have no such loss
        reasons = {
            "the gate is not proven with a parallelism_config, which splits a completion or a layer over processes. "
            "Train with DDP, FSDP2 or DeepSpeed, or without the gate.": self.args.parallelism_config is not None,
            "the gate is not proven with version 1 of FSDP. Set version=2 in fsdp_config (fsdp_version: 2 in "
            "accelerate's), or train without the gate.": version_1,
            "DeepSpeed steps its optimizer itself, so a step without any kept completion cannot leave the weights. Set "
            "gate_empty_step='momentum', or train without the gate.": self.is_deepspeed_enabled and empties,
            "use_liger_kernel=True computes the loss apart from log-probs, where the gate cannot weight it. Set "
            "use_liger_kernel=False (TRL 1.15 and later take Liger's layers with the gate), or train without the "
            "gate.": liger,
            "the router's auxiliary loss counts every token of every completion, which neither the gate nor "
            "share_tokens runs. Set router_aux_loss_coef=0, or train without the gate and share_tokens.": (
                self.aux_loss_enabled
            ),
        }
        refuse(reasons)
        self._refuse_unproven_comparisons()
        self._refuse_images()
        loss = self._overriding("_compute_loss", type(self).__mro__)
        under = type(self).__mro__[type(self).__mro__.index(KondoGRPOMixin) :]
        log_probs = self._overriding("_get_per_token_logps_and_entropies", under)
        reasons = {
            f"{loss} has a _compute_loss of its own; say what it divides a micro-batch's loss by with a class "
            "attribute gate_normalizer: 'constant', 'rows' or 'tokens'.": loss and self.gate_normalizer is None,
            f"{log_probs} has a _get_per_token_logps_and_entropies of its own, which share_tokens=True would go "
            "around. Leave one of them out.": log_probs and self._shared is not None,
        }
        refuse(reasons)

    def _overriding(self, method: str, classes: Sequence[type]) -> str | None:
        """A class that has a method of TRL's and ours of its own, if one of these does."""
        theirs = [cls for cls in classes if cls is not GRPOTrainer and not cls.__module__.startswith(__package__)]
        return next((cls.__name__ for cls in theirs if method in vars(cls)), None)

    def _refuse_images(self) -> None:
        """Look at the first training example; what is streamed, or has images only later, is refused when it comes."""
        dataset: Any = self.train_dataset
        example = dataset[0] if isinstance(dataset, Sized) and len(dataset) else {}  # type: ignore[index]  # has both
        prompt = example.get("prompt")
        turns = prompt if isinstance(prompt, list) else []
        parts = [part for turn in turns if isinstance(turn.get("content"), list) for part in turn["content"]]
        if example.get("image") is not None or example.get("images") or any("image" in part for part in parts):
            raise ValueError(TEXT_ONLY)

    # Generating

    @property
    def _reads_generation(self) -> bool:
        """Whether log-probs are to be recorded while transformers generates: nothing else will leave them for free."""
        generates = not (self.use_vllm or self.use_transformers_continuous_batching or self.tools)
        if self._gate is None or not generates or not self.model.training:
            return False
        by_sign = rule_of(self._gate) == Rule(floor=0.0)
        reads = self.args.gate_score == "delight" and reads_log_probs(self._gate_score)
        return reads and self.args.gate_log_probs == "auto" and not by_sign

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> tuple[list[list[int]], list[list[float]] | None]:
        model, recorder = self.accelerator.unwrap_model(self.model_wrapped), None
        with ExitStack() as stack:
            if self._reads_generation:
                recorder = stack.enter_context(recording(model, self.temperature))
            if self._shared is not None:
                stack.enter_context(reading_prompts_once(model, recorder, self.accelerator.autocast))
            completions, log_probs = super()._generate_single_turn(*args, **kwargs)
        recorded = recorder.log_probs(completions) if recorder is not None and log_probs is None else None
        self._gate_recorded = recorded is not None
        return completions, recorded or log_probs

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        self._gate_rewards = super()._calculate_rewards(*args, **kwargs)
        return self._gate_rewards

    def _generate_and_score_completions(self, inputs: list[Rows]) -> Rows:
        packs = self._packs and self.model.training  # before a reward function may have the policy evaluate
        output: Rows = super()._generate_and_score_completions(inputs)
        if not packs:
            return output
        if output.get("num_images") is not None or output.get("pixel_values") is not None:
            raise ValueError(TEXT_ONLY)
        self._refuse_long_rows(whole(output)[0].shape[1])
        self._compare_sharing(output)
        keep = torch.ones(len(output["advantages"]), dtype=torch.bool, device=output["advantages"].device)
        if self._gate is not None:
            postponed = output.pop("old_per_token_logps", None) if self._gate_postpones else None
            keep = self._decide(self._gate, output)
            self._watch(inputs, output, keep)
            if postponed is not None:
                output["old_per_token_logps"] = self._screen(output, keep.nonzero().flatten())
                self._keep_old_log_probs(output, ~keep)
        whole_batch = bool(keep.all()) and bool((output.get("gate_weight", keep) == 1).all())
        if not self._shares and self._everywhere(whole_batch):
            return {name: value for name, value in output.items() if not name.startswith("gate_")}  # TRL's own step
        return {**output, "gate_keep": keep}

    @property
    def _gate_postpones(self) -> bool:
        """Whether TRL's pass for old log-probs waits until it is decided whose are needed.

        Not where TRL reads those of all rows, nor where it computes the reference's in the same way.
        """
        corrects = self.use_vllm and self.vllm_importance_sampling_correction
        return self._gate is not None and not corrects and self.beta == 0

    def _refuse_long_rows(self, width: int) -> None:
        longest = longest_with_fixed_rotations(self.model.config.get_text_config())
        if width > longest:
            raise ValueError(
                f"rows of {width} tokens: beyond {longest} this model's rotations depend on the longest row of a "
                "micro-batch, and the gate and share_tokens make other micro-batches. Keep prompts and completions "
                "together within that, or train without."
            )

    # The loss

    def _compute_loss(self, model: nn.Module, inputs: Rows) -> Tensor:
        if not (self._packs or self._gate_dg) or not torch.is_grad_enabled():
            return super()._compute_loss(model, inputs)  # type: ignore[no-any-return]  # TRL is untyped
        sync = self.accelerator.sync_gradients
        if inputs.get("gate_idle", False) and not self._owes_a_pass(sync):
            loss = torch.zeros((), device=inputs["advantages"].device, requires_grad=True)
        else:
            given = {**inputs, "advantages": self._scaled(inputs)}
            self._gate_running = inputs, given
            try:
                loss = super()._compute_loss(model, given)
            finally:
                self._gate_running = None
            self._gate_micro_steps += 1
        if sync:  # the end of an optimizer step
            self._metrics["train"]["gate/micro_steps"].append(float(self._gate_micro_steps))
            self._gate_micro_steps = 0
            self._learn_noise()
            self._log_tokens()
        return loss

    def _scaled(self, inputs: Rows) -> Tensor:
        """Advantages of a packed micro-batch, of each row times its scale, unless that goes on its gradients."""
        advantages: Tensor = inputs["advantages"]
        if "gate_scale" not in inputs or self._gate_scales_gradients:
            return advantages
        scale: Tensor = inputs["gate_scale"].to(advantages)
        return advantages * scale.reshape(-1, *[1] * (advantages.dim() - 1))

    @property
    def _gate_scales_gradients(self) -> bool:
        """Whether a row's scale goes on the gradients of its log-probs and entropies instead of on its advantage.

        Terms beside the policy's (KL, entropy) are scaled too then. TRL's loss is logged without the scale.
        """
        return bool(self.beta != 0 or self.args.entropy_coef != 0)

    def _owes_a_pass(self, sync: bool) -> bool:
        """Whether a micro-step must run although it has no rows; `sync`: it is the last of an optimizer step.

        DeepSpeed wants a gradient of every parameter in every micro-step. Under several processes, earlier ones of the
        step have left gradients that only a pass outside `no_sync` averages. Without earlier ones, float16's scaler
        wants a gradient, and so does whoever wants Adam's momentum to go on.
        """
        if self.is_deepspeed_enabled:
            return True
        if not sync:
            return False
        if self._gate_micro_steps:
            return bool(self.accelerator.num_processes > 1)
        return self.args.gate_empty_step == "momentum" or bool(self.accelerator.mixed_precision == "fp16")

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        if self._gate_postpones and self.model.training and _asked_by_trl():
            ids, logits_to_keep = args[1], args[3]
            return torch.zeros(len(ids), logits_to_keep, device=ids.device), None, None
        log_probs, entropies, aux_loss = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        inputs, given = self._gate_running or ({}, {})
        if not inputs or not log_probs.requires_grad or log_probs.shape != inputs["completion_ids"].shape:
            return log_probs, entropies, aux_loss
        # TRL's loss reads what it was given after this, so what depends on the log-probs can be put into it here.
        if self._gate_expected is not None and "gate_size" in given:  # not in a later step, nor twice in this one
            del given["gate_size"]
            self._gate_sums += self._measured(inputs, log_probs.detach())
        if self._gate_dg is not None:
            own, temperature = inputs["advantages"], self.args.gate_dg_temperature
            weight = delightful_weight(log_probs, own, loss_mask(inputs), temperature, self._gate_dg)
            given["advantages"] = per_row(self._scaled(inputs), log_probs) * weight
        if "gate_scale" in inputs and self._gate_scales_gradients:
            log_probs = scale_gradient(log_probs, inputs["gate_scale"])
            entropies = scale_gradient(entropies, inputs["gate_entropy_scale"])
        return log_probs, entropies, aux_loss

    def _measured(self, inputs: Rows, log_probs: Tensor) -> Tensor:
        """(4,) the `noise_sums` of a micro-batch's rows, by the log-probs it is differentiated with."""
        exact = self._size_of(inputs, log_probs)
        rows = inputs["gate_weight"] > 0  # a dummy row has none
        return noise_sums(*(value[rows].cpu() for value in (exact, inputs["gate_size"], inputs["gate_weight"])))


def _asked_by_trl() -> bool:
    """Whether the caller of the method that asks is TRL's own, which wants old log-probs, and not a user's class."""
    method = GRPOTrainer._get_per_token_logps_and_entropies.__name__
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name == method:  # classes that call their parent's
        frame = frame.f_back
    return frame is not None and frame.f_code is inspect.unwrap(GRPOTrainer._generate_and_score_completions).__code__


def scale_gradient(values: Tensor, scale: Tensor) -> Tensor:
    """The same values (B, T), whose gradient is multiplied by that of their row, (B,)."""
    fixed = values.detach()
    return fixed + scale.to(values).unsqueeze(1) * (values - fixed)


class KondoGRPOTrainer(KondoGRPOMixin):
    """TRL's GRPOTrainer with the gate of its `KondoGRPOConfig`: takes what `GRPOTrainer` takes.

    The gradient of a step is that of the same trainer with the skipped completions' advantages set to 0 and the others'
    multiplied by their weights: by 1, or under `gate_noise` such that it is TRL's own on average.

    Args:
        gate: one of your own, instead of the config's: `gate(score, cost) -> Decision` about the completions of a
            generation batch, over all processes; see `sparkjoy.gates`.
        score: what a gate that is not weighted decides on, `(advantages, log_probs) -> (n,)` or (n, T); None: delight.

    Raises:
        ValueError: a gate here and in the config, or a set-up that it does not go with.
    """
