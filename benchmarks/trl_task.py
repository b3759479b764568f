"""A language model and a verifiable task made on the spot, for the benchmarks and tests of the TRL trainer.

The prompt is a few digits and `>`; the reward is the fraction of the digits copied in place, less what is too long.
"""

from __future__ import annotations

import logging
import os
import random
import warnings
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.trainer_callback import PrinterCallback

from sparkjoy.integrations.trl import KondoGRPOConfig

DIGITS = "0123456789"


def tokenizer() -> PreTrainedTokenizerFast:
    """Ten digits and `>`, one token each."""
    vocabulary = {name: number for number, name in enumerate(["<pad>", "<eos>", "<unk>", *DIGITS, ">"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def model(width: int = 32, layers: int = 2, seed: int = 0, heads: int = 2) -> Qwen2ForCausalLM:
    """A Qwen2 of random weights: about 30,000 parameters as it is."""
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=14,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=256,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    )


def prompts(count: int, shortest: int, longest: int, seed: int = 0, digits: str = DIGITS) -> Dataset:
    """Prompts of `shortest` to `longest` digits, out of `digits`."""
    source = random.Random(seed)
    lengths = [source.randint(shortest, longest) for _ in range(count)]
    return Dataset.from_dict({"prompt": ["".join(source.choices(digits, k=length)) + ">" for length in lengths]})


def copied(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """The reward: the fraction of the prompt's digits that stand in their place, less 0.1 for each token too many."""
    rewards = []
    for prompt, completion in zip(prompts, completions, strict=True):
        wanted, given = prompt.rstrip(">"), completion.replace(" ", "")
        right = sum(first == second for first, second in zip(wanted, given, strict=False))
        rewards.append(right / len(wanted) - 0.1 * max(0, len(given) - len(wanted)))
    return rewards


def options(**changes: Any) -> dict[str, Any]:
    """Options of a GRPOConfig for a CPU: float32, nothing reported, nothing saved."""
    return {
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "num_generations": 4,
        "max_completion_length": 10,
        "max_steps": 1,
        "seed": 0,
    } | changes


def quiet() -> None:
    """One thread, and only errors on the terminal."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"


def trainer(cls: type, folder: str, arm: dict[str, Any], dataset: Dataset, **given: Any) -> Any:
    """A silent trainer of `cls` on the CPU.

    Args:
        cls: `KondoGRPOTrainer`, or a class made from it.
        folder: for what TRL writes.
        arm: options of the gate, and all others that are not `options`'s.
        dataset: the prompts.
        given: model, reward_funcs and what else the trainer takes.
    """
    arguments = KondoGRPOConfig(**options(output_dir=folder, **arm))
    made = cls(args=arguments, train_dataset=dataset, processing_class=tokenizer(), **given)
    made.remove_callback(PrinterCallback)
    return made


def rollout_with_log_probs(prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
    """A `rollout_func` for TRL: samples as its own generation does, and returns the log-probs it sampled with."""
    words, policy = trainer.processing_class, trainer.accelerator.unwrap_model(trainer.model)
    inputs = words(prompts, return_tensors="pt", padding=True, padding_side="left")
    width = inputs["input_ids"].shape[1]
    with torch.no_grad():
        ids = policy.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            generation_config=trainer.generation_config,
        )
        full = torch.cat([inputs["attention_mask"], torch.ones_like(ids[:, width:])], dim=1)
        log_probs = policy(ids, attention_mask=full).logits[:, width - 1 : -1].log_softmax(-1)
    log_probs = log_probs.gather(2, ids[:, width:, None]).squeeze(2)
    lengths = [int((row == trainer.processing_class.eos_token_id).int().argmax()) for row in ids[:, width:]]
    ended = (ids[:, width:] == trainer.processing_class.eos_token_id).any(dim=1).tolist()
    kept = [length + 1 if end else ids.shape[1] - width for length, end in zip(lengths, ended, strict=True)]
    return {
        "prompt_ids": [
            row[m.bool()].tolist() for row, m in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ],
        "completion_ids": [row[:n].tolist() for row, n in zip(ids[:, width:], kept, strict=True)],
        "logprobs": [row[:n].tolist() for row, n in zip(log_probs, kept, strict=True)],
    }
