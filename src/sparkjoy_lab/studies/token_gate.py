"""Why gating single tokens learns so much more slowly than gating whole answers, on token reversal.

Beside the error, fresh rollouts show now and then which tokens each gate keeps and where its gradient points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from sparkjoy.gates import KondoGate
from sparkjoy.losses import delightful
from sparkjoy.scores import delight
from sparkjoy.step.backward import GatedBackward
from sparkjoy_lab.studies.drawing import draw, legend, panels, styles
from sparkjoy_lab.studies.frames import grouped
from sparkjoy_lab.studies.study import Rows, Study, Work
from sparkjoy_lab.tasks.reversal import Credit, ReversalConfig, ReversalTask
from sparkjoy_lab.tasks.rollouts import Rollout
from sparkjoy_lab.training.building import build_step
from sparkjoy_lab.training.loop import Training
from sparkjoy_lab.training.settings import Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ARMS: dict[str, tuple[dict[str, Any], Credit]] = {
    "answers, 3%": ({"rate": 0.03}, "answer"),
    "tokens, 3%": ({"rate": 0.03, "unit": "token"}, "answer"),
    "tokens, 10%": ({"rate": 0.1, "unit": "token"}, "answer"),
    "tokens, 30%": ({"rate": 0.3, "unit": "token"}, "answer"),
    "tokens, price 0": ({"price": 0.0, "unit": "token"}, "answer"),
    "tokens, 3%, credit by position": ({"rate": 0.03, "unit": "token"}, "token"),
    "answers, 3%, credit by position": ({"rate": 0.03}, "token"),
}


@dataclass(frozen=True)
class TokenGateStudy(Study):
    """Gating single tokens against gating whole answers, on token reversal: what is kept, and where it leads."""

    trains = False
    keeps_records = True
    folder = "Folder for records.jsonl, summary.json and the figure; written when everything is measured."

    prompt_length: int = 10
    """H, tokens of a prompt and of an answer."""
    steps: int = 1_000
    """Optimizer steps a run."""
    evaluate_every: int = 25
    """Steps between evaluations and probes."""
    learning_rate: float = 1e-3
    """Adam's learning rate."""
    seeds: tuple[int, ...] = (0, 1)
    """One run of every arm for each."""

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ValueError("--seeds: expected at least one.")
        ReversalConfig(prompt_length=self.prompt_length)
        self.settings({}, 0)

    def settings(self, arm: dict[str, Any], seed: int) -> Settings:
        """One run; solved, it stops."""
        return Settings(
            learning_rate=self.learning_rate,
            steps=self.steps,
            evaluate_every=self.evaluate_every,
            seed=seed,
            until_error=0.01,
            **arm,
        )

    def run(self, work: Work) -> Rows:
        """One record an evaluation, with what the probe saw.

        Returns:
            Records: arm, seed, step, error, reward, surprisal (mean, nats a token), right_kept and right_all (fraction
            of kept and of all tokens that are right), position_kept (mean position of kept tokens, 0 to 1), rows_kept
            (fraction), tied (fraction of tokens with exactly the score at the cut), cosine_full and cosine_dg (of this
            gate's gradient to the full policy gradient's and DG's).
        """
        torch.set_num_threads(1)
        rows: Rows = []
        jobs = [(name, seed) for name in ARMS for seed in self.seeds]
        for number, (name, seed) in enumerate(jobs):
            arm, credit = ARMS[name]
            task = ReversalTask(ReversalConfig(prompt_length=self.prompt_length, credit=credit))
            training = Training(task, self.settings(arm, seed))
            generator = torch.Generator().manual_seed(10_000 + seed)
            while not training.finished:
                training.step()
                if training.steps_done % self.evaluate_every == 0:
                    record = training.evaluate()
                    seen = {"arm": name, "seed": seed, **{key: record[key] for key in ("step", "error", "reward")}}
                    rows.append({**seen, **probe(training, task, generator)})
                    done = number + training.steps_done / self.steps
                    work.progress(done / len(jobs), f"{name}, seed {seed}: error {100 * record['error']:.1f}%")
        return rows

    def summary(self, rows: Rows) -> dict[str, Any]:
        return {"runs": [of_run[-1] for of_run in grouped(rows, "arm", "seed").values()]}

    def tables(self, rows: Rows) -> dict[str, pd.DataFrame]:
        last = pd.DataFrame(self.summary(rows)["runs"]).set_index(["arm", "seed"])
        shown = {"error %": [f"{100 * error:.1f}" for error in last["error"]], "steps": last["step"]}
        return {"where each run ended": pd.DataFrame(shown, index=last.index)}

    def figures(self, rows: Rows) -> dict[str, Figure]:
        return {"tokens": plot(rows)}


def probe(training: Training, task: ReversalTask, generator: torch.Generator) -> dict[str, float]:
    """What the gate of `training` keeps of a fresh rollout of four times the prompts, and where its gradient points."""
    policy = training.policy
    rollouts = [task.rollout(policy, generator, graph=False) for _ in range(4)]
    right, kept, positions, rows, tied = [], [], [], [], []
    cosines: dict[str, list[float]] = {"cosine_full": [], "cosine_dg": []}
    for rollout in rollouts:
        own = _gradient(build_step(training.settings, generator, task.trim), training, rollout)
        for key, dense in (("cosine_full", GatedBackward(None)), ("cosine_dg", GatedBackward(None, loss=delightful()))):
            other = _gradient(dense, training, rollout)
            cosines[key].append(float(torch.cosine_similarity(own, other, dim=0)))
        keep, fraction_tied = _kept_tokens(training, rollout)
        is_right = rollout.batch["answers"] == task.target(rollout.batch["prompts"])
        right.append(is_right.float().mean())
        kept.append(is_right[keep].float().mean() if keep.any() else torch.tensor(torch.nan))
        positions.append(keep.nonzero()[:, 1].float().mean() / max(1, keep.shape[1] - 1))
        rows.append(keep.any(dim=1).float().mean())
        tied.append(torch.tensor(fraction_tied))
    means = {"right_all": right, "right_kept": kept, "position_kept": positions, "rows_kept": rows, "tied": tied}
    surprisal = torch.stack([-rollout.log_probs.mean() for rollout in rollouts]).mean()
    return {
        **{name: float(torch.stack(values).nanmean()) for name, values in means.items()},
        **{name: sum(values) / len(values) for name, values in cosines.items()},
        "surprisal": float(surprisal),
    }


def _gradient(step: Any, training: Training, rollout: Rollout) -> Tensor:
    step(training.policy.log_probs, rollout.batch, rollout.advantages, log_probs=rollout.log_probs)
    parameters = list(training.policy.parameters())
    parts = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
    training.optimizer.zero_grad()
    return torch.cat(parts)


def _kept_tokens(training: Training, rollout: Rollout) -> tuple[Tensor, float]:
    """(B, T) of the tokens in a kept term, and the fraction of units whose score is exactly that at the cut."""
    settings = training.settings
    score = delight(rollout.advantages, rollout.log_probs)
    units = score.flatten() if settings.unit == "token" else score.sum(dim=1)
    decision = KondoGate(settings.gate_rate, settings.price)(units)
    tied = 0.0 if decision.price is None else float((units == decision.price).float().mean())
    keep = decision.keep.view_as(score) if settings.unit == "token" else decision.keep.unsqueeze(1).expand_as(score)
    return keep, tied


def plot(rows: Rows) -> Figure:
    """Error, what is kept, and where the gradient points, against steps: means over seeds."""
    measures = {
        "error": "error",
        "surprisal": "surprisal of a token, nats",
        "right_kept": "right tokens among the kept",
        "cosine_full": "cosine to the full gradient",
        "cosine_dg": "cosine to DG's gradient",
        "position_kept": "position kept (0 first, 1 last)",
    }
    means = pd.DataFrame(rows).groupby(["arm", "step"], sort=False)[list(measures)].mean().reset_index()
    style = styles(means["arm"])
    figure, axes = panels(2, 3, 3.0)
    for axis, (key, label) in zip(axes, measures.items(), strict=True):
        for arm, of_arm in means.sort_values("step", kind="stable").groupby("arm", sort=False):
            draw(axis, of_arm["step"], of_arm[key], style[str(arm)])
        axis.set_title(label, fontsize="medium")
    figure.supxlabel("optimizer steps; a run ends at 1% error; grey: with credit by position", fontsize="medium")
    legend(figure, axes[0])
    return figure
