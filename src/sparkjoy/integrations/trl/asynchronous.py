"""The gate in TRL's asynchronous GRPO trainer: completions that are not worth it never reach a process.

    from sparkjoy.integrations.trl.asynchronous import KondoAsyncGRPOConfig, KondoAsyncGRPOTrainer

    args = KondoAsyncGRPOConfig(gate_noise=0.3, ...)
    KondoAsyncGRPOTrainer(model, reward_funcs, args=args, train_dataset=...).train()

The main process reads the rollout queue for all, so it decides alone. A micro-batch is what it is in TRL with a fixed
count: `per_device_train_batch_size` completions of each process. The kept ones of them are trained on, divided by the
tokens of all. So a step takes as many rollouts as without a gate, and TRL's own gradient is its mean under a budget.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset

from sparkjoy.gates import Decision, Gate
from sparkjoy.gates.decision import load_state, state_of
from sparkjoy.integrations.gates import gate_of, load_gate, save_gate
from sparkjoy.integrations.sizes import RowSize
from sparkjoy.noise import expected_noise
from sparkjoy.scores import sequence_delight
from sparkjoy.selecting import select_by_score
from sparkjoy.signs import with_sign

try:
    from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer
    from trl.experimental.async_grpo import async_grpo_trainer as trls
    from trl.experimental.async_grpo.packing import TreeRow
except ImportError as error:
    raise ImportError("TRL's asynchronous GRPO trainer is needed as TRL 1.16 has it: pip install trl==1.16") from error


@dataclass
class KondoAsyncGRPOConfig(AsyncGRPOConfig):
    """TRL's `AsyncGRPOConfig` with a gate; without one of the first three it is TRL's own.

    Raises:
        ValueError: options that do not go together.
    """

    gate_noise: float | None = field(
        default=None,
        metadata={
            "help": "Noise that skipping may add to the gradient, as a multiple of the batch's own: start with 0.3. "
            "The expected gradient is TRL's. 0 skips only what has no gradient, such as groups of equal rewards."
        },
    )
    gate_rate: float | None = field(
        default=None, metadata={"help": "Fraction of a micro-batch's completions to keep, by delight."}
    )
    gate_price: float | None = field(default=None, metadata={"help": "Keep only completions of a delight above this."})
    gate_floor: float = field(
        default=0.02,
        metadata={
            "help": "With `gate_noise`: the least probability of a completion that has an advantage. Its log-probs are "
            "those of an older policy, and may say of tokens that they are certain which are not any more."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gate() is not None:
            counts_completions(self)

    def gate(self) -> Gate | None:
        """The gate that these options say, None for none."""
        generator = torch.Generator().manual_seed(self.seed)
        return gate_of(self.gate_noise, self.gate_rate, self.gate_price, floor=self.gate_floor, generator=generator)


def counts_completions(config: Any) -> None:
    """Have micro-batches be a number of completions, of which those kept are trained on.

    Raises:
        ValueError: a budget of tokens is asked for.
    """
    if config.token_budget is not None and config.token_budget > 0:
        raise ValueError(
            f"token_budget={config.token_budget}: with a gate, a micro-batch is per_device_train_batch_size "
            "completions of each process, kept or not. Leave token_budget out, and set per_device_train_batch_size."
        )
    config.token_budget = 0


class Window(list[TreeRow]):
    """A micro-batch's rows, one for each process, and the completions that it was chosen from."""

    def __init__(self, rows: list[TreeRow], seen: list[dict[str, Any]]) -> None:
        super().__init__(rows)
        self.seen = seen


class GatedBatcher(IterableDataset[Window]):
    """TRL's `FixedCountBatcher`, of whose completions the gate keeps some.

    Args:
        dataset: gives one completion at a time.
        gate: decides on each micro-batch.
        processes: how many share a micro-batch.
        count: completions of a micro-batch.
        metrics: TRL's, to log to.
    """

    def __init__(self, dataset: Any, gate: Gate, processes: int, count: int, metrics: dict[str, list[Any]]) -> None:
        self.dataset, self.gate, self.processes, self.count, self.metrics = dataset, gate, processes, count, metrics

    def __iter__(self) -> Iterator[Window]:
        seen: list[dict[str, Any]] = []
        for completion in self.dataset:
            seen.append(completion)
            if len(seen) == self.count:
                yield self.chosen(seen)
                seen = []

    def chosen(self, seen: list[dict[str, Any]]) -> Window:
        """The completions that the gate keeps, partitioned as TRL does; idle processes get one of advantage 0."""
        score, cost = self._scores(seen), distinct_tokens(seen)
        tokens = torch.tensor([int(completion["completion_mask"].sum()) for completion in seen])
        if not bool(score.isfinite().all()):
            raise ValueError("advantages or log-probs of the rollout worker are NaN or infinite; expected numbers.")
        picked, weights, decision = select_by_score(self.gate, score, cost)
        kept = [
            seen[row] | {"advantage": seen[row]["advantage"] * weight}
            for row, weight in zip(picked.tolist(), weights.tolist(), strict=True)
        ]
        dummies = max(0, self.processes - len(kept))
        shortest = min(seen, key=lambda completion: len(completion["input_ids"]))
        kept += [shortest | {"advantage": 0.0}] * dummies
        rows = next(iter(trls.FixedCountBatcher(kept, self.processes, len(kept))))
        figures = {
            "kept_rate": (len(picked), len(seen)),
            "kept_token_rate": (int(tokens[picked].sum()), int(tokens.sum())),
            "backward_tokens": float(sum(len(row.tokens) for row in rows)),
            "distinct_tokens": float(cost.sum()),
            "dummies": float(dummies),
        }
        if getattr(self.gate, "weighted", None):
            figures["noise"] = expected_noise(score, decision.probability)
        for name, value in figures.items():
            self.metrics[f"gate/{name}"].append(value)
        return Window(rows, seen)

    def _scores(self, seen: list[dict[str, Any]]) -> Tensor:
        """(N,) sizes or delights, by the sampler's log-probs; 0 for what has no advantage."""
        log_probs, mask = (
            pad_sequence([torch.as_tensor(completion[name]).float() for completion in seen], batch_first=True)
            for name in ("old_log_probs", "completion_mask")
        )
        advantages = torch.tensor([float(completion["advantage"]) for completion in seen])
        advantages = advantages.where(mask.any(dim=1), 0)
        if getattr(self.gate, "weighted", None):
            return RowSize(by_length=False)(advantages, log_probs, mask)
        log_probs = log_probs.where(mask.bool(), 0).clamp(max=0)
        return with_sign(sequence_delight(advantages, log_probs, mask), advantages)


class CollatorOfSeen(trls.DataCollatorForRollout):
    """TRL's collator, which divides by the tokens of all completions and logs the rewards of all."""

    def torch_call(self, examples: list[Any]) -> dict[str, Any]:
        (window,) = examples
        batch: dict[str, Any] = super().torch_call(examples)
        counted = sum(int(completion["completion_mask"][1:].sum()) for completion in window.seen)
        batch["global_n_tokens"] = torch.full((self.num_processes,), float(counted))
        self.groups_trained.update(completion["group_id"] for completion in window.seen)
        return batch

    def _log_metrics(self, rows: list[TreeRow], all_examples: list[dict[str, Any]], padded: Tensor) -> None:
        super()._log_metrics(rows, [example | {"metrics": {}} for example in all_examples], padded)
        assert isinstance(rows, Window)
        for name in dict.fromkeys(name for completion in rows.seen for name in completion["metrics"]):
            values = [completion["metrics"].get(name, math.nan) for completion in rows.seen]
            valid = [value for value in values if not math.isnan(value)]
            self.metrics[name].append(sum(valid) / len(valid) if valid else math.nan)


class KondoAsyncGRPOTrainer(AsyncGRPOTrainer):
    """TRL's `AsyncGRPOTrainer` with the gate of its config: takes what that takes.

    The gradient of a micro-batch is that of TRL's own with the skipped completions' advantages at 0 and the others'
    multiplied by their weights: by 1, or under `gate_noise` such that it is TRL's own on average.

    Args:
        gate: one of your own instead, `gate(score, cost) -> Decision`, which decides on each micro-batch.

    Raises:
        ValueError: a gate here and in the config.
    """

    def __init__(self, *given: Any, gate: Gate | None = None, **options: Any) -> None:
        args = options.get("args") or (given[2] if len(given) > 2 else None)
        said = args.gate() if isinstance(args, KondoAsyncGRPOConfig) else None
        if gate is not None and said is not None:
            raise ValueError(f"gate={gate!r}, and the config has {said!r}; give one of them.")
        if gate is not None and args is not None:
            counts_completions(args)
        self._gate = gate or said
        super().__init__(*given, **options)

    def get_train_dataloader(self) -> Any:
        if self._gate is None:
            return super().get_train_dataloader()
        processes, metrics = self.accelerator.num_processes, self._metrics["train"]
        dataset: Any = trls._EmptyIterableDataset()
        if self.accelerator.is_main_process:
            self._rollout_dataset = trls.RolloutQueueDataset(
                rollout_queue=self.rollout_queue,
                model_version_fn=lambda: self.model_version,
                check_health_fn=self.rollout_worker.check_health,
                stale_after_s=self.args.heartbeat_stale_after_s,
                metrics=metrics,
                max_staleness=self.args.max_staleness,
                report_to=self.args.report_to,
            )
            count = self.args.per_device_train_batch_size * processes
            dataset = GatedBatcher(self._rollout_dataset, self._gate, processes, count, metrics)
        collator = CollatorOfSeen(
            self.processing_class.pad_token_id, processes, groups_trained=self._trained_groups, metrics=metrics
        )
        return self.accelerator.prepare(DataLoader(dataset, batch_size=1, collate_fn=collator, num_workers=0))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self._gate is not None and self.accelerator.is_main_process:
            folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
            save_gate(_WithDraws(self._gate), folder)

    def _inner_training_loop(self, *given: Any, **options: Any) -> Any:
        folder = options.get("resume_from_checkpoint")
        if folder is not None:  # on every process, so that what does not fit is raised on all
            load_gate(None if self._gate is None else _WithDraws(self._gate), Path(folder))
        return super()._inner_training_loop(*given, **options)


class _WithDraws:
    """A gate as its checkpoint has it: with its generator, so that a resumed run draws as an unbroken one."""

    def __init__(self, gate: Any) -> None:
        self.gate, self.generator = gate, getattr(gate, "generator", None)

    def __repr__(self) -> str:
        return repr(self.gate)

    def __call__(self, score: Tensor, cost: Tensor | None = None) -> Decision:
        decision: Decision = self.gate(score, cost)
        return decision

    def state_dict(self) -> dict[str, Any]:
        draws = None if self.generator is None else self.generator.get_state().tolist()
        return {"gate": state_of(self.gate), "draws": draws}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_state(self.gate, state["gate"])
        if self.generator is not None:
            self.generator.set_state(torch.tensor(state["draws"], dtype=torch.uint8))


def distinct_tokens(completions: list[dict[str, Any]]) -> Tensor:
    """(N,) what each adds to a tree of all: its tokens, each divided by how many have it."""
    tree = TreeRow()
    for completion in completions:
        tree.add(completion)
    uses = Counter(node for nodes in tree.sample_nodes for node in nodes)
    return torch.tensor([sum(1 / uses[node] for node in nodes) for nodes in tree.sample_nodes])
