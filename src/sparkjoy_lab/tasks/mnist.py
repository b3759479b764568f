"""MNIST as a contextual bandit: an image in, one of ten actions out, reward 1 if it is the label (arXiv 2603.20526)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from sparkjoy.baselines import group_mean_advantage
from sparkjoy_lab.baselines import expected_confidence_advantage
from sparkjoy_lab.policies.mlp import MLP
from sparkjoy_lab.tasks.digits import load_digits
from sparkjoy_lab.tasks.frictions import DelayKind, Frictions
from sparkjoy_lab.tasks.rollouts import Rollout
from sparkjoy_lab.training.memory import FLOAT, TRAINED, check_memory


@dataclass(frozen=True)
class MnistConfig:
    """The papers' protocol, but for the data."""

    data: str = "embedded"
    """embedded (5,000 digits, no download), openml (full set, downloaded once), or a folder of IDX files."""
    batch_size: int = 100
    """Images drawn a step, with replacement."""
    baseline: Literal["expected-confidence", "batch-mean"] = "expected-confidence"
    """What a reward is compared with: the sum of squared action probabilities, or the batch's mean reward."""

    hidden: int = 100
    """Units in each of the two hidden layers; fewer make it harder."""
    label_noise: float = 0.0
    """Fraction of the training images whose label is replaced by a random one, the same ones every time."""
    delay: int = 0
    """Steps that the weights which act may be old."""
    delay_kind: DelayKind = "uniform"
    """Which weights act: any of the last delay + 1, drawn anew every step, or the oldest of them."""
    corrupt: float = 0.0
    """Chance that a reward is replaced by a fair coin of 0 and 1, anew every step."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least 1.")
        if not 0 <= self.label_noise <= 1:
            raise ValueError(f"--label-noise {self.label_noise}: expected a fraction, such as 0.2 for 20%.")
        weights = self.hidden * (784 + self.hidden + 10)
        check_memory(
            TRAINED * weights + FLOAT * (weights * self.frictions.delay + 784 * self.batch_size),
            f"--batch-size {self.batch_size} --hidden {self.hidden} --delay {self.delay}",
        )

    @property
    def frictions(self) -> Frictions:
        """The last three fields."""
        return Frictions(self.delay, self.delay_kind, corrupt=self.corrupt)


class MnistTask:
    """Images of digits, divided by 255, and the reward for naming them.

    >>> task = MnistTask(MnistConfig())
    >>> images, labels = task.sample(3, torch.Generator().manual_seed(0))
    >>> images.shape, task.reward(labels, labels)
    (torch.Size([3, 784]), tensor([1., 1., 1.]))

    Args:
        config: where the data come from, and the protocol.

    Raises:
        ValueError: data missing or corrupt.
    """

    name = "mnist"
    samples_with_graph = True

    def __init__(self, config: MnistConfig) -> None:
        self.config = config
        self.frictions = config.frictions
        self._digits = load_digits(config.data)
        if config.label_noise:
            generator = torch.Generator().manual_seed(0)
            labels = self._digits.train_labels
            wrong = torch.rand(len(labels), generator=generator) < config.label_noise
            drawn = torch.randint(10, (len(labels),), generator=generator)
            self._digits = replace(self._digits, train_labels=labels.where(~wrong, drawn))
        self._test_inputs = self._digits.test_images.float().div_(255)

    def policy(self) -> nn.Module:
        """An MLP 784-100-100-10, or of other hidden layers."""
        return MLP(784, self.config.hidden, self.config.hidden, 10)

    def draft_policy(self) -> nn.Module:
        """One linear layer, a tenth of the policy's FLOPs."""
        return MLP(784, 10)

    def actions(self, rows: dict[str, Tensor]) -> Tensor:
        """The actions (n,) of rows."""
        return rows["actions"]

    def recurring(self) -> tuple[Callable[[dict[str, Tensor]], Tensor], int]:
        """Keys of image and action, and how many there are."""
        return lambda rows: 10 * rows["examples"] + rows["actions"], 10 * len(self._digits.train_labels)

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images (count, 784) in [0, 1] and labels (count,), drawn with replacement."""
        images, labels, _ = self._draw(count, generator)
        return images, labels

    def _draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        drawn = torch.randint(len(self._digits.train_labels), (count,), generator=generator)
        images = self._digits.train_images.index_select(0, drawn).float().div_(255)
        return images, self._digits.train_labels.index_select(0, drawn), drawn

    def reward(self, labels: Tensor, actions: Tensor) -> Tensor:
        """1 where the action is the label, else 0: (B,)."""
        return (actions == labels).float()

    def rollout(self, policy: nn.Module, generator: torch.Generator, graph: bool) -> Rollout:
        """Draw images, and for each an action from the policy."""
        images, labels, drawn = self._draw(self.config.batch_size, generator)
        with torch.set_grad_enabled(graph):
            every = policy(images).log_softmax(dim=1)
            probabilities = every.detach().exp()
            actions = torch.multinomial(probabilities, 1, generator=generator)
            log_probs = every.gather(1, actions).squeeze(1)
        actions = actions.squeeze(1)
        rewards = self.frictions.rewards(self.reward(labels, actions), generator)
        if self.config.baseline == "batch-mean":
            advantages = group_mean_advantage(rewards)
        else:
            advantages = expected_confidence_advantage(rewards, probabilities)
        batch = {"inputs": images, "actions": actions, "examples": drawn}
        return Rollout(batch, advantages, log_probs, None, rewards.mean(), parts=labels, foreign=self.frictions.foreign)

    def trim(self, rows: dict[str, Tensor], length: int) -> dict[str, Tensor]:
        """The rows as they are: an action is a single token."""
        return rows

    def error(self, policy: nn.Module) -> float:
        """Fraction of test images whose likeliest action is wrong."""
        with torch.no_grad():
            wrong = policy(self._test_inputs).argmax(dim=1) != self._digits.test_labels
        return float(wrong.float().mean())
