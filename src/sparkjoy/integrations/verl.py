"""The gate in verl's FSDP and FSDP2 engines: an update costs what the kept rows cost.

Two options more in a verl run:

    actor_rollout_ref.actor.fsdp_config._target_=sparkjoy.integrations.verl.gated
    +actor_rollout_ref.actor.fsdp_config.gate_noise=0.3

Each worker of the actor imports this module to read them, and the import registers the engine. All ranks decide alike,
on the numbers of all; a rank with less to train on runs dummy rows of weight 0, so that all run as many micro-batches.
It needs verl 0.9 and no TRL beside it: `pip install sparkjoy[verl]`. See docs/other_trainers.md.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


def _version_of(package: str) -> tuple[int, ...] | None:
    try:
        return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return None


if (_version_of("trl") or (0,)) >= (1, 14):  # verl's patches import a module that is gone from there on
    raise ImportError(
        "verl 0.9 builds no model where TRL 1.14 or later is installed: give verl an environment of its own, or "
        "pip uninstall trl."
    )
if _version_of("verl") != (0, 9):
    raise ImportError("sparkjoy.integrations.verl rests on the engines of verl 0.9: pip install sparkjoy[verl]")

from tensordict import NonTensorData, TensorDict  # noqa: E402
from verl.utils import tensordict_utils as tu  # noqa: E402
from verl.utils.device import get_device_id, get_device_name, get_vendor  # noqa: E402
from verl.utils.seqlen_balancing import calculate_workload, get_seqlen_balanced_partitions  # noqa: E402
from verl.workers.config import ActorConfig, FSDPEngineConfig  # noqa: E402
from verl.workers.engine.base import EngineRegistry  # noqa: E402
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead  # noqa: E402
from verl.workers.utils.losses import ppo_loss  # noqa: E402
from verl.workers.utils.padding import no_padding_2_padding  # noqa: E402

from sparkjoy.gates import Gate  # noqa: E402
from sparkjoy.gates.decision import weighs  # noqa: E402
from sparkjoy.integrations.gates import gate_of, learn_noise, load_with_draws, refuse, state_with_draws  # noqa: E402
from sparkjoy.integrations.sizes import RowSize, score_of_rows  # noqa: E402
from sparkjoy.noise import expected_noise, noise_sums  # noqa: E402
from sparkjoy.scores import delight  # noqa: E402
from sparkjoy.selecting import select_by_score  # noqa: E402

logger = logging.getLogger(__name__)

BACKENDS = ["fsdp", "fsdp2"]
STATE = "gate_rank_{}.pt"
NOT_PROPORTIONAL = {
    "clip_cov": "chooses tokens by their covariance with the others of a micro-batch",
    "kl_cov": "chooses tokens by their covariance with the others of a micro-batch",
    "dro": "has a gradient where the advantage is 0",
    "geo_mean": "is a mean over the rows of each micro-batch",
}
"""verl's policy losses whose rows cannot be left out one by one, and why."""


@dataclass
class GatedFSDPEngineConfig(FSDPEngineConfig):
    """verl's `FSDPEngineConfig` with a gate; with none of the three it is exactly verl's.

    Args:
        gate_noise: noise that skipping may add to the gradient, as a multiple of the batch's own: start with 0.3. Rows
            are kept at random, in proportion to how far each would move the policy, and weighted, so that the expected
            gradient is verl's own, KL and entropy too. It finds its own rate. 0 skips only rows without a gradient,
            such as those of groups of equal rewards.
        gate_rate: fraction of the rows of a mini-batch, over all ranks, to train on: those of greatest delight.
        gate_price: keep only rows whose delight is above this; 0 keeps what did better than its group.

    Raises:
        ValueError: an option outside its range, or another engine in the place of this one.
    """

    gate_noise: float | None = None
    gate_rate: float | None = None
    gate_price: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.gate()
        chosen = {EngineRegistry.get_engine_cls("language_model", backend) for backend in BACKENDS}
        if chosen != {GatedFSDPEngine}:
            raise ValueError(
                f"verl would run {', '.join(sorted(cls.__name__ for cls in chosen))}, without the gate; unset "
                "VERL_ENGINE_DEVICE and VERL_ENGINE_VENDOR."
            )

    def gate(self) -> Gate | None:
        """The gate that these options describe; None where they keep every row."""
        generator = torch.Generator().manual_seed(self.seed)  # the same on every rank, which all draw as often
        return gate_of(self.gate_noise, self.gate_rate, self.gate_price, generator=generator)


def gated(**options: Any) -> GatedFSDPEngineConfig:
    """`GatedFSDPEngineConfig` of the options of verl's `fsdp_config`: what its `_target_` names.

    Raises:
        ValueError: options of another engine, such as Megatron's.
    """
    others = sorted(set(options) - {field.name for field in fields(GatedFSDPEngineConfig)})
    if others:
        raise ValueError(
            f"the gate acts in verl's FSDP and FSDP2 engines, which have no {', '.join(others)}. Of another engine, "
            "such as Megatron's, it can be no part: set actor_rollout_ref.actor.strategy=fsdp2 and give the options to "
            "actor_rollout_ref.actor.fsdp_config."
        )
    return GatedFSDPEngineConfig(**options)


@EngineRegistry.register("language_model", BACKENDS, device=get_device_name(), vendor=get_vendor())
class GatedFSDPEngine(FSDPEngineWithLMHead):
    """verl's engine, whose updates run over the rows that the gate keeps; without a gate it is exactly verl's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.engine_config
        self._gate = config.gate() if isinstance(config, GatedFSDPEngineConfig) else None
        if self._gate is not None and self.ulysses_sequence_parallel_size > 1:
            raise ValueError(
                f"ulysses_sequence_parallel_size={self.ulysses_sequence_parallel_size}: the gate takes whole rows, and "
                "Ulysses splits each over ranks. Set it to 1, or train without a gate."
            )

    def forward_backward_batch(
        self, data: TensorDict, loss_function: Callable[..., Any], forward_only: bool = False
    ) -> Any:
        """verl's, over the kept rows; metrics `gate/*` say what was kept."""
        gate = self._gate
        if gate is None or forward_only:
            return super().forward_backward_batch(data, loss_function, forward_only)
        start = time.perf_counter()
        config = self._config_of(loss_function, data)
        score = _score(data, config, data["old_log_probs"]) if weighs(gate) else _delight(data)
        rows, figures = self._decide(gate, data, score)
        kept = tu.index_select_tensor_dict(data, rows.pop("row"))
        kept.update({name: values.to(score.device) for name, values in rows.items()})
        figures["seconds"] = time.perf_counter() - start
        loss_tokens, sums = figures.pop("loss_tokens"), torch.zeros(4, dtype=torch.float64)  # `noise_sums` of this rank

        def loss(model_output: dict[str, Any], data: TensorDict, dp_group: Any = None) -> Any:
            """verl's, divided by the tokens of all rows, of what the model returned, with each row's weight on it."""
            nonlocal sums
            if weighs(gate):
                exact = _score(data, config, no_padding_2_padding(model_output["log_probs"].detach(), data))
                sums += noise_sums(exact, data["gate_size"], data["gate_weight"]).cpu()
            for name in sorted({"log_probs", "entropy"} & set(model_output)):
                model_output[name] = _weighted(model_output[name], data["gate_weight"])
            data["batch_num_tokens"] = NonTensorData(loss_tokens)
            return loss_function(model_output=model_output, data=data, dp_group=dp_group)

        output = super().forward_backward_batch(kept, loss)
        if weighs(gate):
            sums = sums.to(get_device_id())
            torch.distributed.all_reduce(sums, group=self.get_data_parallel_group())
            figures["noise"] = learn_noise(gate, figures["noise"], sums.tolist())
        output["metrics"] |= {f"gate/{name}": [value] for name, value in figures.items()}
        return output

    def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        """verl's, and the gate's state beside it."""
        super().save_checkpoint(local_path, *args, **kwargs)
        if self._gate is not None and local_path is not None and self.checkpoint_manager.should_save_extra:
            file = os.path.join(local_path, STATE.format(self.rank))
            torch.save(state_with_draws(self._gate), f"{file}.tmp")
            os.replace(f"{file}.tmp", file)

    def load_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        """verl's, and the gate's state with it."""
        super().load_checkpoint(local_path, *args, **kwargs)
        if self._gate is None or local_path is None or not self.checkpoint_manager.should_load_extra:
            return
        file = os.path.join(local_path, STATE.format(self.rank))
        if not os.path.exists(file):
            logger.warning("%s has no state of a gate: it starts anew.", local_path)
            return
        load_with_draws(self._gate, torch.load(file, weights_only=True))

    def _config_of(self, loss_function: Callable[..., Any], data: TensorDict) -> ActorConfig:
        """The actor's options, of which the gate goes with all but these."""
        named = getattr(loss_function, "func", loss_function)
        if named is not ppo_loss:
            raise ValueError(
                f"the loss is {getattr(named, '__name__', named)}; the gate goes with verl's ppo_loss alone. Train "
                "without a gate."
            )
        config = loss_function.keywords["config"]  # type: ignore[attr-defined]  # a partial of ppo_loss
        mode, correction = (config.policy_loss.get(name, None) for name in ("loss_mode", "rollout_correction"))
        normalizes = mode == "bypass_mode" and (correction or {}).get("rollout_is_batch_normalize", False)
        grouped = config.get("use_prefix_grouper", False) or tu.get_non_tensor_data(data, "force_group_size", 1) != 1
        by_longest = config.loss_agg_mode == "seq-mean-token-sum-norm" and config.loss_scale_factor is None
        reasons = {
            f"policy_loss.loss_mode={mode!r} {NOT_PROPORTIONAL.get(mode)}, so that skipping a row changes the others. "
            "Choose another, or train without a gate.": mode in NOT_PROPORTIONAL,
            "rollout_is_batch_normalize=True divides by the mean of each micro-batch, and the gate makes others: set "
            "it to False, or train without a gate.": normalizes,
            "the gate skips rows, and groups of rows are kept whole: set use_prefix_grouper=False.": grouped,
            "loss_agg_mode='seq-mean-token-sum-norm' divides by the longest row of each micro-batch, and the gate "
            "makes other micro-batches: set actor.loss_scale_factor, such as the longest response.": by_longest,
            "return_model_output=True asks for every row, and the gate skips most: train without one.": (
                tu.get_non_tensor_data(data, "return_model_output", False)
            ),
            f"use_kl_loss with kl_loss_coef={config.kl_loss_coef} and entropy_coeff={config.entropy_coeff}: these "
            "terms need the gradient of every row, and the gate skips most. Set both to 0 and take the KL off the "
            "reward, or train with gate_noise=0.3, which weights them.": (
                not weighs(self._gate) and (_beta(config) or config.entropy_coeff)
            ),
        }
        refuse(reasons)
        return config

    def _decide(self, gate: Gate, data: TensorDict, score: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Which rows of this rank to run, with the weight of their gradients and their size, and figures of all ranks.

        Raises:
            ValueError: on every rank alike, where a score of one is NaN or infinite.
        """
        group, rank = self.get_data_parallel_group(), self.get_data_parallel_rank()
        mine = (score.double().cpu(), data["input_ids"].offsets().diff().cpu(), data["loss_mask"].sum().item())
        of_all: list[Any] = [None] * self.get_data_parallel_size()
        torch.distributed.all_gather_object(of_all, mine, group)
        scores, tokens, loss_tokens = zip(*of_all, strict=True)  # by rank
        for number, of_rank in enumerate(scores):
            if not bool(of_rank.isfinite().all()):
                raise ValueError(
                    f"rank {number} has {int((~of_rank.isfinite()).sum())} of {len(of_rank)} rows with NaN or infinite "
                    "advantages or log-probs; expected finite numbers wherever response_mask is 1."
                )
        of_rows, costs = torch.cat(scores), torch.cat(tokens)
        picked, _, decision = select_by_score(gate, of_rows, costs)
        keeps, weights = (values.split([*map(len, scores)]) for values in (decision.keep, decision.weight))
        kept = [of_rank[keep] for of_rank, keep in zip(tokens, keeps, strict=True)]
        passes, per_pass = self._passes(data, kept, mine[1])
        rows = keeps[rank].nonzero().squeeze(1)
        fill = mine[1].argmin().expand(max(passes * per_pass - len(rows), 0))  # the shortest row
        figures = {
            "kept_rate": len(picked) / len(of_rows),
            "teaching_rate": float((of_rows != 0).double().mean()),
            "tokens": float(costs.sum()),
            "backward_tokens": float(costs[picked].sum()),
            "dummy_rows": float(len(fill)),
            "micro_batches": float(passes),
            "loss_tokens": sum(loss_tokens),
        }
        if weighs(gate):
            figures["noise"] = expected_noise(of_rows, decision.probability)
        blank = torch.zeros(len(fill))
        return {
            "row": torch.cat([rows, fill]),
            "gate_weight": torch.cat([weights[rank][rows], blank]).float(),
            "gate_size": torch.cat([score.cpu()[rows], blank]).float(),
        }, figures

    def _passes(self, data: TensorDict, kept: list[Tensor], mine: Tensor) -> tuple[int, int]:
        """How many micro-batches all ranks run, and how many rows each must have for it, a fixed or a least number.

        `kept` are the tokens of each rank's kept rows, `mine` those of all rows of this rank. Under dynamic batching at
        least as many as verl will find to hold the rows of each rank and its dummies.
        """
        if not tu.get_non_tensor_data(data, "use_dynamic_bsz", True):
            size = data["micro_batch_size_per_gpu"]
            return max(1, math.ceil(max(map(len, kept)) / size)), size
        group, limit = self.get_data_parallel_group(), data["max_token_len_per_gpu"]
        passes = max(1, *(math.ceil(int(tokens.sum()) / limit) for tokens in kept))
        while True:
            fits = _fits(kept[torch.distributed.get_rank(group)], passes, int(mine.min()), limit)
            everywhere = torch.tensor(fits, dtype=torch.int32, device=get_device_id())
            torch.distributed.all_reduce(everywhere, op=torch.distributed.ReduceOp.MIN, group=group)
            if everywhere.item() or passes >= max(map(len, kept)):  # a row too long alone is verl's to refuse
                return passes, 1
            passes += 1


def _beta(config: ActorConfig) -> float:
    return config.kl_loss_coef if config.use_kl_loss else 0.0


def _padded(data: TensorDict, *names: str) -> dict[str, Tensor]:
    """Those of the fields that there are, (B, T), zeros where a row has ended."""
    present: Any = data.select(*(name for name in ("response_mask", *names) if name in data)).to_padded_tensor()
    return dict(present.items())


def _delight(data: TensorDict) -> Tensor:
    """(B,) the delight of each row, NaN where one of its numbers is."""
    rows = _padded(data, "advantages", "old_log_probs", "rollout_is_weights")
    mask = rows["response_mask"].bool()
    if "rollout_is_weights" in rows:  # what it sets to 0 has no term in the loss
        mask = mask & (rows["rollout_is_weights"] != 0)
    return score_of_rows(delight, rows["advantages"], rows["old_log_probs"].clamp(max=0), mask)


def _score(data: TensorDict, config: ActorConfig, log_probs: Tensor) -> Tensor:
    """(B,) the size of each row's gradient in verl's loss by these log-probs, NaN where one of its numbers is."""
    rows = _padded(data, "advantages", "rollout_is_weights", "ref_log_prob")
    size = RowSize(config.loss_agg_mode == "seq-mean-token-mean", _beta(config), config.entropy_coeff)
    log_probs = log_probs.to_padded_tensor(0) if log_probs.is_nested else log_probs
    mask, ratio, reference = rows["response_mask"], rows.get("rollout_is_weights"), rows.get("ref_log_prob")
    return size(rows["advantages"], log_probs[:, : mask.shape[1]], mask, ratio, reference)


def _weighted(values: Any, weight: Tensor) -> Tensor:
    """The same nested values, of which the gradient of each row is multiplied by its weight."""
    flat = values.values()
    if flat.requires_grad:
        per_token = weight.to(flat).repeat_interleave(values.offsets().diff())
        flat.register_hook(lambda gradient: gradient * per_token)
    return torch.nested.nested_tensor_from_jagged(flat, values.offsets())


def _fits(tokens: Tensor, passes: int, dummy: int, limit: int) -> bool:
    """Whether verl splits rows of so many tokens, with dummy rows up to one a micro-batch, within the limit."""
    filled = torch.cat([tokens.long(), tokens.new_full((max(passes - len(tokens), 0),), dummy).long()])
    parts = get_seqlen_balanced_partitions(calculate_workload(filled).tolist(), passes, equal_size=False)
    return all(int(filled[part].sum()) <= limit for part in parts)
