"""TRL's GRPOTrainer with the gate: decide where the whole generation batch is known, pack, and let TRL do the loss.

_generate_single_turn             TRL's, watched for the log-probs of what it samples
_generate_and_score_completions   TRL's, then: delight, one decision over all processes, a column `gate_keep`
_prepare_inputs                   TRL's, then: the kept rows of an optimizer step packed into few micro-batches
_compute_loss                     TRL's on a packed micro-batch; nothing on one left without rows
"""

from __future__ import annotations

import math
import time
import warnings
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from trl import GRPOTrainer

from sparkjoy.gates import KondoGate
from sparkjoy.integrations.trl.advantages import of_the_gate
from sparkjoy.integrations.trl.config import KondoGRPOConfig
from sparkjoy.integrations.trl.deciding import Scored, delight_score, in_doubt, other_score, worth
from sparkjoy.integrations.trl.packing import LOSS_NORMALIZERS, Normalizer, Rows, length, loss_mask, pack
from sparkjoy.integrations.trl.recording import recording
from sparkjoy.losses import delightful_weight
from sparkjoy.scores import per_row

TEXT_ONLY = (
    "the gate packs text only, and these prompts come with images. Train without the gate (gate_rate=None), or leave "
    "the images out."
)


class KondoGRPOMixin(GRPOTrainer):
    """Gives a GRPOTrainer the gate: `class Mine(KondoGRPOMixin, YourTrainer)`, with a `KondoGRPOConfig` as `args`.

    With any other config, or one without a gate, every method is the trainer's own.

    A trainer with a `_compute_loss` of its own says what that divides a micro-batch's loss by, as
    `gate_normalizer = "constant"`, "rows" (of the micro-batch) or "tokens" (of it); TRL's own losses are known.

    Raises:
        ValueError: a set-up that the gate does not go with.
    """

    args: KondoGRPOConfig
    _buffered_inputs: list[Rows]
    gate_normalizer: Normalizer | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.args if isinstance(self.args, KondoGRPOConfig) else None
        self._gate = config.gate() if config is not None and config.gated else None
        self._gate_dg = None if config is None else config.gate_dg
        self._gate_rewards: Tensor | None = None  # (N, F), of all processes, those of the last completions scored
        self._gate_recorded = False  # whether the sampler's log-probs are those read off its passes
        self._gate_warned = False  # that it ranks by the loss's advantages where it was to rank by centred rewards
        self._gate_reweighs: tuple[Rows, Tensor] | None = None  # a micro-batch that DG is to weight, its own advantages
        self._gate_postpones = False  # whether the old log-probs wait until it is decided whose are needed
        self._gate_micro_steps = 0  # run since the last optimizer step
        if self._gate is not None:
            self._refuse_unproven_setups()

    def _refuse_unproven_setups(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or self.args.parallelism_config is not None:
            raise ValueError(
                "the gate is not proven with DeepSpeed, FSDP or a parallelism_config, where every process must "
                "run the same passes. Train with DDP (accelerate launch --multi_gpu, or torchrun), or without the gate "
                "(gate_rate=None)."
            )
        if self.aux_loss_enabled:
            raise ValueError(
                "the router's auxiliary loss needs every completion, and the gate skips most. Set "
                "router_aux_loss_coef=0, or train without the gate (gate_rate=None)."
            )
        self._refuse_images()
        known = (KondoGRPOMixin, GRPOTrainer)
        own = [cls.__name__ for cls in type(self).__mro__ if "_compute_loss" in vars(cls) and cls not in known]
        if own and self.gate_normalizer is None:
            raise ValueError(
                f"{own[0]} has a _compute_loss of its own; say what it divides a micro-batch's loss by with a class "
                "attribute gate_normalizer: 'constant', 'rows' or 'tokens'."
            )

    def _refuse_images(self) -> None:
        """Look at the first training example; what has images only later is refused when it comes."""
        if self.train_dataset is None or not hasattr(self.train_dataset, "__getitem__") or len(self.train_dataset) == 0:
            return
        example = self.train_dataset[0]
        prompt = example.get("prompt")
        turns = prompt if isinstance(prompt, list) else []
        parts = [part for turn in turns if isinstance(turn.get("content"), list) for part in turn["content"]]
        if example.get("image") is not None or example.get("images") or any("image" in part for part in parts):
            raise ValueError(TEXT_ONLY)

    # Deciding

    @property
    def _reads_generation(self) -> bool:
        """Whether log-probs are to be recorded while transformers generates: nothing else will leave them for free."""
        generates = not (self.use_vllm or self.use_transformers_continuous_batching or self.tools)
        if self._gate is None or not generates or not self.model.training:
            return False
        by_sign = self.args.gate_rate is None and self.args.gate_price == 0 and self.args.gate_negative_share == 0
        return self.args.gate_score == "delight" and self.args.gate_log_probs == "auto" and not by_sign

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> tuple[list[list[int]], list[list[float]] | None]:
        if not self._reads_generation:
            return super()._generate_single_turn(*args, **kwargs)  # type: ignore[no-any-return]  # TRL is untyped
        with recording(self.accelerator.unwrap_model(self.model_wrapped), self.temperature) as recorder:
            completions, log_probs = super()._generate_single_turn(*args, **kwargs)
        if log_probs is None:
            log_probs = recorder.log_probs(completions)
            self._gate_recorded = log_probs is not None
        return completions, log_probs

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        self._gate_rewards = super()._calculate_rewards(*args, **kwargs)
        return self._gate_rewards

    def _generate_and_score_completions(self, inputs: list[Rows]) -> Rows:
        if self._gate is None or not self.model.training:
            return super()._generate_and_score_completions(inputs)  # type: ignore[no-any-return]  # TRL is untyped
        postpones = not (self.use_vllm and self.vllm_importance_sampling_correction)  # TRL reads those of all rows then
        self._gate_postpones, self._gate_recorded = postpones, False
        try:
            output: Rows = super()._generate_and_score_completions(inputs)
        finally:
            self._gate_postpones = False
        if output.get("num_images") is not None or output.get("pixel_values") is not None:
            raise ValueError(TEXT_ONLY)
        old = output.pop("old_per_token_logps", None) if postpones else None
        keep = self._decide(self._gate, output)
        if old is not None:
            rows = keep.nonzero().flatten()
            output["old_per_token_logps"] = old.index_copy(0, rows, self._screen(output, rows))
        return {**output, "gate_keep": keep}

    def _decide(self, gate: KondoGate, output: Rows) -> Tensor:
        """(B,) bool: which rows of this process the gate keeps, out of those of all processes."""
        start = time.perf_counter()
        mask = self._teaching_mask(output)
        advantages = self._gate_advantages(output)
        cost = output["prompt_mask"].sum(dim=1) + output["completion_mask"].sum(dim=1)
        local = torch.stack(
            [worth(advantages, output["advantages"], mask), mask.sum(dim=1).to(advantages), cost.to(advantages)], dim=1
        )
        of_all, tokens, costs = self.accelerator.gather(local).cpu().unbind(dim=1)
        first = self.accelerator.process_index * len(mask)
        mine = slice(first, first + len(mask))
        if self.args.gate_score == "delight":
            scored, screened = self._delights(gate, output, advantages, of_all, mine)
        else:
            # The seed is of the optimizer step and the micro-step in it, so that a resumed run draws the same.
            seed = (self.args.seed, self.state.global_step, self._step % self.args.gradient_accumulation_steps)
            other = other_score(self.args.gate_score, of_all, seed)
            scored, screened = Scored(of_all, torch.zeros(len(of_all), dtype=torch.bool), other, other), 0
        keep = gate(scored.score).keep
        self._log_decision(scored, keep, tokens, costs, screened, time.perf_counter() - start)
        return keep[mine].to(mask.device)

    def _delights(
        self, gate: KondoGate, output: Rows, advantages: Tensor, of_all: Tensor, mine: slice
    ) -> tuple[Scored, int]:
        """The delights that the decision needs, of all processes, and how many rows had to be screened for them."""
        mask = self._teaching_mask(output)
        log_probs = self._log_probs_at_hand(output)
        if self.accelerator.num_processes > 1:  # all screen or none: they decide alike
            at_hand = torch.tensor([log_probs is not None], device=mask.device)
            log_probs = log_probs if bool(self.accelerator.gather(at_hand).all()) else None
        known = in_doubt(gate, of_all) if log_probs is None and advantages.dim() == 1 else of_all != 0
        rows = known[mine].nonzero().flatten().to(mask.device)
        of_rows = self._screen(output, rows) if log_probs is None else log_probs[rows]
        local = torch.zeros(len(mask), device=mask.device)
        local[rows] = delight_score(advantages[rows], of_rows, mask[rows]).to(local)
        screened = int(known.sum()) if log_probs is None else 0
        return Scored(of_all, known, self.accelerator.gather(local).cpu()), screened

    def _teaching_mask(self, output: Rows) -> Tensor:
        """(B, T), 1 for tokens that the loss has a term of: not those whose ratio to the sampler's TRL has set to 0."""
        mask, ratio = loss_mask(output), output.get("importance_sampling_ratio")
        return mask if ratio is None or self.loss_type == "vespo" else mask * (ratio != 0)

    def _gate_advantages(self, output: Rows) -> Tensor:
        """(B,) or (B, T): the advantages that the gate ranks by, of this process."""
        own: Tensor = output["advantages"]
        if own.dim() == 1:
            of_all = self.accelerator.gather(own)
            advantages, centred = of_the_gate(
                of_all,
                self._gate_rewards,
                self.reward_weights,
                self.num_generations,
                self.scale_rewards,
                self.multi_objective_aggregation,
            )
            if centred and self.args.gate_advantages == "trl":
                advantages = of_all.masked_fill(advantages == 0, 0)
            first = self.accelerator.process_index * len(own)
            advantages = advantages[first : first + len(own)]
        else:
            advantages, centred = own, False
        if self.args.gate_advantages == "centred":
            self._metrics["train"]["gate/centred"].append(float(centred))
            if not centred and not self._gate_warned:
                self._gate_warned = True
                warnings.warn(
                    "gate_advantages='centred' ranks by reward less its group's mean, and the advantages of this batch "
                    "are not those (GDPO's, of a group answered again or replayed, or shaped by the trainer): the gate "
                    "ranks by the loss's own, whenever that is so. gate_advantages='trl' always does, without a word.",
                    stacklevel=2,
                )
        return advantages

    def _log_probs_at_hand(self, output: Rows) -> Tensor | None:
        """(B, T) log-probs that are at hand: of the pass that corrects vLLM's if there was one, else the sampler's."""
        if output.get("old_per_token_logps") is not None:
            return output["old_per_token_logps"]  # type: ignore[no-any-return]  # TRL's dicts are untyped
        sampled: Tensor | None = output.get("sampling_per_token_logps")
        if sampled is None or self.args.gate_log_probs == "exact" or not (self._gate_recorded or self._samples_whole):
            return None
        return sampled.nan_to_num(nan=0.0)  # vLLM has NaN where it could not tell: a token without surprise

    @property
    def _samples_whole(self) -> bool:
        """Whether nothing cuts or bends the distribution sampled from, whose log-probs would understate surprisal."""
        cut = self.top_p != 1 or self.top_k not in (0, -1, None) or self.min_p not in (0, None)
        return not cut and self.repetition_penalty == 1 and not self.args.generation_kwargs

    @torch.no_grad()
    def _screen(self, output: Rows, rows: Tensor) -> Tensor:
        """(n, T) log-probs of `rows`, exact and without a graph; in eval mode, so without dropout or other draws."""
        mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)[rows]
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)[rows]
        prompt = output["prompt_ids"].shape[1]
        log_probs = torch.zeros(len(rows), mask.shape[1] - prompt, device=ids.device)
        if len(rows) == 0:
            return log_probs
        self.model.eval()
        try:
            for part in mask.sum(dim=1).argsort().split(self.args.per_device_train_batch_size):
                present = mask[part].any(dim=0).nonzero().flatten()
                start = min(int(present[0]), prompt - 1) if self._trims_prompts else 0
                stop = max(int(present[-1]), prompt) + 1
                log_probs[part, : stop - prompt], _, _ = self._get_per_token_logps_and_entropies(
                    self.model, ids[part, start:stop], mask[part, start:stop], stop - prompt
                )
        finally:
            self.model.train()
        return log_probs

    def _log_decision(
        self, scored: Scored, keep: Tensor, tokens: Tensor, costs: Tensor, screened: int, seconds: float
    ) -> None:
        figures = scored.figures(keep) | {
            "backward_tokens": float(costs[keep].sum()),
            "kept_token_rate": float(tokens[keep].sum() / tokens.sum().clamp(min=1)),
            "screened_rate": screened / len(keep),
            "screen_seconds": seconds,
        }
        for name, value in figures.items():
            if not math.isnan(value):
                self._metrics["train"][f"gate/{name}"].append(value)

    # Packing

    @property
    def _trims_prompts(self) -> bool:
        """Whether the model's positions are relative, so that padding left of a prompt can be cut or added."""
        config = self.model.config.get_text_config()
        return getattr(config, "rope_parameters", None) is not None or getattr(config, "rope_theta", None) is not None

    def _prepare_inputs(self, generation_batch: Any) -> Rows:
        inputs: Rows = super()._prepare_inputs(generation_batch)
        if "gate_keep" not in inputs:
            return inputs  # evaluation, no gate, or packed before
        self._buffered_inputs = self._pack(self._buffered_inputs)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]  # type: ignore[no-any-return]

    def _pack(self, buffer: list[Rows]) -> list[Rows]:
        """The micro-batches of a generation batch with kept rows packed, never across two optimizer steps."""
        window = math.gcd(self.args.gradient_accumulation_steps, self.args.steps_per_generation)
        packed: list[Rows] = []
        for first in range(0, len(buffer), window):
            packed += pack(
                buffer[first : first + window],
                self.gate_normalizer or LOSS_NORMALIZERS[self.loss_type],
                self._tokenizer.pad_token_id,
                trim_prompts=self._trims_prompts,
                share_out=self._share_out,
            )
        return packed

    def _share_out(self, rows: list[Rows]) -> tuple[list[Rows], int]:
        """This process's share of the kept rows of all, and how many rows every process is to run."""
        processes, device = self.accelerator.num_processes, self.accelerator.device
        if processes == 1:
            return rows, len(rows)
        if not self._trims_prompts:  # rows cannot move to a process that pads prompts to another length
            counts = self.accelerator.gather(torch.tensor([len(rows)], device=device))
            return rows, int(counts.max())
        on_cpu = [
            {name: value.cpu() if isinstance(value, Tensor) else value for name, value in row.items()} for row in rows
        ]
        everyone: list[Rows] = sorted(gather_object(on_cpu), key=length)
        share = everyone[self.accelerator.process_index :: processes]
        share = [
            {name: value.to(device) if isinstance(value, Tensor) else value for name, value in row.items()}
            for row in share
        ]
        return share, -(-len(everyone) // processes)

    # The loss

    def _compute_loss(self, model: nn.Module, inputs: Rows) -> Tensor:
        if not self.model.training:
            return super()._compute_loss(model, inputs)  # type: ignore[no-any-return]
        own = inputs["advantages"]
        if "gate_scale" not in inputs:
            return self._weighted_loss(model, dict(inputs), own)
        sync = self.accelerator.sync_gradients
        if inputs["gate_idle"] and not (sync and self._owes_a_pass()):
            loss = torch.zeros((), device=own.device, requires_grad=True)
        else:
            scaled = own * inputs["gate_scale"].to(own).reshape(-1, *[1] * (own.dim() - 1))
            loss = self._weighted_loss(model, inputs | {"advantages": scaled}, own)
            self._gate_micro_steps += 1
        if sync:
            self._metrics["train"]["gate/micro_steps"].append(float(self._gate_micro_steps))
            self._gate_micro_steps = 0
        return loss

    def _owes_a_pass(self) -> bool:
        """Whether the last micro-step of an optimizer step must run although it has no rows.

        Under several processes, earlier ones have left gradients that only a pass outside `no_sync` averages. Without
        earlier ones, float16's scaler wants a gradient, and so does whoever wants Adam's momentum to go on.
        """
        if self._gate_micro_steps:
            return bool(self.accelerator.num_processes > 1)
        return self.args.gate_empty_step == "momentum" or self.accelerator.mixed_precision == "fp16"

    def _weighted_loss(self, model: nn.Module, inputs: Rows, own_advantages: Tensor) -> Tensor:
        self._gate_reweighs = (inputs, own_advantages) if self._gate_dg else None
        return super()._compute_loss(model, inputs)  # type: ignore[no-any-return]

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        if self._gate_postpones:  # of all rows; those of the kept ones are computed when these are known
            ids, logits_to_keep = args[1], args[3]
            return torch.zeros(len(ids), logits_to_keep, device=ids.device), None, None
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if (
            self._gate_reweighs is not None and self._gate_dg is not None
        ):  # TRL's loss reads the advantages after this, so DG can weight them here
            inputs, advantages = self._gate_reweighs
            self._gate_reweighs = None
            weight = delightful_weight(
                result[0], advantages, loss_mask(inputs), self.args.gate_dg_temperature, self._gate_dg
            )
            inputs["advantages"] = per_row(inputs["advantages"], result[0]) * weight
        return result


class KondoGRPOTrainer(KondoGRPOMixin):
    """TRL's GRPOTrainer with the gate of its `KondoGRPOConfig`: takes what `GRPOTrainer` takes.

    The gradient of a step is that of the same trainer with the skipped completions' advantages set to 0.
    """
