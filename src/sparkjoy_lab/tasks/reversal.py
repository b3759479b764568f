"""Token reversal: a prompt of H tokens, an answer that must be its reverse, a reward for how much is right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparkjoy.baselines import group_mean_advantage
from sparkjoy_lab.policies.transformer import Transformer
from sparkjoy_lab.tasks.frictions import DelayKind, Frictions
from sparkjoy_lab.tasks.rollouts import Rollout
from sparkjoy_lab.training.memory import FLOAT, TRAINED, check_memory
from sparkjoy_lab.training.processes import WHOLE, Share

Credit = Literal["answer", "token"]
Shaping = Literal["fraction", "first-error", "all-or-nothing"]


@dataclass(frozen=True)
class ReversalConfig:
    """The papers' protocol (arXiv 2603.14608 and 2603.20526): 10 tokens of 2, 10 answers to each of 10 prompts."""

    prompt_length: int = 10
    """H, tokens of a prompt and of an answer."""
    vocab_size: int = 2
    """M, different tokens."""
    target: Literal["reverse", "copy", "increment"] = "reverse"
    """The right answer: the prompt backwards, the prompt, or every token plus one modulo M."""
    shaping: Shaping = "fraction"
    """Reward: fraction of right positions, of those before the first wrong one, or 1 only if all are right."""
    credit: Credit = "answer"
    """Whose reward a token's advantage counts: the whole answer's, or, with shaping by fraction, its own position's."""
    prompts: int = 10
    """Prompts drawn a step."""
    answers: int = 10
    """Answers drawn to each prompt; their mean reward is its baseline."""
    held_out: int = 1000
    """Fixed prompts to measure the error on."""
    layers: int = 3
    """Blocks of the transformer."""
    width: int = 64
    """Width of the transformer."""
    heads: int = 4
    """Attention heads; they divide the width."""
    feed_forward: int = 128
    """Width of the feed-forward parts."""
    delay: int = 0
    """Steps that the weights which sample may be old."""
    delay_kind: DelayKind = "uniform"
    """Which weights sample: any of the last delay + 1, drawn anew every step, or the oldest of them."""
    bug: float = 0.0
    """Chance that an answer is replaced by zeros, recorded at log-prob 0."""
    corrupt: float = 0.0
    """Chance that a reward is replaced by a fair coin of 0 and 1."""
    discover: float = 0.0
    """Chance that an answer is replaced by the right one, recorded at log-prob 0."""

    def __post_init__(self) -> None:
        for name in ("prompt_length", "prompts", "answers", "held_out", "layers", "width", "heads", "feed_forward"):
            _check_at_least(1, name, getattr(self, name))
        _check_at_least(2, "vocab_size", self.vocab_size)
        _check_one_of(("reverse", "copy", "increment"), "target", self.target)
        _check_one_of(("fraction", "first-error", "all-or-nothing"), "shaping", self.shaping)
        _check_one_of(("answer", "token"), "credit", self.credit)
        if self.credit == "token" and self.shaping != "fraction":
            raise ValueError("--credit token: expected --shaping fraction; no other reward is a sum over positions.")
        if self.width % self.heads:
            raise ValueError(f"--width {self.width}: expected a multiple of --heads {self.heads}.")
        if self.credit == "token" and self.corrupt:
            raise ValueError(
                f"--corrupt {self.corrupt} replaces the reward of a whole answer; expected --credit answer."
            )
        self._check_memory()

    @property
    def frictions(self) -> Frictions:
        """The last five fields."""
        return Frictions(self.delay, self.delay_kind, self.bug, self.corrupt, self.discover)

    def _check_memory(self) -> None:
        """By weights and their moments, and the keys of the answers that are sampled side by side."""
        block = 4 * self.width**2 + 2 * self.width * self.feed_forward
        weights = self.layers * block + (self.vocab_size + 2 * self.prompt_length) * self.width
        answers = max(self.held_out, self.prompts * self.answers) * self.prompt_length
        names = ("prompt_length", "vocab_size", "prompts", "answers", "held_out", "layers", "width", "feed_forward")
        flags = " ".join(f"--{name.replace('_', '-')} {getattr(self, name)}" for name in names)
        old = FLOAT * weights * self.frictions.delay
        check_memory(
            TRAINED * weights + old + FLOAT * answers * self.layers * self.width, f"{flags} --delay {self.delay}"
        )


class ReversalTask:
    """Prompts of random tokens, and the reward for writing them backwards.

    >>> task = ReversalTask(ReversalConfig(prompt_length=4, vocab_size=9))
    >>> prompts = torch.tensor([[1, 2, 3, 4]])
    >>> task.target(prompts), task.reward(prompts, torch.tensor([[4, 3, 2, 2]]))
    (tensor([[4, 3, 2, 1]]), tensor([0.7500]))

    Args:
        config: sizes and the protocol.
        share: this process's part of every batch.

    Raises:
        ValueError: the processes cannot divide the prompts evenly.
    """

    name = "reversal"
    samples_with_graph = False

    def __init__(self, config: ReversalConfig, share: Share = WHOLE) -> None:
        if config.prompts % share.count:
            raise ValueError(
                f"--prompts {config.prompts}: expected a multiple of the {share.count} processes, so that each samples "
                f"as many; for instance {share.count * -(-config.prompts // share.count)}."
            )
        self.config = config
        self.frictions = config.frictions
        self.share = share
        self._held_out = self.sample(config.held_out, torch.Generator().manual_seed(0))

    def policy(self) -> Transformer:
        """A transformer of the config's sizes."""
        config = self.config
        return Transformer(
            config.vocab_size,
            positions=2 * config.prompt_length - 1,
            layers=config.layers,
            width=config.width,
            heads=config.heads,
            feed_forward=config.feed_forward,
        )

    def draft_policy(self) -> Transformer:
        """A transformer of one layer, half as wide and with one head."""
        config = self.config
        width = max(1, config.width // 2)
        positions = 2 * config.prompt_length - 1
        return Transformer(config.vocab_size, positions, layers=1, width=width, heads=1, feed_forward=width)

    def actions(self, rows: dict[str, Tensor]) -> Tensor:
        """The answers (n, H) of rows."""
        return rows["answers"]

    def recurring(self) -> None:
        """No prompt is meant to come again."""

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Prompts (count, H), every token drawn uniformly."""
        return torch.randint(self.config.vocab_size, (count, self.config.prompt_length), generator=generator)

    def target(self, prompts: Tensor) -> Tensor:
        """The right answers to `prompts` (B, H): (B, H)."""
        if self.config.target == "reverse":
            return prompts.flip(1)
        if self.config.target == "increment":
            return (prompts + 1) % self.config.vocab_size
        return prompts

    def reward(self, prompts: Tensor, answers: Tensor) -> Tensor:
        """Reward (B,) in [0, 1] of `answers` (B, H) to `prompts` (B, H)."""
        right = answers == self.target(prompts)
        if self.config.shaping == "all-or-nothing":
            return right.all(dim=1).float()
        if self.config.shaping == "first-error":
            right = right.int().cumprod(dim=1)
        return right.float().mean(dim=1)

    def rollout(self, policy: Transformer, generator: torch.Generator, graph: bool) -> Rollout:
        """Draw prompts, and several answers to each from the policy.

        Every process draws the same numbers, and samples its share of the prompts with its share of them: what all have
        together is what one process would have.

        Raises:
            ValueError: `graph` asked for; the sampler has no graph to give.
        """
        if graph:
            raise ValueError(
                "reversal's sampler keeps no graph; differentiate policy.log_probs(rollout.batch) instead."
            )
        config, share = self.config, self.share
        prompts = self.sample(config.prompts, generator)[share.rows(config.prompts)]
        noise = policy.noise(config.prompt_length, config.prompts * config.answers, generator)
        noise = noise[:, share.rows(noise.shape[1])]
        answers, log_probs = policy.sample(prompts, config.answers, config.prompt_length, noise=noise)
        prompts = prompts.repeat_interleave(config.answers, 0)
        answers, log_probs = self.frictions.answers(answers, log_probs, self.target(prompts), generator, share)
        rewards = self.frictions.rewards(self.reward(prompts, answers), generator, share)
        advantages = group_mean_advantage(rewards, config.answers)
        if config.credit == "token":
            right = (answers == self.target(prompts)).float().view(-1, config.answers, config.prompt_length)
            advantages = ((right - right.mean(dim=1, keepdim=True)) / config.prompt_length).flatten(0, 1)
        index = torch.arange(len(prompts) // config.answers).repeat_interleave(config.answers)
        batch = {"prompts": prompts, "answers": answers, "prompt_index": index}
        return Rollout(
            batch, advantages, log_probs, None, rewards.mean(), config.answers, foreign=self.frictions.foreign
        )

    def trim(self, rows: dict[str, Tensor], length: int) -> dict[str, Tensor]:
        """Rows of a batch with their answers cut to the first `length` tokens."""
        return {**rows, "answers": rows["answers"][:, :length]}

    def error(self, policy: Transformer) -> float:
        """Fraction of wrong tokens in one sampled answer to each of the fixed prompts, the same draws every time."""
        generator = torch.Generator().manual_seed(1)
        answers, _ = policy.sample(self._held_out, 1, self.config.prompt_length, generator)
        return float((answers != self.target(self._held_out)).float().mean())


def _check_at_least(least: int, name: str, value: int) -> None:
    if value < least:
        raise ValueError(f"--{name.replace('_', '-')} {value}: expected at least {least}.")


def _check_one_of(choices: tuple[str, ...], name: str, value: str) -> None:
    if value not in choices:
        raise ValueError(f"--{name} {value}: expected one of {', '.join(choices)}.")
