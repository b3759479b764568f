"""A step of policy gradient on the user's own language model: prompts, sampled answers, rewards; needs transformers."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import importlib.util
import inspect
import json
import math
import random
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from sparkjoy.baselines import group_mean_advantage
from sparkjoy.frontier.cost import timed
from sparkjoy_lab.bench.models import Model
from sparkjoy_lab.training.flags import refuse_idle
from sparkjoy_lab.training.stopping import Terminated

if TYPE_CHECKING:
    from sparkjoy.integrations.transformers import SharedTokens

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
    trust_remote_code: bool = False
    """Run Python code that comes with the model, which may do anything that you may."""
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
        own = (self.model not in get_args(Model), "a model of your own")
        refuse_idle(self, {"temperature": own, "trust_remote_code": own})


class Sampled(NamedTuple):
    """A batch to take a step on: what `sj.frontier` takes, and the answers with their rewards."""

    log_prob_fn: Callable[[dict[str, Tensor]], Tensor]
    batch: dict[str, Tensor]
    advantages: Tensor
    log_probs: Tensor
    mask: Tensor | None = None
    answers: Sequence[dict[str, Any]] = ()
    sharing: Callable[[dict[str, Tensor]], Tensor] | None = None
    """`log_prob_fn` with shared tokens."""
    seconds: tuple[float, float] | None = None
    """Of sampling, without shared tokens and with them."""
    told: Sequence[str] = ()
    """What to say of it: groups of equal rewards, why tokens cannot be shared."""


def sample(config: OwnModel) -> Sampled:
    """Load the model, let it answer prompts, and reward the answers.

    Raises:
        ValueError: something is missing, cannot be read, or is not what it should be; or all answers to each prompt
            have the same reward.
    """
    if config.prompts is None or config.reward is None:
        raise ValueError(f"--model {config.model}: expected --prompts FILE and --reward FILE.py:FUNCTION too.")
    prompts = read_prompts(Path(config.prompts))
    folder = Path(config.model).absolute()  # the reward may go to another folder
    reward = reward_function(config.reward)
    if len(prompts) < config.prompts_per_step:
        raise ValueError(
            f"--prompts {config.prompts} holds {len(prompts)}; expected --prompts-per-step {config.prompts_per_step} "
            "at least."
        )
    drawn = random.Random(config.seed).sample(prompts, config.prompts_per_step)
    with _users(f"--model {config.model} cannot be loaded"):
        model, tokenizer = _load(config, str(folder) if folder.exists() else config.model)
    torch.manual_seed(config.seed)
    with _users(f"--model {config.model} cannot answer"):
        shared, told = _shared_tokens(model, config.temperature)
        prompted = [row["prompt"] for row in drawn]
        tokens, attention, mask, seconds = _answers(config, model, tokenizer, prompted, shared)
        written = [
            tokenizer.decode(row[valid], skip_special_tokens=True)
            for row, valid in zip(tokens[:, -mask.shape[1] :], mask, strict=True)
        ]
    copies = [copy.deepcopy(row) for row in drawn for _ in range(config.group_size)]  # a reward may write to them
    columns = {name: [row[name] for row in copies] for name in drawn[0]}
    chat = isinstance(drawn[0]["prompt"], list)
    completions = [[{"role": "assistant", "content": text}] if chat else text for text in written]
    rewards = _rewards(config.reward, reward, columns.pop("prompt"), completions, columns)
    advantages = group_mean_advantage(rewards, config.group_size)
    if not bool(advantages.any()):
        raise ValueError(
            f"all answers to each of {len(drawn)} prompts have the same reward (on the mean {rewards.mean():.3g}), so "
            "there is nothing to learn from them; try more prompts, or a task that the model can half do."
        )
    silent = int((advantages.view(-1, config.group_size) == 0).all(dim=1).sum())
    told.append(f"{silent} of {len(drawn)} prompts have answers of equal rewards, which teach nothing.")
    answers = [
        {"prompt": drawn[index // config.group_size]["prompt"], "completion": text, "reward": float(rewards[index])}
        for index, text in enumerate(written)
    ]
    log_prob_fn = _log_prob_function(model, mask.shape[1], config.temperature)
    batch = {"tokens": tokens, "attention": attention, "positions": (attention.cumsum(1) - 1).clamp(min=0)}
    batch["prompt"] = torch.arange(len(drawn), device=tokens.device).repeat_interleave(config.group_size)
    with torch.no_grad(), _users(f"--model {config.model} cannot read its answers"):
        parts = [
            log_prob_fn({name: value[start : start + READ_AT_ONCE] for name, value in batch.items()})
            for start in range(0, len(tokens), READ_AT_ONCE)
        ]
    sharing = None if shared is None else _sharing_function(shared, mask.shape[1])
    log_probs, advantages = torch.cat(parts), advantages.to(tokens.device)
    return Sampled(log_prob_fn, batch, advantages, log_probs, mask, answers, sharing, seconds, told)


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, each with a "prompt" and the same other columns.

    Raises:
        ValueError: it cannot be read, holds none, or a line is no such object.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # with a byte order mark, or without
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts {path}: cannot be read as UTF-8 text ({error}).") from None
    lines = {number: line for number, line in enumerate(text.split("\n"), 1) if line.strip()}  # U+2028 ends no line
    if not lines:
        raise ValueError(f"--prompts {path}: expected at least one prompt, a line each.")
    if path.suffix not in (".jsonl", ".json"):
        return [{"prompt": line} for line in lines.values()]
    rows: list[dict[str, Any]] = []
    for number, line in lines.items():
        where = f"--prompts {path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: no JSON ({error}); expected an object a line.") from None
        if not isinstance(row, dict) or not _is_prompt(row.get("prompt")):
            raise ValueError(
                f'{where}: expected an object with a "prompt", a text or a list of {{"role": ..., "content": ...}}.'
            )
        if not row.keys().isdisjoint(("prompts", "completions")):
            raise ValueError(f'{where}: a reward is called with "prompts" and "completions" anyway; rename the column.')
        first = rows[0] if rows else row
        if row.keys() != first.keys() or type(row["prompt"]) is not type(first["prompt"]):
            raise ValueError(f"{where}: other columns than in the first; expected the same.")
        rows.append(row)
    return rows


def _is_prompt(value: Any) -> bool:
    of_turns = isinstance(value, list) and all(isinstance(turn, dict) and "role" in turn for turn in value)
    return isinstance(value, str) or (of_turns and bool(value))


def reward_function(named: str) -> Callable[..., Any]:
    """The function that FILE.py:FUNCTION names.

    Raises:
        ValueError: there is none, or the file cannot be run.
    """
    file, _, name = named.rpartition(":")
    path = Path(file)
    if not file or not path.is_file():
        raise ValueError(f"--reward {named}: no file {file or named!r}; expected FILE.py:FUNCTION.")
    taken = not path.stem.isidentifier() or path.stem in sys.modules or importlib.util.find_spec(path.stem) is not None
    spec = importlib.util.spec_from_file_location(f"reward_file_{path.stem}" if taken else path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--reward {named}: {file} is no Python file; expected FILE.py:FUNCTION.")
    module, folder = importlib.util.module_from_spec(spec), str(path.parent.absolute())
    sys.modules[spec.name] = module  # where pickle and dataclasses look for what it defines
    sys.path.insert(0, folder)  # modules beside it, as for a file that Python runs
    try:
        with _users(f"--reward {named}: {file} does not run"):
            spec.loader.exec_module(module)
    except ValueError:
        sys.modules.pop(spec.name, None)
        raise
    finally:
        with contextlib.suppress(ValueError):  # it may have been at work there itself
            sys.path.remove(folder)
    sys.path.append(folder)  # what it imports when called; last, so that it hides nothing from anybody
    function: Any = vars(module).get(name)
    if not callable(function):
        raise ValueError(f"--reward {named}: {file} has no function {name!r}.")
    return function  # type: ignore[no-any-return]  # whatever is in the file


def _load(config: OwnModel, name: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()  # the command has one
    set_verbosity_error()
    trust = {"trust_remote_code": config.trust_remote_code}  # None would ask whoever sits there
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", **trust)
    model, found = AutoModelForCausalLM.from_pretrained(
        name, dtype=torch.bfloat16 if config.bfloat16 else torch.float32, output_loading_info=True, **trust
    )
    if found["missing_keys"]:
        lacking = sorted(found["missing_keys"])
        raise ValueError(f"it has no weights for {lacking[0]} and {len(lacking) - 1} more, which would be random")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError("its tokenizer has neither a padding nor an end token")
    return model.to(config.device).eval(), tokenizer  # dropout would be taken for an error of the gates


@contextmanager
def _users(failure: str) -> Iterator[None]:
    """What goes wrong inside is the user's own, whatever it is: a ValueError that names it."""
    try:
        yield
    except (KeyboardInterrupt, Terminated, MemoryError, torch.OutOfMemoryError):
        raise
    except BaseException as error:  # SystemExit among them
        if "trust_remote_code" in str(error):
            error = ValueError("it has Python code of its own, which only --trust-remote-code runs")
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        said = textwrap.shorten(str(error), 240, placeholder=" ...").rstrip(".")
        raise ValueError(f"{failure} ({kind}{said}).") from error


def _answers(
    config: OwnModel, model: Any, tokenizer: Any, prompts: list[Any], shared: SharedTokens | None
) -> tuple[Tensor, Tensor, Tensor, tuple[float, float]]:
    """Tokens (B, P + T), prompts padded to the left; what to attend to, likewise; the answers' mask (B, T); seconds."""
    from transformers import GenerationConfig

    texts = prompts
    if isinstance(prompts[0], list):
        texts = [tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False) for turns in prompts]
    read = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=texts is prompts).to(config.device)
    if not bool(read["attention_mask"].any(1).all()):
        raise ValueError("its tokenizer makes no token of one of the prompts")
    largest, known = max(int(read["input_ids"].max()), tokenizer.pad_token_id), model.get_input_embeddings().weight
    if largest >= len(known):
        raise ValueError(f"its tokenizer gives a token {largest}, and the model knows {len(known)}")
    length, limit = read["input_ids"].shape[1], getattr(model.config, "max_position_embeddings", None)
    if limit is not None and length + config.max_new_tokens > limit:
        raise ValueError(
            f"--max-new-tokens {config.max_new_tokens}: with prompts of up to {length} tokens that is more than the "
            f"{limit} that {config.model} can read."
        )
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    ends = ends if isinstance(ends, list) else [ends] if ends is not None else []
    model.generation_config = GenerationConfig(  # the policy itself: nothing of what the model's authors cut off
        do_sample=True,
        temperature=config.temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=config.max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id,
    )
    ids, valid = (read[name].repeat_interleave(config.group_size, 0) for name in ("input_ids", "attention_mask"))
    device = torch.device(config.device)
    took, tokens = timed(lambda: model.generate(input_ids=ids, attention_mask=valid), device)
    once = took
    if shared is not None:
        torch.manual_seed(config.seed)
        once, _ = timed(partial(shared.generate, ids, valid), device)
    answers = tokens[:, length:]
    ended = torch.isin(answers, torch.tensor(ends, dtype=answers.dtype, device=answers.device))
    mask = ended.cumsum(1) - ended.int() == 0  # up to the first end, and with it
    return tokens, torch.cat([valid, mask.long()], dim=1), mask, (took, once)


def _rewards(
    named: str, reward: Callable[..., Any], prompts: list[Any], completions: list[Any], columns: dict[str, list[Any]]
) -> Tensor:
    count = len(completions)
    with _users(f"--reward {named} failed"):
        given = reward(prompts=prompts, completions=completions, **columns)
        given = asyncio.run(given) if inspect.iscoroutine(given) else given
    try:
        values = [] if isinstance(given, str | bytes | Mapping | Set) else list(given)
        rewards = torch.tensor([float(value) for value in values if not isinstance(value, str | bytes)])
        if len(rewards) < len(values) or not values:
            raise TypeError
    except Exception:  # a generator of the user's may raise anything
        raise ValueError(f"--reward {named} returned {given!r:.80}; expected a list of numbers.") from None
    if len(rewards) != count or not bool(rewards.isfinite().all()):
        raise ValueError(
            f"--reward {named} returned {len(rewards)} numbers, {int(rewards.isfinite().sum())} of them finite; "
            f"expected one for each of {count} completions."
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


def _shared_tokens(model: Any, temperature: float) -> tuple[SharedTokens | None, list[str]]:
    """What shares the model's tokens, or why nothing can."""
    from sparkjoy.integrations.transformers import SharedTokens

    try:
        return SharedTokens(model, temperature=temperature), []
    except ValueError as error:
        return None, [str(error)]


def _sharing_function(shared: SharedTokens, length: int) -> Callable[[dict[str, Tensor]], Tensor]:
    def sharing(rows: dict[str, Tensor]) -> Tensor:
        scored = rows["attention"].clone()
        scored[:, :-length] = 0
        return shared.log_probs(rows["tokens"], rows["attention"], scored)[:, -length:]

    return sharing
