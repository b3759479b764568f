"""`sj.frontier` on the user's own language model, or on a decoder of `sparkjoy bench`: behind `sparkjoy frontier`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, get_args

import torch
import tyro

from sparkjoy.frontier import Frontier
from sparkjoy.frontier.measure import frontier
from sparkjoy_lab.bench.models import Model, Workload, build
from sparkjoy_lab.bench.own_model import OwnModel, Sampled, sample

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class FrontierConfig:
    """What to measure, and on what."""

    step: Annotated[OwnModel, tyro.conf.arg(name="")] = field(default_factory=OwnModel)
    noise: float = 0.3
    """The most that gating may add to the noise that the batch has itself."""
    rounds: int | None = None
    """Turns of each setting; left out: at least 3, and as many as fit 20 seconds."""
    known_only: bool = False
    """Leave out the second measurement, without the sampler's log-probs, which takes longer than the first."""
    micro_batch_size: int | None = None
    """Rows per forward and backward pass; left out: the fastest for the dense step."""
    threads: int = 2
    """Threads of torch."""

    def __post_init__(self) -> None:
        if not self.noise > 0:
            raise ValueError(f"--noise {self.noise}: expected a number above 0.")
        for name in ("rounds", "micro_batch_size", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: expected at least 1.")


def run(config: FrontierConfig, progress: Progress) -> tuple[Sampled, dict[str, Frontier]]:
    """The batch, and what gating does to its step with the sampler's log-probs known, and without them.

    Args:
        config: what to measure.
        progress: called with the fraction done and what is going on.

    Raises:
        ValueError: as `sample` and `frontier`.
    """
    torch.set_num_threads(config.threads)
    progress(0.0, "loading, sampling, rewarding")
    step = _random_step(config.step) if config.step.model in get_args(Model) else sample(config.step)
    found: dict[str, Frontier] = {}
    size = config.micro_batch_size
    parts = ("known",) if config.known_only else ("known", "not known")
    for number, name in enumerate(parts):
        found[name] = frontier(
            step.log_prob_fn,
            step.batch,
            step.advantages,
            log_probs=step.log_probs if name == "known" else None,
            mask=step.mask,
            micro_batch_size=size,
            rounds=config.rounds,
            seed=config.step.seed,
            shared=step.sharing,
            group_by=None if step.sharing is None else "prompt",
            sampling_seconds=step.seconds,
            progress=_part(progress, number / len(parts), len(parts), name),
        )
        size = found[name].micro_batch_size
    return step, found


def summary(found: Mapping[str, Frontier], noise: float) -> dict[str, Any]:
    """For summary.json."""
    result = {}
    for name, one in found.items():
        best = one.recommend(noise)
        result[name] = {**asdict(one), "recommended": best.setting.name, "reason": best.reason}
    return result


def plot(found: Mapping[str, Frontier], noise: float) -> Figure:
    """The figures of all, one below the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5 * len(found)), layout="constrained")
    for axis, one in zip(figure.subplots(len(found), squeeze=False).flat, found.values(), strict=True):
        one.draw(axis, noise)
    return figure


def _part(progress: Progress, begin: float, parts: int, name: str) -> Progress:
    """Progress of one of several measurements, in that of all."""
    return lambda done, what: progress(0.1 + 0.9 * (begin + done / parts), f"log-probs {name}, {what}")


def _random_step(config: OwnModel) -> Sampled:
    if config.prompts is not None or config.reward is not None:
        raise ValueError(f"--model {config.model} has random weights; expected neither --prompts nor --reward with it.")
    workload = Workload(
        model=config.model,  # type: ignore[arg-type]  # the caller saw that it is one
        rows=config.group_size * config.prompts_per_step,
        length=config.max_new_tokens,
        bfloat16=config.bfloat16,
        device=config.device,
        seed=config.seed,
    )
    problem = build(workload)
    return Sampled(problem.log_prob_fn, problem.batch, problem.advantages, problem.log_probs)
