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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset

from sparkjoy.gates import Gate
from sparkjoy.gates.decision import weighs
from sparkjoy.integrations.gates import gate_of, one_gate
from sparkjoy.integrations.sizes import RowSize, score_of_rows
from sparkjoy.integrations.trl.checkpoints import GateInCheckpoints
from sparkjoy.integrations.trl.config import GateOptions, option
from sparkjoy.noise import expected_noise
from sparkjoy.scores import delight
from sparkjoy.selecting import select_by_score

try:
    from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer
    from trl.experimental.async_grpo import async_grpo_trainer as trls
    from trl.experimental.async_grpo.packing import TreeRow
except ImportError as error:
    raise ImportError("TRL's asynchronous GRPO trainer is needed as TRL 1.16 has it: pip install trl==1.16") from error


@dataclass
class KondoAsyncGRPOConfig(GateOptions, AsyncGRPOConfig):
    """TRL's `AsyncGRPOConfig` with a gate; without one of the first three options it is TRL's own.

    Raises:
        ValueError: options that do not go together.
    """

    gate_floor: float = option(
        0.02,
        "With `gate_noise`: the least probability of a completion that has an advantage. Its log-probs are those of an "
        "older policy, and may say of tokens that they are certain which are not any more.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gate() is not None:
            counts_completions(self)

    def gate(self) -> Gate | None:
        """The gate that these options say; None for none, and at rate 1."""
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


class GatedBatcher(IterableDataset[Any]):
    """TRL's `FixedCountBatcher`, of whose completions the gate keeps some.

    It gives a row for each process, and all completions that these were chosen from.

    Args:
        dataset: gives one completion at a time.
        gate: decides on each micro-batch.
        processes: how many share a micro-batch.
        count: completions of a micro-batch.
        metrics: TRL's, to log to.
    """

    def __init__(self, dataset: Any, gate: Gate, processes: int, count: int, metrics: dict[str, list[Any]]) -> None:
        self.dataset, self.gate, self.processes, self.count, self.metrics = dataset, gate, processes, count, metrics

    def __iter__(self) -> Iterator[tuple[list[TreeRow], list[dict[str, Any]]]]:
        seen: list[dict[str, Any]] = []
        for completion in self.dataset:
            seen.append(completion)
            if len(seen) == self.count:
                yield self.chosen(seen), seen
                seen = []

    def chosen(self, seen: list[dict[str, Any]]) -> list[TreeRow]:
        """The completions that the gate keeps, partitioned as TRL does; idle processes get one of advantage 0."""
        score, cost = self._scores(seen), distinct_tokens(seen)
        tokens = torch.tensor([int(completion["completion_mask"].sum()) for completion in seen])
        if not bool(score.isfinite().all()):
            raise ValueError("advantages or log-probs of the rollout worker are NaN or infinite; expected numbers.")
        picked, weights, decision = select_by_score(self.gate, score, cost)
        kept = [
            seen[row] | {"advantage": seen[row]["advantage"] * weight, "metrics": {}}
            for row, weight in zip(picked.tolist(), weights.tolist(), strict=True)
        ]
        dummies = max(0, self.processes - len(kept))
        shortest = min(seen, key=lambda completion: len(completion["input_ids"]))
        kept += [shortest | {"advantage": 0.0, "metrics": {}}] * dummies
        kept[0]["metrics"] = mean_metrics(seen)  # TRL logs the mean of those that have some
        rows = next(iter(trls.FixedCountBatcher(kept, self.processes, len(kept))))
        figures = {
            "kept_rate": (len(picked), len(seen)),
            "kept_token_rate": (int(tokens[picked].sum()), int(tokens.sum())),
            "backward_tokens": float(sum(len(row.tokens) for row in rows)),
            "distinct_tokens": float(cost.sum()),
            "dummies": float(dummies),
        }
        if weighs(self.gate):
            figures["noise"] = expected_noise(score, decision.probability)
        for name, value in figures.items():
            self.metrics[f"gate/{name}"].append(value)
        return rows  # type: ignore[no-any-return]  # TRL is untyped

    def _scores(self, seen: list[dict[str, Any]]) -> Tensor:
        """(N,) sizes or delights, by the sampler's log-probs; 0 for what has no advantage."""
        log_probs, mask = (
            pad_sequence([torch.as_tensor(completion[name]).float() for completion in seen], batch_first=True)
            for name in ("old_log_probs", "completion_mask")
        )
        advantages = torch.tensor([float(completion["advantage"]) for completion in seen])
        if weighs(self.gate):
            return RowSize(by_length=False)(advantages, log_probs, mask)
        return score_of_rows(delight, advantages, log_probs.clamp(max=0), mask)


def mean_metrics(completions: list[dict[str, Any]]) -> dict[str, float]:
    """The mean of each figure, such as a reward, over the completions that have it, kept or not; NaN of none."""
    means = {}
    for name in dict.fromkeys(name for completion in completions for name in completion["metrics"]):
        values = [completion["metrics"].get(name, math.nan) for completion in completions]
        valid = [value for value in values if not math.isnan(value)]
        means[name] = sum(valid) / len(valid) if valid else math.nan
    return means


def distinct_tokens(completions: list[dict[str, Any]]) -> Tensor:
    """(N,) what each adds to a tree of all: its tokens, each divided by how many have it."""
    tree = TreeRow()
    for completion in completions:
        tree.add(completion)
    uses = Counter(node for nodes in tree.sample_nodes for node in nodes)
    return torch.tensor([sum(1 / uses[node] for node in nodes) for nodes in tree.sample_nodes])


class KondoAsyncGRPOTrainer(GateInCheckpoints, AsyncGRPOTrainer):
    """TRL's `AsyncGRPOTrainer` with the gate of its config: takes what that takes.

    The gradient of a micro-batch is that of TRL's own with the skipped completions' advantages at 0 and the others'
    multiplied by their weights: by 1, or under `gate_noise` such that it is TRL's own on average.

    Args:
        gate: one of your own instead, `gate(score, cost) -> Decision`, which decides on each micro-batch.

    Raises:
        ValueError: a gate here and in the config.
    """

    _gate_draws = True

    def __init__(self, *given: Any, gate: Gate | None = None, **options: Any) -> None:
        args = options.get("args") or (given[2] if len(given) > 2 else None)
        self._gate = one_gate(gate, args.gate() if isinstance(args, KondoAsyncGRPOConfig) else None)
        if gate is not None and args is not None:
            counts_completions(args)
        super().__init__(*given, **options)

    def get_train_dataloader(self) -> Any:
        if self._gate is None:
            return super().get_train_dataloader()
        counts_completions(self.args)
        super().get_train_dataloader()  # of which its queue is used
        processes, metrics = self.accelerator.num_processes, self._metrics["train"]
        dataset: Any = trls._EmptyIterableDataset()
        if self.accelerator.is_main_process:
            count = self.args.per_device_train_batch_size * processes
            dataset = GatedBatcher(self._rollout_dataset, self._gate, processes, count, metrics)
        collator = trls.DataCollatorForRollout(
            self.processing_class.pad_token_id, processes, groups_trained=self._trained_groups, metrics=metrics
        )

        def collated(examples: list[Any]) -> dict[str, Any]:
            """TRL's batch, whose loss is divided by the tokens of all completions, and whose groups are all theirs."""
            ((rows, seen),) = examples
            batch: dict[str, Any] = collator.torch_call([rows])
            self._trained_groups.update(completion["group_id"] for completion in seen)
            counted = sum(int(completion["completion_mask"][1:].sum()) for completion in seen)
            return batch | {"global_n_tokens": torch.full((processes,), float(counted))}

        return self.accelerator.prepare(DataLoader(dataset, batch_size=1, collate_fn=collated, num_workers=0))
