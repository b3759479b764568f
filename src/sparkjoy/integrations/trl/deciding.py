"""TRL's GRPOTrainer, deciding: from what TRL leaves in a generation batch to which rows of all processes are kept.

A hard gate ranks by delight, a noise budget by the size of a row's gradient in TRL's loss. All processes decide alike,
each on the numbers of all.
"""

from __future__ import annotations

import random
import time
import warnings
import zlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparkjoy import checks, signs
from sparkjoy.coverage import Coverage
from sparkjoy.gates import Decision, Gate
from sparkjoy.gates.decision import rule_of, weighs
from sparkjoy.integrations.gates import learn_noise, one_gate
from sparkjoy.integrations.sampling import base_of
from sparkjoy.integrations.sizes import DIVIDES_BY_LENGTH, RowSize, score_of_rows
from sparkjoy.integrations.transformers import evaluating, prepends_tokens
from sparkjoy.integrations.trl.advantages import of_the_gate, other_score, worth
from sparkjoy.integrations.trl.config import KondoGRPOConfig
from sparkjoy.integrations.trl.rows import Rows, loss_mask, whole
from sparkjoy.integrations.trl.sharing import SharingMixin
from sparkjoy.noise import expected_noise
from sparkjoy.prefix_tree import fold
from sparkjoy.scores import SCORE, ScoreFunction, delight, reads_log_probs, sign_of_advantage
from sparkjoy.selecting import select_by_score

PATIENCE = 4
"""Groups of completions of a part, all skipped, before it may be called lost."""

PROMPT_LETTERS = 40
"""Of a prompt's name."""


class Scored(NamedTuple):
    """The completions of all processes as the gate sees them.

    Args:
        score: (N,), what it decides on; of a row that is not `known` the sign alone counts.
        worth: (N,), 0 where a row teaches nothing, of the score's sign elsewhere.
        known: (N,) bool, whose score was computed from log-probs.
        screened: how many rows' log-probs were computed to decide.
    """

    score: Tensor
    worth: Tensor
    known: Tensor
    screened: int


class DecidingMixin(SharingMixin):
    """What decides in `KondoGRPOMixin`, which see."""

    def __init__(self, *args: Any, gate: Gate | None = None, score: ScoreFunction | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.args if isinstance(self.args, KondoGRPOConfig) else None
        if config is None and (gate is not None or score is not None):
            raise ValueError("gate and score need a KondoGRPOConfig as args, which says how kept rows are packed.")
        self._gate = one_gate(gate, None if config is None else config.gate())
        self._gate_score = score or delight
        self._gate_dg = None if config is None else config.gate_dg
        if self._gate is not None:
            self.args.refuse_with(self._gate)
        elif config is not None:
            config.refuse_without_a_gate()
        if score is not None:
            self._refuse_score(score)
        self._gate_rewards: Tensor | None = None  # (N, F), of all processes, those of the last completions scored
        self._gate_recorded = False  # whether the sampler's log-probs are those read off its passes
        self._gate_warned = False  # that it ranks by the loss's advantages where it was to rank by centred rewards
        self._gate_expected: float | None = None  # noise that the last decision lets expect, until its rows have run
        # Of this process's prompts, and anew after a resume.
        self._gate_coverage = Coverage(PATIENCE * self.num_generations)
        self._gate_sums = torch.zeros(4, dtype=torch.float64)  # `noise_sums` of what has run since, of this process

    def _refuse_score(self, score: ScoreFunction) -> None:
        checks.function("score", score, SCORE, ..., ...)
        if self._gate is None:
            raise ValueError(f"score={checks.described(score)} is set without a gate: set gate_rate or gate_price.")
        if weighs(self._gate) or self.args.gate_score != "delight":
            raise ValueError(
                f"score={checks.described(score)} is for a gate that is not weighted, instead of gate_score; a noise "
                "budget goes by the size of a row's gradient in TRL's loss."
            )

    def _decide(self, gate: Gate, output: Rows) -> Tensor:
        """(B,) bool: which rows of this process are kept, out of those of all; their weights become a column."""
        start, mask = time.perf_counter(), loss_mask(output)
        # The seed is of the optimizer step and the micro-step in it, so that a resumed run draws the same.
        place = (self.args.seed, self.state.global_step, self._step % self.args.gradient_accumulation_steps)
        if hasattr(gate, "generator"):  # on every process the same
            gate.generator = draws(*place)
        if self._shares:
            cost = fold(*whole(output)).shares
        else:
            cost = output["prompt_mask"].sum(dim=1) + output["completion_mask"].sum(dim=1)
        tokens, costs = self._of_all(torch.stack([mask.sum(dim=1), cost], dim=1).float()).unbind(dim=1)
        self._learn_noise()  # of the decision before, where an optimizer step has several
        sized = weighs(gate)
        scored = self._sizes(output) if sized else self._scores(gate, output, draws(*place))
        decision = select_by_score(gate, scored.score, costs).decision
        if sized:
            self._gate_expected = expected_noise(scored.score, decision.probability)
        output["gate_weight"], keep = self._mine(decision.weight, mask), decision.keep
        found = figures(scored, decision, sized)
        found["screen_seconds"] = time.perf_counter() - start
        found["backward_tokens"] = float(costs[keep].sum())
        found["kept_token_rate"] = float(tokens[keep].sum() / tokens.sum().clamp(min=1))
        for name, value in found.items():
            if value == value:  # not NaN
                self._metrics["train"][f"gate/{name}"].append(value)
        return self._mine(keep, mask)

    def _watch(self, inputs: list[Rows], output: Rows, keep: Tensor) -> None:
        """Log how many parts of the data are lost, and warn when some are."""
        if len(inputs) != len(keep):  # a trainer has made other rows of them
            return
        parts = [part_of(example, self.args.gate_parts) for example in inputs]
        advantages = output["advantages"]
        advantages = advantages * loss_mask(output) if advantages.dim() == 2 else advantages
        lost = self._gate_coverage.seen(parts, advantages.float().cpu(), keep.cpu())
        self._metrics["train"]["gate/lost_parts"].append(float(len(self._gate_coverage.lost)))
        if lost:
            warnings.warn(f"step {self.state.global_step}: {self._gate_coverage.warning(lost)}", stacklevel=2)

    def _mine(self, of_all: Tensor, local: Tensor) -> Tensor:
        """This process's part of what is known of the rows of all."""
        first = self.accelerator.process_index * len(local)
        return of_all[first : first + len(local)].to(local.device)

    # A hard gate

    def _scores(self, gate: Gate, output: Rows, generator: torch.Generator) -> Scored:
        """Delights, or what else a hard gate is to rank by, from as few log-probs as it takes."""
        mask, ratio = loss_mask(output), self._sampler_ratio(output)
        if ratio is not None:
            mask = mask * (ratio != 0)  # TRL has set it to 0 where the loss is to have no term
        advantages = self._gate_advantages(output)
        of_all = self._of_all(worth(advantages, output["advantages"], mask))
        if self.args.gate_score != "delight":
            other = other_score(self.args.gate_score, of_all, generator)
            return Scored(other, of_all, torch.zeros(len(of_all), dtype=torch.bool), 0)
        log_probs, screened = self._log_probs_at_hand(output), 0
        if not reads_log_probs(self._gate_score):
            log_probs = torch.zeros_like(mask, dtype=torch.float32)
        one_sign = log_probs is None and advantages.dim() == 1 and sign_of_advantage(self._gate_score)
        known = signs.undecided(rule_of(gate), of_all) if one_sign else of_all != 0
        rows = self._mine(known, mask).nonzero().flatten()
        if log_probs is None:
            log_probs, screened = self._screen(output, rows), int(known.sum())
        local = torch.zeros(len(mask), device=mask.device)
        if len(rows):
            local[rows] = score_of_rows(self._gate_score, advantages[rows], log_probs[rows], mask[rows]).to(local)
        found = self._of_all(local)
        checks.finite(f"what score={checks.described(self._gate_score)} returned", found)
        return Scored(torch.where(known, found, of_all), of_all, known, screened)

    def _sampler_ratio(self, rows: Rows) -> Tensor | None:
        """(B, T) or (B, 1), what the loss multiplies its terms by; vespo reads it too, but never as a factor."""
        return None if self.loss_type == "vespo" else rows.get("importance_sampling_ratio")

    def _gate_advantages(self, output: Rows) -> Tensor:
        """(B,) or (B, T): the advantages that the gate ranks by, of this process."""
        own: Tensor = output["advantages"]
        advantages, centred = own, False
        if own.dim() == 1:
            of_all = self.accelerator.gather(own)
            options = (self.num_generations, self.scale_rewards, self.multi_objective_aggregation)
            advantages, centred = of_the_gate(of_all, self._gate_rewards, self.reward_weights, *options)
            if centred and self.args.gate_advantages == "trl":
                advantages = of_all.masked_fill(advantages == 0, 0)
            advantages = self._mine(advantages, own)
        if self.args.gate_advantages == "centred":
            self._metrics["train"]["gate/centred"].append(float(centred))
            if not centred and not self._gate_warned:
                self._gate_warned = True
                warnings.warn(
                    "gate_advantages='centred' ranks by reward less its group's mean, and the advantages of this batch "
                    "are not those (GDPO's, of a group answered again or replayed, or shaped by the trainer): the gate "
                    "ranks by the loss's own, whenever that is so. gate_advantages='trl' always does, without a word.",
                    stacklevel=2,
                )
        return advantages

    # A noise budget

    def _sizes(self, output: Rows) -> Scored:
        """By the loss's own advantages always, so that the expected gradient is the loss's.

        Where no log-probs are at hand the size is |advantage| times the root of the length: the few rows kept more than
        by exact sizes cost less than a pass over all.
        """
        log_probs, screened = self._log_probs_at_hand(output), 0
        if log_probs is None and self.args.gate_log_probs == "exact":
            with_terms = self._size_of(output, None) != 0
            log_probs = self._screen(output, with_terms.nonzero().flatten())
            screened = int(self._of_all(with_terms).sum())
        output["gate_size"] = self._size_of(output, log_probs)
        of_all = self._of_all(output["gate_size"])
        return Scored(of_all, of_all, of_all != 0, screened)

    def _size_of(self, rows: Rows, log_probs: Tensor | None) -> Tensor:
        """(B,) the size of each row's gradient in TRL's loss, by log-probs (B, T)."""
        by_length, args = self.loss_type in DIVIDES_BY_LENGTH, self.args
        size = RowSize(by_length, self.beta, args.entropy_coef, self._gate_dg, args.gate_dg_temperature)
        ratio, reference = self._sampler_ratio(rows), rows.get("ref_per_token_logps")
        return size(rows["advantages"], log_probs, loss_mask(rows), ratio, reference)

    def _learn_noise(self) -> None:
        """Once what was kept has run: tell the gate what its draws really added, by exact sizes, and log it."""
        if self._gate_expected is None:
            return
        sums = self._gate_sums
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums.to(self.accelerator.device), reduction="sum")
        noise = learn_noise(self._gate, self._gate_expected, sums.tolist())
        self._metrics["train"]["gate/noise"].append(noise)
        self._gate_expected, self._gate_sums = None, torch.zeros(4, dtype=torch.float64)

    # Log-probs to decide on

    def _log_probs_at_hand(self, output: Rows) -> Tensor | None:
        """(B, T) log-probs that every process has: of TRL's pass over all rows if there was one, else the sampler's."""
        log_probs: Tensor | None = output.get("old_per_token_logps")
        if log_probs is None and self.args.gate_log_probs == "auto" and (self._gate_recorded or self._samples_whole):
            log_probs = output.get("sampling_per_token_logps")
        if not self._everywhere(log_probs is not None) or log_probs is None:
            return None
        return log_probs.nan_to_num(nan=0.0)  # vLLM has NaN where it could not tell: a token without surprise

    @property
    def _samples_whole(self) -> bool:
        """Whether nothing cuts or bends the distribution sampled from, whose log-probs would understate surprisal."""
        cut = self.top_p != 1 or self.top_k not in (0, -1, None) or self.min_p not in (0, None)
        return not cut and self.repetition_penalty == 1 and not self.args.generation_kwargs

    @torch.no_grad()
    def _screen(self, output: Rows, rows: Tensor) -> Tensor:
        """(B, T) log-probs, exact and without a graph, 0 but in `rows`; in eval mode, so without dropout or draws."""
        ids, mask, _ = whole(output)
        prompt = output["prompt_ids"].shape[1]
        log_probs = torch.zeros(len(mask), mask.shape[1] - prompt, device=ids.device)
        tokens = mask.sum(dim=1)
        ordered = rows[tokens[rows].argsort()] if not self._shares else rows  # or prompt by prompt
        parts = [part for part in ordered.split(self.args.per_device_train_batch_size) if len(part)]
        passes = len(parts)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # weights are gathered in a pass: all run as many
            passes = int(self._of_all(torch.tensor([passes], device=ids.device)).max())
        shortest = tokens.argmin(dim=0, keepdim=True)
        with evaluating(self.model):
            for part in parts + [shortest] * (passes - len(parts)):
                present = mask[part].any(dim=0).nonzero().flatten()
                start = min(int(present[0]), prompt - 1) if self._trims_prompts else 0
                stop = max(int(present[-1]), prompt) + 1
                found, _, _ = self._get_per_token_logps_and_entropies(
                    self.model, ids[part, start:stop], mask[part, start:stop], stop - prompt
                )
                if part is not shortest:
                    log_probs[part, : stop - prompt] = found
        return log_probs

    @property
    def _trims_prompts(self) -> bool:
        """Whether the padding left of a prompt can be cut or added: positions are relative, and it is leftmost."""
        model = self.accelerator.unwrap_model(self.model)
        config = base_of(model).config.get_text_config()
        rotates = any(getattr(config, name, None) is not None for name in ("rope_parameters", "rope_theta"))
        return rotates and not prepends_tokens(model)


def draws(*seed: int) -> torch.Generator:
    """The draws of one decision. Its seed is of the run, the step and the place in it: a resumed run draws the same."""
    return torch.Generator().manual_seed(random.Random(repr(seed)).getrandbits(63))


def figures(scored: Scored, decision: Decision, sized: bool) -> dict[str, float]:
    """What to log about a decision; NaN of no rows.

    Args:
        scored: what it was made on.
        decision: of the gate.
        sized: whether scores are sizes, whose effective number is (Σs)² / Σs².
    """
    score, worth, known, screened = scored
    keep, price = decision.keep, decision.price
    found = {
        "kept_rate": float(keep.float().mean()),
        "kept_rate_positive": float(keep[worth > 0].float().mean()),
        "kept_rate_negative": float(keep[worth < 0].float().mean()),
        "teaching_rate": float((worth != 0).float().mean()),
        "screened_rate": screened / len(keep),
    }
    if sized:
        squares = score.square().sum()
        found["effective_size"] = float(score.abs().sum().square() / squares) if bool(squares > 0) else 0.0
    else:
        delights, kept = score[known], score[keep].abs()
        if len(delights):
            quantiles = torch.quantile(delights, torch.tensor([0.1, 0.5, 0.9]))
            found |= dict(zip(("delight_p10", "delight_p50", "delight_p90"), quantiles.tolist(), strict=True))
            found["delight_std"] = float(delights.std(unbiased=False))
        price = kept.min() if len(kept) and bool(known[keep][kept.argmin()]) else None
    return found if price is None else found | {"price": float(price)}


def part_of(example: dict[str, Any], column: str | None) -> str:
    """The part of the data that an example belongs to: what `column` says, or its prompt, shortened but told apart.

    An environment's example may have no prompt, but then names the environment.

    Raises:
        ValueError: there is no such column.
    """
    if column is None:
        prompt = repr(example.get("prompt", example.get("environment")))
        short = len(prompt) <= PROMPT_LETTERS
        return prompt if short else f"{prompt[:PROMPT_LETTERS]}... ({zlib.crc32(prompt.encode())})"
    if column not in example:
        raise ValueError(f"gate_parts is {column!r}; the dataset has the columns {', '.join(example)}.")
    return str(example[column])
