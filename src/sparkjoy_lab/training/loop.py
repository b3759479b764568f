"""Train a policy on a task, evaluate now and then, and survive being killed.

A run is one folder: config.json, records.jsonl (one object per evaluation), summary.json, and checkpoint.pt, from which
a killed run goes on to the same records and weights it would have had.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from sparkjoy.coverage import Coverage
from sparkjoy.step.report import BackwardReport
from sparkjoy_lab.drafts.drafted import DraftedBackward
from sparkjoy_lab.flops import CountedFlops, FlopCount
from sparkjoy_lab.tasks.frictions import Actors
from sparkjoy_lab.tasks.rollouts import Rollout, Task
from sparkjoy_lab.token_gate import TokenGatedBackward
from sparkjoy_lab.training.building import build_step
from sparkjoy_lab.training.checkpoint import save_checkpoint
from sparkjoy_lab.training.processes import WHOLE, LogProbs, Share
from sparkjoy_lab.training.restoring import check_state, found_state
from sparkjoy_lab.training.screening import screener
from sparkjoy_lab.training.settings import Settings
from sparkjoy_lab.training.stopping import Stopping
from sparkjoy_lab.training.tally import Tally
from sparkjoy_lab.training.tracking import write_json, write_json_lines

Record = dict[str, Any]
OnStep = Callable[[int, Record | None], None]
"""Called after every step with its number and the last record, None before the first."""

CHECKPOINT_SECONDS = 10.0
PATIENCE = 1_000
"""Rows of a class, all skipped, before it may be called lost: a few hundred come and go while a policy starts."""


class Training:
    """The state of one run, step by step.

    Args:
        task: what to train on.
        settings: how.
        share: this process's part of every batch; the task's is the same.
    """

    def __init__(self, task: Task, settings: Settings, share: Share = WHOLE) -> None:
        self.task = task
        self.settings = settings
        self.share = share
        self.generator = torch.Generator().manual_seed(settings.seed)
        torch.manual_seed(settings.seed)
        self.policy = task.policy()
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=settings.learning_rate, fused=True)
        self.own_forward: Callable[[Any], Tensor] = self.policy.log_probs
        if share.count > 1:
            self.own_forward = DistributedDataParallel(LogProbs(self.policy))
        draft = screener(settings, settings.seed, task, self.policy)
        self.flops = CountedFlops()
        self.backward = build_step(settings, self.generator, task.trim, draft, share, self.own_forward, self.flops)
        # The strongest dense loop differentiates the forward pass that sampled, instead of running a second one.
        undivided = settings.micro_batch_size is None and settings.updates == 1 and share.count == 1
        self.differentiates_rollout = task.samples_with_graph and not settings.gated and undivided
        self.differentiates_rollout &= not task.frictions.foreign
        if task.frictions.foreign and settings.unit == "token":
            raise ValueError("--unit token decides on its own log-probs; expected no --delay, --bug or --discover.")
        self.actors = Actors(self.policy, task.frictions) if task.frictions.delay else None
        self.coverage = Coverage(PATIENCE)
        self.tally = Tally()
        self.steps_done = 0
        self.records: list[Record] = []
        self._rollout_flops: int | None = None

    def step(self) -> None:
        """One rollout; per update one backward step on what is kept, and one optimizer step unless nothing is."""
        start = time.perf_counter()
        rollout = self._rollout()
        sampled = time.perf_counter()
        advantages = self._advantages(rollout)
        log_prob_fn = (lambda _: rollout.log_probs) if self.differentiates_rollout else self.own_forward
        # What others recorded is a ratio's denominator; surprisal is the learner's own.
        decides = self.settings.screen == "recorded" or (self.settings.screen == "sampler" and not rollout.foreign)
        known: dict[str, Any] = {"log_probs" if decides else "behavior_log_probs": rollout.log_probs}
        for _ in range(self.settings.updates):
            report = self.flops.counted(
                self.backward, log_prob_fn, rollout.batch, advantages, mask=rollout.mask, **known
            )
            if not isinstance(self.backward, TokenGatedBackward):  # what the plan of the next step goes by
                ratio = self.flops.backward_over_forward
                self.backward.backward_over_forward = ratio or self.backward.backward_over_forward
            if report.kept:
                before = time.perf_counter()
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.tally.seconds["optimizer"] += time.perf_counter() - before
            drafting = self.backward.drafting if isinstance(self.backward, DraftedBackward) else None
            self.tally.stepped(report, self.flops, drafting, self.differentiates_rollout)
        self._watch(rollout, advantages, report)
        if self.actors is not None:
            self.actors.follow()
        self.steps_done += 1
        self.tally.seconds["sample"] += sampled - start
        self.tally.seconds["total"] += time.perf_counter() - start

    def evaluate(self) -> Record:
        """A record of the run so far, of all processes.

        Raises:
            ValueError: the weights are no longer finite.
        """
        self.check_finite()
        self.tally.hand_over(self.share)
        self.records.append(self.share.broadcast(self._record() if self.share.first else None))
        return self.records[-1]

    def check_finite(self) -> None:
        """Raise a ValueError where a weight is not finite: there is nothing to go on from."""
        if not all(bool(parameter.isfinite().all()) for parameter in self.policy.parameters()):
            raise self._diverged()

    def _record(self) -> Record:
        settings = self.settings
        self.policy.eval()
        error = self.task.error(self.policy)
        self.policy.train()
        return {
            "task": self.task.name,
            "method": settings.method,
            "score": settings.score if settings.method == "kondo" else None,
            "rate": settings.gate_rate,
            "seed": settings.seed,
            "step": self.steps_done,
            "error": error,
            "lost": self.coverage.lost if self.coverage.parts else None,
            **self.tally.record(),
        }

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or the error to stop at is reached."""
        until = self.settings.until_error
        reached = until is not None and bool(self.records) and self.records[-1]["error"] <= until
        return reached or self.steps_done >= self.settings.steps

    def state_dict(self) -> dict[str, Any]:
        return {
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "torch_random_state": torch.get_rng_state(),
            "backward": self.backward.state_dict(),
            "flops": self.flops.state_dict(),
            "actors": {} if self.actors is None else self.actors.state_dict(),
            "coverage": self.coverage.state_dict(),
            "tally": self.tally.state_dict(),
            "rollout_flops": self._rollout_flops,
            "steps_done": self.steps_done,
            "records": self.records,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; where it is refused, this object is of no more use.

        Raises:
            ValueError: it is not the state of such a run.
        """
        try:
            check_state(state, self.state_dict(), list(self.policy.parameters()), self.settings)
            self.policy.load_state_dict(state["policy"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.generator.set_state(state["generator"])
            torch.set_rng_state(state["torch_random_state"])
            self.backward.load_state_dict(state["backward"])
            self.flops.load_state_dict(state["flops"])
            if self.actors is not None:
                self.actors.load_state_dict(state["actors"])
            self.coverage.load_state_dict(state["coverage"])
            if self.share.first:  # it has the counts of all
                self.tally.load_state_dict(state["tally"])
        except Exception as error:  # whatever a state of another kind breaks
            raise ValueError(f"the checkpoint does not fit this run: {error}. Give another --out.") from None
        self._rollout_flops = state["rollout_flops"]
        self.steps_done = state["steps_done"]
        self.records = state["records"]

    def _advantages(self, rollout: Rollout) -> Tensor:
        """What the method makes of the advantages of the whole batch, for this process's rows."""
        whole = self.settings.advantages(self.share.all_gather(rollout.advantages), rollout.group_size)
        return whole[self.share.rows(len(whole))]

    def _watch(self, rollout: Rollout, advantages: Tensor, report: BackwardReport) -> None:
        """Warn of classes of which nothing is kept any more."""
        if rollout.parts is None or not self.settings.gated or self.settings.unit == "token":
            return
        lost = self.coverage.seen(rollout.parts.tolist(), advantages, report.decision.keep)
        if lost:
            run = f"{self.settings.label}, seed {self.settings.seed}, after {self.steps_done} steps"
            warnings.warn(f"{run}: {self.coverage.warning(lost)}", stacklevel=2)

    def _rollout(self) -> Rollout:
        if self._rollout_flops is None:
            with FlopCount() as count:
                rollout = self._sampled()
            # Counted for every rollout to come: more than run where a sampler shares what answers have in common.
            self._rollout_flops = self.share.broadcast(count.flops if self.share.first else None)
        else:
            rollout = self._sampled()
        rows = len(rollout.advantages)
        tokens = rollout.log_probs.numel() if rollout.mask is None else int(rollout.mask.sum())
        self.tally.sampled(rows, tokens, self._rollout_flops, rollout.reward)
        return rollout

    def _sampled(self) -> Rollout:
        try:
            actor = self.policy if self.actors is None else self.actors.draw(self.generator)
            rollout = self.task.rollout(actor, self.generator, self.differentiates_rollout)
        except RuntimeError as error:
            if "probability tensor" not in str(error):  # torch draws from no distribution with a NaN in it
                raise
            raise self._diverged() from None
        if not bool(rollout.log_probs.isfinite().all()):
            raise self._diverged()
        return rollout

    def _diverged(self) -> ValueError:
        return ValueError(
            f"after {self.steps_done} steps the policy gives no finite numbers any more: --learning-rate "
            f"{self.settings.learning_rate:g} is too large for it. What was written before is as it was."
        )


def train(
    task: Task,
    settings: Settings,
    out: Path,
    task_config: dict[str, Any],
    on_step: OnStep | None = None,
    share: Share = WHOLE,
) -> list[Record]:
    """Run to the end, or go on from where a killed run with the same settings stopped.

    Args:
        task: what to train on.
        settings: how.
        out: the run's folder.
        task_config: what the task was built from, for config.json.
        on_step: called after every step.
        share: this process's part, where several train together.

    Returns:
        The records of the run.

    Raises:
        ValueError: the folder cannot be written, or holds a run with other settings.
    """
    torch.set_num_threads(settings.threads)
    config = {"task": task.name, **task_config, **asdict(settings)}
    with ExitStack() as folder, Stopping(enabled=share.count == 1) as stopping:
        state = found_state(folder, out, config, share)
        training = Training(task, settings, share)
        if state is not None:
            training.load_state_dict(state)
        _run(training, out, config, on_step, stopping)
        if share.first:
            write_json_lines(out / "records.jsonl", training.records)
            write_json(out / "summary.json", {"runs": [summary(training.records, settings.target_error)]})
        stopping.end_if_asked()
    return training.records


def _run(training: Training, out: Path, config: dict[str, Any], on_step: OnStep | None, stopping: Stopping) -> None:
    """Step, evaluate and save, to the end or until a signal asks to stop."""
    settings, first = training.settings, training.share.first
    saved_at = time.monotonic()
    while not training.finished:
        training.step()
        record = training.records[-1] if training.records else None
        evaluated = training.steps_done % settings.evaluate_every == 0 or training.steps_done == settings.steps
        if evaluated:
            record = training.evaluate()
            if first:
                write_json_lines(out / "records.jsonl", training.records)
        stop = stopping.asked is not None
        due = evaluated and (training.finished or time.monotonic() - saved_at > CHECKPOINT_SECONDS)
        if first and (due or stop):
            training.check_finite()
            save_checkpoint(out / "checkpoint.pt", training.state_dict(), config)
            saved_at = time.monotonic()
        if on_step is not None:
            on_step(training.steps_done, record)
        if stop and not training.finished:
            stopping.end_if_asked()


def summary(records: list[Record], target_error: float | None) -> Record:
    """The last record of a run, with the first at or below the target error, or None."""
    reached = [record for record in records if target_error is not None and record["error"] <= target_error]
    to_target = None
    if reached:
        first = reached[0]
        to_target = {key: first[key] for key in ("error", "step", "backward_samples", "backward_tokens")}
        to_target["seconds"] = first["seconds"]["total"]
    return {**records[-1], "to_target": to_target}
