"""One run of the language study: TRL's trainer and a gate, its seconds by what they go to; goes on when killed."""

from __future__ import annotations

import logging
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from sparkjoy.integrations.trl import KondoGRPOConfig, KondoGRPOTrainer
from sparkjoy_lab.language_model import pretrained
from sparkjoy_lab.studies.language_results import PARTS
from sparkjoy_lab.studies.language_tasks import LanguageTask, Problem
from sparkjoy_lab.training.loop import Record
from sparkjoy_lab.training.tracking import read_json, write_json

LOGGED = {
    "reward": "reward",
    "frac_reward_zero_std": "silent_groups",
    "completions/mean_length": "answer_tokens",
    "gate/kept_rate": "kept",
    "gate/noise": "noise",
}
"""TRL's names of what a record has of a step, and the record's."""
EVALUATION_ROWS = 100
MOST_PROBLEMS = 4_000
"""To train on; more than any run sees."""


class Timed(KondoGRPOTrainer):
    """Counts CPU seconds by part, and the tokens that are differentiated: where they are shared, the distinct ones."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seconds = dict.fromkeys((*PARTS, "total"), 0.0)
        self.tokens = {"backward_tokens": 0}

    @contextmanager
    def lap(self, part: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.seconds[part] += time.process_time() - start

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        with self.lap("sampling"):
            return super()._generate_single_turn(*args, **kwargs)

    def _decide(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.lap("gate"):
            return super()._decide(*args, **kwargs)

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> Any:
        before = 0 if self._shared is None else self._shared.distinct_tokens
        found = super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )
        if torch.is_grad_enabled():
            shared = 0 if self._shared is None else self._shared.distinct_tokens - before
            self.tokens["backward_tokens"] += shared or int(attention_mask.sum())
        return found


class MaxVariance(Timed):
    """PODS (arXiv 2504.13818): of each group the `kept` answers whose rewards vary most, advantages of these alone."""

    kept = 2

    def _decide(self, gate: Any, output: Any) -> Tensor:
        rewards = (self._gate_rewards * self.reward_weights).nansum(dim=1).view(-1, self.num_generations)
        order = rewards.argsort(dim=1, stable=True)
        chosen = torch.cat([order[:, : self.kept // 2], order[:, -(self.kept - self.kept // 2) :]], dim=1)
        of_chosen = rewards.gather(1, chosen)
        advantages = (of_chosen - of_chosen.mean(dim=1, keepdim=True)) / (of_chosen.std(dim=1, keepdim=True) + 1e-4)
        all_rows = torch.zeros_like(rewards).scatter(1, chosen, advantages)
        output["advantages"] = self._mine(all_rows.flatten(), output["advantages"])
        keep: Tensor = output["advantages"] != 0
        self._metrics["train"]["gate/kept_rate"].append(float(keep.float().mean()))
        return keep


class Watching(TrainerCallback):  # type: ignore[misc]  # transformers' is untyped
    """A record of every step, with the held-out score now and then; a checkpoint carries them."""

    def __init__(
        self,
        folder: Path,
        evaluate: Callable[[], float],
        every: int,
        until_seconds: float,
        on_step: Callable[[Record], None],
    ) -> None:
        self.folder, self.evaluate, self.every, self.on_step = folder, evaluate, every, on_step
        self.until_seconds = until_seconds
        self.trainer: Any = None
        self.rows: list[Record] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step:
            self.rows = read_json(self.folder / "steps.json")[: state.global_step + 1]
            self.trainer.seconds |= self.rows[-1]["seconds"]
            self.trainer.tokens |= {name: self.rows[-1][name] for name in self.trainer.tokens}
        else:
            self._record(state, {"score": self.evaluate()})

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.process_time()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.optimizer_start = time.process_time()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.trainer.seconds["optimizer"] += time.process_time() - self.optimizer_start

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        seconds = self.trainer.seconds
        seconds["total"] += time.process_time() - self.start
        seconds["update"] = seconds["total"] - sum(seconds[part] for part in PARTS if part != "update")
        metrics = self.trainer._metrics["train"]
        of_step = {column: metrics[name][-1] for name, column in LOGGED.items() if metrics.get(name)}
        last = state.global_step == args.max_steps or seconds["total"] >= self.until_seconds
        if state.global_step % self.every == 0 or last:
            of_step["score"] = self.evaluate()
        self._record(state, of_step)
        control.should_training_stop = last

    def _record(self, state: Any, of_step: Mapping[str, float]) -> None:
        seconds = dict(self.trainer.seconds)
        self.rows.append({"step": state.global_step, "seconds": seconds, **self.trainer.tokens, **of_step})
        write_json(self.folder / "steps.json", self.rows)
        self.on_step(self.rows[-1])


def train_one(
    arm: Mapping[str, Any],
    task: LanguageTask,
    folder: Path,
    *,
    model: str | None = None,
    seed: int,
    steps: int,
    learning_rate: float,
    prompts: int = 8,
    group: int = 8,
    micro_batch: int = 16,
    bf16: bool = True,
    held_out: int = 500,
    evaluate_every: int = 5,
    until_seconds: float = math.inf,
    on_step: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """The records of a run, one a step; read where it is finished, gone on with where it was killed.

    A finished run that is too short is trained anew.

    Args:
        arm: options of `KondoGRPOConfig`; besides `group`, answers to a prompt, `max_variance` for PODS, and `lora`,
            the rank of adapters.
        task: what is learnt.
        folder: of this run.
        model: as `pretrained` takes it.
        prompts, group, micro_batch: prompts a step, answers to each, rows of a pass.
        bf16: TRL's mixed precision.
        held_out: problems that are scored, greedily, every `evaluate_every` steps.
        until_seconds: the run ends with the step that reaches as many.
        on_step: told of every record.
    """
    finished = folder / "records.json"
    if finished.exists():
        records: Any = read_json(finished)
        whole = isinstance(records, list) and all(isinstance(row, dict) and "seconds" in row for row in records)
        if not whole or not records or "score" not in records[0]:
            raise ValueError(
                f"{finished} holds no records of a run; put a copy of it back, or remove it to train anew."
            )
        if len(records) > steps or records[-1]["seconds"]["total"] >= until_seconds:
            return list(records[: steps + 1])
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()  # of loading and saving, across that of the study
    options = dict(arm)
    group = options.pop("group", group)
    trainer_of_arm = MaxVariance if options.pop("max_variance", False) else Timed
    rank = options.pop("lora", None)
    policy, tokenizer = pretrained(model)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(tokenizer("\n", add_special_tokens=False).input_ids[-1])
    problems = task.problems()
    scored, training = problems[:held_out], problems[held_out:][:MOST_PROBLEMS]

    def evaluate() -> float:
        return score(trainer.model, tokenizer, task, scored, bf16)

    watching = Watching(folder, evaluate, evaluate_every, until_seconds, on_step)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trainer_of_arm(
            model=policy,
            processing_class=tokenizer,
            reward_funcs=task.reward,
            train_dataset=Dataset.from_list(training),
            args=KondoGRPOConfig(
                output_dir=str(folder),
                seed=seed,
                max_steps=steps,
                learning_rate=learning_rate,
                lr_scheduler_type="constant",
                per_device_train_batch_size=micro_batch,
                gradient_accumulation_steps=prompts * group // micro_batch,
                num_generations=group,
                max_completion_length=task.max_tokens,
                bf16=bf16,
                use_cpu=not torch.cuda.is_available(),
                gradient_checkpointing=False,
                save_steps=2 * evaluate_every,
                save_total_limit=1,
                logging_steps=1,
                report_to="none",
                disable_tqdm=True,
                **options,
            ),
            callbacks=[watching],
            peft_config=None if rank is None else adapters(rank),
        )
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        watching.trainer = trainer
        trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.exists() else None)
    write_json(finished, watching.rows)
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    (folder / "steps.json").unlink()
    return watching.rows


def adapters(rank: int) -> Any:
    """LoRA on every linear layer, alpha twice the rank, as most recipes have it.

    Raises:
        ValueError: PEFT is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError:
        raise ValueError("arms of LoRA need peft: pip install peft.") from None
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


@torch.no_grad()
def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: LanguageTask,
    problems: Sequence[Problem],
    bf16: bool,
) -> float:
    """The mean score of greedy answers."""
    was_training = model.training
    model.eval()
    scores: list[float] = []
    for first in range(0, len(problems), EVALUATION_ROWS):
        rows = problems[first : first + EVALUATION_ROWS]
        inputs = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True).to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            ids = model.generate(
                **inputs,
                **common_beginning(model, inputs["input_ids"]),
                max_new_tokens=task.max_tokens,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        scores += [task.score(text, row) for text, row in zip(texts, rows, strict=True)]
    model.train(was_training)
    return sum(scores) / len(scores)


def common_beginning(model: Any, ids: Tensor) -> dict[str, Any]:
    """A cache of the tokens that all rows (n, P) begin with, read once; nothing where there are none."""
    common = int((ids == ids[0]).all(dim=0).long().cumprod(dim=0).sum())
    if common < 2 or common == ids.shape[1]:
        return {}
    output = model(input_ids=ids[:1, :common], use_cache=True, logits_to_keep=1)
    name = "cache" if "cache" in output else "past_key_values"  # the older name
    output[name].batch_repeat_interleave(len(ids))
    return {name: output[name]}
