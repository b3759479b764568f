"""TRL's GRPOTrainer, deciding: from what TRL leaves in a generation batch to which rows of all processes are kept."""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch
from torch import Tensor

from sparkjoy import checks
from sparkjoy.coverage import Coverage
from sparkjoy.gates import Gate
from sparkjoy.gates.decision import GATE
from sparkjoy.integrations.sampling import base_of
from sparkjoy.integrations.sizes import DIVIDES_BY_LENGTH, RowSize
from sparkjoy.integrations.transformers import prepends_tokens
from sparkjoy.integrations.trl.advantages import of_the_gate
from sparkjoy.integrations.trl.config import KondoGRPOConfig
from sparkjoy.integrations.trl.deciding import Scored, draws, other_score, part_of, score_of_rows, sized_figures, worth
from sparkjoy.integrations.trl.packing import Rows, loss_mask, whole
from sparkjoy.integrations.trl.sharing import SharingMixin
from sparkjoy.noise import expected_noise, noise_ratio
from sparkjoy.prefix_tree import fold
from sparkjoy.scores import SCORE, ScoreFunction, delight, reads_log_probs, sign_of_advantage
from sparkjoy.selecting import select_by_score
from sparkjoy.signs import undecided

PATIENCE = 4
"""Groups of completions of a part, all skipped, before it may be called lost."""


class DecidingMixin(SharingMixin):
    """What decides in `KondoGRPOMixin`, which see."""

    def __init__(self, *args: Any, gate: Gate | None = None, score: ScoreFunction | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.args if isinstance(self.args, KondoGRPOConfig) else None
        self._gate: Gate | None = config.gate() if config is not None and config.gated else None
        self._gate_score = score or delight
        if gate is not None or score is not None:
            self._gate = self._own_gate(gate, score, config)
        self._gate_dg = None if config is None else config.gate_dg
        self._gate_rewards: Tensor | None = None  # (N, F), of all processes, those of the last completions scored
        self._gate_recorded = False  # whether the sampler's log-probs are those read off its passes
        self._gate_warned = False  # that it ranks by the loss's advantages where it was to rank by centred rewards
        self._gate_expected: float | None = None  # noise that the last decision lets expect, until its rows have run
        # Of this process's prompts, and anew after a resume.
        self._gate_coverage = Coverage(PATIENCE * self.num_generations)
        self._gate_sums = torch.zeros(4, dtype=torch.float64)  # `noise_sums` of what has run since, of this process

    def _own_gate(self, gate: Gate | None, score: ScoreFunction | None, config: KondoGRPOConfig | None) -> Gate | None:
        """The gate that the trainer was given, or that of the config where it was given a score alone."""
        if config is None:
            raise ValueError("gate and score need a KondoGRPOConfig as args, which says how kept rows are packed.")
        if gate is not None:
            checks.function("gate", gate, f"{GATE}, or None for that of the config", ..., ...)
            if self._gate is not None:
                raise ValueError(f"gate={gate!r}, and the config has {self._gate!r}; give one of them.")
            config.refuse_with(gate)
        chosen = self._gate if gate is None else gate
        if score is not None:
            checks.function("score", score, SCORE, ..., ...)
            if chosen is None:
                raise ValueError(f"score={checks.described(score)} is set without a gate: set gate_rate or gate_price.")
            if getattr(chosen, "weighted", None) or config.gate_score != "delight":
                raise ValueError(
                    f"score={checks.described(score)} is for a gate that is not weighted, instead of gate_score; a "
                    "noise budget goes by the size of a row's gradient in TRL's loss."
                )
        return chosen

    def _decide(self, gate: Gate, output: Rows) -> Tensor:
        """(B,) bool: which rows of this process are kept, out of those of all; a weighted gate adds two columns."""
        start = time.perf_counter()
        # The seed is of the optimizer step and the micro-step in it, so that a resumed run draws the same.
        place = (self.args.seed, self.state.global_step, self._step % self.args.gradient_accumulation_steps)
        mask = loss_mask(output)
        if self._shares:
            cost = fold(*whole(output)).shares
        else:
            cost = output["prompt_mask"].sum(dim=1) + output["completion_mask"].sum(dim=1)
        tokens, costs = self._of_all(torch.stack([mask.sum(dim=1), cost], dim=1).float()).unbind(dim=1)
        if getattr(gate, "weighted", None):
            if hasattr(gate, "generator"):
                gate.generator = draws(*place)
            keep, figures = self._decide_by_size(gate, output, costs)
        else:
            keep, figures = self._decide_by_score(gate, output, costs, draws(*place))
        figures["screen_seconds"] = time.perf_counter() - start
        figures["backward_tokens"] = float(costs[keep].sum())
        figures["kept_token_rate"] = float(tokens[keep].sum() / tokens.sum().clamp(min=1))
        for name, value in figures.items():
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

    # All processes decide alike, each on the numbers of all.

    def _of_all(self, local: Tensor) -> Tensor:
        gathered: Tensor = self.accelerator.gather(local)
        return gathered.cpu()

    def _mine(self, of_all: Tensor, local: Tensor) -> Tensor:
        """This process's part of what is known of the rows of all."""
        first = self.accelerator.process_index * len(local)
        return of_all[first : first + len(local)].to(local.device)

    # A hard gate

    def _decide_by_score(
        self, gate: Gate, output: Rows, costs: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        mask = self._teaching_mask(output)
        advantages = self._gate_advantages(output)
        of_all = self._of_all(worth(advantages, output["advantages"], mask))
        if self.args.gate_score != "delight":
            other = other_score(self.args.gate_score, of_all, generator)
            scored, screened = Scored(of_all, torch.zeros(len(of_all), dtype=torch.bool), other, other), 0
        else:
            log_probs = self._log_probs_at_hand(output)
            if not reads_log_probs(self._gate_score):
                log_probs = torch.zeros_like(mask, dtype=torch.float32)
            one_sign = log_probs is None and advantages.dim() == 1 and sign_of_advantage(self._gate_score)
            known = undecided(getattr(gate, "rule", None), of_all) if one_sign else of_all != 0
            rows = self._mine(known, mask).nonzero().flatten()
            of_rows = self._screen(output, rows) if log_probs is None else log_probs[rows]
            local = torch.zeros(len(mask), device=mask.device)
            if len(rows):
                local[rows] = score_of_rows(self._gate_score, advantages[rows], of_rows, mask[rows]).to(local)
            scored, screened = Scored(of_all, known, self._of_all(local)), int(known.sum()) * (log_probs is None)
            checks.finite(f"what score={checks.described(self._gate_score)} returned", scored.delights)
        decision = select_by_score(gate, scored.score, costs).decision
        keep = decision.keep
        if getattr(gate, "weighted", None) is None:  # one that does not say
            output["gate_weight"] = self._mine(decision.weight, mask)
        return keep, scored.figures(keep) | {"screened_rate": screened / len(keep)}

    def _teaching_mask(self, output: Rows) -> Tensor:
        """(B, T), 1 for tokens that the loss has a term of: not those whose ratio to the sampler's TRL has set to 0."""
        mask, ratio = loss_mask(output), self._sampler_ratio(output)
        return mask if ratio is None else mask * (ratio != 0)

    def _sampler_ratio(self, rows: Rows) -> Tensor | None:
        """(B, T) or (B, 1), what the loss multiplies its terms by; vespo reads it too, but never as a factor."""
        return None if self.loss_type == "vespo" else rows.get("importance_sampling_ratio")

    def _gate_advantages(self, output: Rows) -> Tensor:
        """(B,) or (B, T): the advantages that the gate ranks by, of this process."""
        own: Tensor = output["advantages"]
        advantages, centred = own, False
        if own.dim() == 1:
            of_all = self.accelerator.gather(own)
            advantages, centred = of_the_gate(
                of_all,
                self._gate_rewards,
                self.reward_weights,
                self.num_generations,
                self.scale_rewards,
                self.multi_objective_aggregation,
            )
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

    @property
    def _row_size(self) -> RowSize:
        return RowSize(
            by_length=self.loss_type in DIVIDES_BY_LENGTH,
            beta=self.beta,
            entropy_coef=self.args.entropy_coef,
            dg=self._gate_dg,
            dg_temperature=self.args.gate_dg_temperature,
        )

    def _size_of(self, rows: Rows, log_probs: Tensor | None, advantages: Tensor | None = None) -> Tensor:
        """(B,) the size of each row's gradient in TRL's loss, by log-probs (B, T)."""
        advantages = rows["advantages"] if advantages is None else advantages
        reference = rows.get("ref_per_token_logps")
        return self._row_size(advantages, log_probs, loss_mask(rows), self._sampler_ratio(rows), reference)

    def _decide_by_size(self, gate: Gate, output: Rows, costs: Tensor) -> tuple[Tensor, dict[str, float]]:
        """By the loss's own advantages always, so that the expected gradient is the loss's.

        Where no log-probs are at hand the size is |advantage| times the root of the length: the few rows kept more than
        by exact sizes cost less than a pass over all.
        """
        self._learn_noise()  # where an optimizer step has several decisions
        log_probs, mask = self._log_probs_at_hand(output), loss_mask(output)
        screened = 0
        if log_probs is None and self.args.gate_log_probs == "exact":
            with_terms = self._size_of(output, None) != 0
            rows = with_terms.nonzero().flatten()
            screened = int(self._of_all(with_terms).sum())
            log_probs = torch.zeros(mask.shape, device=mask.device).index_copy(0, rows, self._screen(output, rows))
        size = self._size_of(output, log_probs)
        of_all = self._of_all(size)
        decision = select_by_score(gate, of_all, costs).decision
        output["gate_size"], output["gate_weight"] = size, self._mine(decision.weight, size)
        self._gate_expected = expected_noise(of_all, decision.probability)
        figures = sized_figures(of_all, decision) | {"screened_rate": screened / len(of_all)}
        return decision.keep, figures

    def _learn_noise(self) -> None:
        """Once what was kept has run: tell the gate what its draws really added, by exact sizes, and log it."""
        if self._gate_expected is None:
            return
        sums = self._gate_sums
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums.to(self.accelerator.device), reduction="sum")
        measured = sums.tolist()
        self._metrics["train"]["gate/noise"].append(self._gate_expected * noise_ratio(*measured))
        learn = getattr(self._gate, "learn", None)
        if learn is not None:
            learn(*measured)
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
        """(n, T) log-probs of `rows`, exact and without a graph; in eval mode, so without dropout or other draws."""
        ids, mask, _ = whole(output)
        prompt = output["prompt_ids"].shape[1]
        log_probs = torch.zeros(len(mask), mask.shape[1] - prompt, device=ids.device)
        tokens = mask.sum(dim=1)
        ordered = rows[tokens[rows].argsort()] if not self._shares else rows  # or prompt by prompt
        parts = [part for part in ordered.split(self.args.per_device_train_batch_size) if len(part)]
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # weights are gathered in a pass: all run as many
            passes = int(self._of_all(torch.tensor([len(parts)], device=ids.device)).max())
            parts += [tokens.argmin(dim=0, keepdim=True)] * (passes - len(parts))
        self.model.eval()
        try:
            for part in parts:
                present = mask[part].any(dim=0).nonzero().flatten()
                start = min(int(present[0]), prompt - 1) if self._trims_prompts else 0
                stop = max(int(present[-1]), prompt) + 1
                log_probs[part, : stop - prompt], _, _ = self._get_per_token_logps_and_entropies(
                    self.model, ids[part, start:stop], mask[part, start:stop], stop - prompt
                )
        finally:
            self.model.train()
        return log_probs[rows]

    @property
    def _trims_prompts(self) -> bool:
        """Whether the padding left of a prompt can be cut or added: positions are relative, and it is leftmost."""
        model = self.accelerator.unwrap_model(self.model)
        config = base_of(model).config.get_text_config()
        rotates = any(getattr(config, name, None) is not None for name in ("rope_parameters", "rope_theta"))
        return rotates and not prepends_tokens(model)
