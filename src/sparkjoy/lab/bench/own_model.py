"""A step of policy gradient on the user's own language model: prompts, sampled answers, rewards; needs transformers."""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparkjoy.baselines import group_mean_advantage

READ_AT_ONCE = 8
"""Rows of a forward pass that recomputes the sampler's log-probs."""


@dataclass(frozen=True)
class OwnModel:
    """The model, and how its answers are made."""

    model: str = "gpt2-14m"
    """Name or folder of a causal language model; or a decoder of `sparkjoy bench`, of random weights, tokens and
    advantages, for which neither prompts nor a reward are given."""
    prompts: str | None = None
    """Text, a prompt a line; or .jsonl, an object a line: {"prompt": ..., other columns for the reward}."""
    reward: str | None = None
    """FILE.py:FUNCTION, called as TRL calls it: reward(prompts=..., completions=..., **columns), a number for each."""
    group_size: int = 8
    """Answers to a prompt; their mean reward is the baseline."""
    prompts_per_step: int = 8
    """Prompts in the batch, drawn from the file."""
    max_new_tokens: int = 128
    """Tokens of an answer at most."""
    temperature: float = 1.0
    """What logits are divided by, for sampling and for the log-probs."""
    bfloat16: bool = False
    """Weights and activations in bfloat16."""
    device: Literal["cpu", "cuda"] = "cpu"
    """cpu or cuda."""
    seed: int = 0
    """Of prompts, answers and draws."""

    def __post_init__(self) -> None:
        for name in ("group_size", "prompts_per_step", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least 1.")
        if self.group_size < 2:
            raise ValueError("--group-size 1: expected at least 2, since an answer is compared with others.")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"--temperature {self.temperature}: expected a number above 0.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees none here; leave the flag out to run on the CPU.")


class Sampled(NamedTuple):
    """A batch to take a step on: what `sj.frontier` takes, and the answers with their rewards."""

    log_prob_fn: Callable[[dict[str, Tensor]], Tensor]
    batch: dict[str, Tensor]
    advantages: Tensor
    log_probs: Tensor
    mask: Tensor | None
    answers: list[dict[str, Any]]


def sample(config: OwnModel) -> Sampled:
    """Load the model, let it answer prompts, and reward the answers.

    Raises:
        ValueError: something is missing, cannot be read, or is not what it should be; or all answers to each prompt
            have the same reward.
    """
    if config.prompts is None or config.reward is None:
        raise ValueError(f"--model {config.model}: expected --prompts FILE and --reward FILE.py:FUNCTION too.")
    reward = reward_function(config.reward)
    prompts = read_prompts(Path(config.prompts))
    if len(prompts) < config.prompts_per_step:
        raise ValueError(
            f"--prompts {config.prompts} holds {len(prompts)}; expected --prompts-per-step {config.prompts_per_step} "
            "at least."
        )
    drawn = random.Random(config.seed).sample(prompts, config.prompts_per_step)
    model, tokenizer = _load(config)
    torch.manual_seed(config.seed)
    tokens, attention, mask = _answers(config, model, tokenizer, [row["prompt"] for row in drawn])
    written = [
        tokenizer.decode(row[valid], skip_special_tokens=True)
        for row, valid in zip(tokens[:, -mask.shape[1] :], mask, strict=True)
    ]
    columns = {name: [row[name] for row in drawn for _ in range(config.group_size)] for name in drawn[0]}
    chat = isinstance(drawn[0]["prompt"], list)
    completions = [[{"role": "assistant", "content": text}] if chat else text for text in written]
    rewards = _rewards(config.reward, reward, columns.pop("prompt"), completions, columns)
    advantages = group_mean_advantage(rewards, config.group_size)
    if not bool(advantages.any()):
        raise ValueError(
            f"all answers to each of {len(drawn)} prompts have the same reward (on the mean {rewards.mean():.3g}), so "
            "there is nothing to learn from them; try more prompts, or a task that the model can half do."
        )
    answers = [
        {"prompt": drawn[index // config.group_size]["prompt"], "completion": text, "reward": float(rewards[index])}
        for index, text in enumerate(written)
    ]
    log_prob_fn = _log_prob_function(model, mask.shape[1], config.temperature)
    batch = {"tokens": tokens, "attention": attention, "positions": (attention.cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad():
        parts = [
            log_prob_fn({name: value[start : start + READ_AT_ONCE] for name, value in batch.items()})
            for start in range(0, len(tokens), READ_AT_ONCE)
        ]
    return Sampled(log_prob_fn, batch, advantages.to(tokens.device), torch.cat(parts), mask, answers)


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, each with a "prompt" and the same other columns.

    Raises:
        ValueError: it cannot be read, holds none, or a line is no such object.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts {path}: cannot be read as text ({error}).") from None
    if not lines:
        raise ValueError(f"--prompts {path}: expected at least one prompt, a line each.")
    if path.suffix not in (".jsonl", ".json"):
        return [{"prompt": line} for line in lines]
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"--prompts {path}, line {number}: no JSON ({error}); expected an object a line."
            ) from None
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str | list):
            raise ValueError(f'--prompts {path}, line {number}: expected an object with a "prompt".')
        first = rows[0] if rows else row
        if row.keys() != first.keys() or type(row["prompt"]) is not type(first["prompt"]):
            raise ValueError(f"--prompts {path}, line {number}: other columns than in the first; expected the same.")
        rows.append(row)
    return rows


def reward_function(named: str) -> Callable[..., Any]:
    """The function that FILE.py:FUNCTION names.

    Raises:
        ValueError: there is none, or the file cannot be run.
    """
    file, _, name = named.rpartition(":")
    path = Path(file)
    if not file or not path.is_file():
        raise ValueError(f"--reward {named}: no file {file or named!r}; expected FILE.py:FUNCTION.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--reward {named}: {file} is no Python file; expected FILE.py:FUNCTION.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"--reward {named}: {file} does not run ({type(error).__name__}: {error}).") from error
    function: Any = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"--reward {named}: {file} has no function {name!r}.")
    return function  # type: ignore[no-any-return]  # whatever is in the file


def _load(config: OwnModel) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # the command has one
    dtype = torch.bfloat16 if config.bfloat16 else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(config.model, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {config.model}: {str(error).strip().splitlines()[0]}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError(f"--model {config.model}: its tokenizer has neither a padding nor an end token.")
    return model.to(config.device).eval(), tokenizer  # dropout would be taken for an error of the gates


def _answers(config: OwnModel, model: Any, tokenizer: Any, prompts: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (B, P + T), prompts padded to the left; what to attend to, likewise; and the answers' mask (B, T)."""
    from transformers import GenerationConfig

    texts = prompts
    if isinstance(prompts[0], list):
        texts = [tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False) for turns in prompts]
    read = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=texts is prompts).to(config.device)
    length, limit = read["input_ids"].shape[1], getattr(model.config, "max_position_embeddings", None)
    if limit is not None and length + config.max_new_tokens > limit:
        raise ValueError(
            f"--max-new-tokens {config.max_new_tokens}: with prompts of up to {length} tokens that is more than the "
            f"{limit} that {config.model} can read."
        )
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    model.generation_config = GenerationConfig(  # the policy itself: nothing of what the model's authors cut off
        do_sample=True,
        temperature=config.temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=config.max_new_tokens,
        num_return_sequences=config.group_size,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.no_grad():
        tokens = model.generate(input_ids=read["input_ids"], attention_mask=read["attention_mask"])
    answers = tokens[:, length:]
    ended = torch.isin(answers, torch.tensor(ends if isinstance(ends, list) else [ends], device=answers.device))
    mask = ended.cumsum(1) - ended.int() == 0  # up to the first end, and with it
    attention = torch.cat([read["attention_mask"].repeat_interleave(config.group_size, 0), mask.long()], dim=1)
    return tokens, attention, mask


def _rewards(
    named: str, reward: Callable[..., Any], prompts: list[Any], completions: list[Any], columns: dict[str, list[Any]]
) -> Tensor:
    try:
        given = reward(prompts=prompts, completions=completions, **columns)
    except Exception as error:
        raise ValueError(f"--reward {named} raised {type(error).__name__}: {error}") from error
    try:
        rewards = torch.tensor([float(value) for value in given])
    except (TypeError, ValueError):
        raise ValueError(f"--reward {named} returned {given!r:.80}; expected a list of numbers.") from None
    if len(rewards) != len(prompts) or not bool(rewards.isfinite().all()):
        raise ValueError(
            f"--reward {named} returned {len(rewards)} numbers, {int(rewards.isfinite().sum())} of them finite; "
            f"expected one for each of {len(prompts)} completions."
        )
    return rewards


def _log_prob_function(model: Any, length: int, temperature: float) -> Callable[[dict[str, Tensor]], Tensor]:
    takes = inspect.signature(model.forward).parameters

    def log_prob_fn(rows: dict[str, Tensor]) -> Tensor:
        options: dict[str, Any] = {"position_ids": rows["positions"]} if "position_ids" in takes else {}
        if "logits_to_keep" in takes:
            options["logits_to_keep"] = length + 1
        output = model(rows["tokens"], attention_mask=rows["attention"], use_cache=False, **options)
        logits, answers = output.logits[:, -length - 1 : -1].float() / temperature, rows["tokens"][:, -length:]
        return -F.cross_entropy(logits.flatten(0, 1), answers.flatten(), reduction="none").view_as(answers)

    return log_prob_fn
