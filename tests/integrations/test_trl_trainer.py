"""The trainer around the gradient: off is TRL's own, rows that run, evaluation, resuming, logging."""

from types import SimpleNamespace

import pytest
import torch
import trl
import trl_task
from trl import GRPOConfig, GRPOTrainer
from trl_cases import Masked, relative_error, trained, trainer

import sparkjoy as sj
from sparkjoy.integrations.trl import KondoGRPOConfig, KondoGRPOMixin, KondoGRPOTrainer


@pytest.fixture
def rollouts(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    return {"arguments": {"rollout_func": trl_task.rollout_with_log_probs}}


@pytest.mark.parametrize("options", [{"gate_rate": 1.0}, {}], ids=["rate 1", "no gate"])
def test_rate_one_is_the_trainer_of_trl_to_the_bit(tmp_path, options):
    changes = {"max_steps": 5, "optim": "adamw_torch", "learning_rate": 1e-2, "max_grad_norm": 1.0}
    theirs, _ = trained(tmp_path, cls=GRPOTrainer, config=GRPOConfig, **changes)
    ours, _ = trained(tmp_path, **changes, **options)
    for parameter, expected in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(parameter, expected)
    losses = [[entry.get("loss") for entry in made.state.log_history] for made in (ours, theirs)]
    assert losses[0] == losses[1]
    assert not any("gate/" in name for entry in ours.state.log_history for name in entry)


def test_a_config_of_trl_leaves_the_trainer_as_it_was(tmp_path):
    made, _ = trained(tmp_path, config=GRPOConfig)
    assert made.state.log_history[0]["loss"] != 0


def test_only_kept_rows_run(tmp_path):
    ran = []

    class Counting(KondoGRPOTrainer):
        def _get_per_token_logps_and_entropies(self, model, input_ids, *args, **kwargs):
            if torch.is_grad_enabled():
                ran.append(len(input_ids))
            return super()._get_per_token_logps_and_entropies(model, input_ids, *args, **kwargs)

    made, _ = trained(tmp_path, cls=Counting, gate_rate=0.3)
    assert ran == [2, 3]  # ⌈0.3 · 16⌉ = 5 rows, in as few micro-batches of at most 4 as hold them
    assert made.state.log_history[0]["gate/micro_steps"] == 2
    assert made.state.log_history[0]["gate/kept_rate"] == 5 / 16


def test_packing_for_memory_spreads_rows_over_the_step(tmp_path):
    ran = {"speed": [], "memory": []}

    class Counting(KondoGRPOTrainer):
        def _get_per_token_logps_and_entropies(self, model, input_ids, *args, **kwargs):
            if torch.is_grad_enabled():
                ran[self.args.gate_pack_for].append(input_ids.shape)
            return super()._get_per_token_logps_and_entropies(model, input_ids, *args, **kwargs)

    for pack_for, passes in (("speed", 2), ("memory", 4)):
        made, _ = trained(tmp_path, cls=Counting, gate_rate=0.5, gate_pack_for=pack_for)
        assert made.state.log_history[0]["gate/micro_steps"] == len(ran[pack_for]) == passes
        assert sum(rows for rows, _ in ran[pack_for]) == 8
    largest = {pack_for: max(rows * tokens for rows, tokens in shapes) for pack_for, shapes in ran.items()}
    assert largest["memory"] <= 0.6 * largest["speed"]


def test_figures_of_trl_count_what_was_generated_and_ours_what_was_differentiated(tmp_path):
    changes = {"include_num_input_tokens_seen": "all"}
    (gated, _), (whole, _) = (trained(tmp_path, gate_rate=rate, **changes) for rate in (0.3, 1.0))
    log, expected = gated.state.log_history[0], whole.state.log_history[0]
    assert log["num_tokens"] == log["num_input_tokens_seen"] == expected["num_tokens"]
    tokens = sum(int(gated._buffered_inputs[step]["completion_mask"].sum()) for step in (2, 3))
    tokens += sum(int(gated._buffered_inputs[step]["prompt_mask"].sum()) for step in (2, 3))
    assert log["gate/backward_tokens"] == tokens < log["num_tokens"]


def test_it_logs_what_it_decided(tmp_path):
    made, _ = trained(tmp_path, gate_rate=0.3, gate_negative_share=0.4)
    log = made.state.log_history[0]
    for figure in (
        *("kept_rate", "kept_token_rate", "kept_rate_positive", "kept_rate_negative", "teaching_rate", "price"),
        *("delight_std", "delight_p10", "delight_p50", "delight_p90", "screened_rate", "screen_seconds", "micro_steps"),
    ):
        assert isinstance(log[f"gate/{figure}"], float), figure
    assert log["gate/kept_rate_negative"] > 0
    assert log["gate/delight_p10"] <= log["gate/delight_p50"] <= log["gate/delight_p90"]


def test_log_probs_of_the_rollout_screen_for_free(tmp_path, rollouts):
    free, given = trained(tmp_path, gate_rate=0.3, **rollouts)
    exact, expected = trained(tmp_path, gate_rate=0.3, gate_log_probs="exact", **rollouts)
    assert free.state.log_history[0]["gate/screened_rate"] == 0
    assert exact.state.log_history[0]["gate/screened_rate"] > 0
    assert relative_error(given[0], expected[0]) < 1e-5


def test_screening_is_exact_where_dropout_is_on(tmp_path):
    """Screened without dropout and without a draw from the generator that dropout draws from."""
    model = trl_task.model()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    states = []

    class Watching(KondoGRPOTrainer):
        def _screen(self, output, rows):
            before = torch.get_rng_state()
            result = super()._screen(output, rows)
            states.append((torch.equal(before, torch.get_rng_state()), self.model.training))
            return result

    trained(tmp_path, cls=Watching, gate_rate=0.3, gate_log_probs="exact", model=model)
    assert states == [(True, True)]


def test_a_step_without_survivors_leaves_the_weights_or_keeps_the_momentum(tmp_path):
    def run(empty_step):
        made, _ = trainer(
            tmp_path,
            gate_price=1e9,
            gate_empty_step=empty_step,
            optim="adamw_torch",
            learning_rate=0.1,
        )
        made.create_optimizer()
        for parameter in made.model.parameters():
            made.optimizer.state[parameter] = {
                "step": torch.tensor(1.0),
                "exp_avg": torch.ones_like(parameter),
                "exp_avg_sq": torch.ones_like(parameter),
            }
        before = [parameter.detach().clone() for parameter in made.model.parameters()]
        made.train()
        log = made.state.log_history[0]
        moved = any(not torch.equal(*pair) for pair in zip(before, made.model.parameters(), strict=True))
        return log["gate/kept_rate"], log["gate/micro_steps"], moved

    assert run("skip") == (0, 0, False)
    assert run("momentum") == (0, 1, True)


def test_evaluation_is_trls_own(tmp_path):
    figures = []
    model = trl_task.model()
    for cls, config, options in (
        (KondoGRPOTrainer, KondoGRPOConfig, {"gate_rate": 0.3}),
        (GRPOTrainer, GRPOConfig, {}),
    ):
        made, _ = trainer(
            tmp_path,
            cls=cls,
            config=config,
            model=model,
            per_device_eval_batch_size=4,
            arguments={"eval_dataset": trl_task.prompts(8, 2, 5)},
            **options,
        )
        figures.append(
            {name: value for name, value in made.evaluate().items() if not name.endswith(("time", "second"))}
        )
    assert figures[0] == figures[1]
    assert "eval_reward" in figures[0]


def test_a_stopped_run_goes_on_as_if_it_had_not(tmp_path):
    changes = {"gate_rate": 0.3, "gate_score": "uniform", "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole, _ = trained(tmp_path / "whole", **changes)
    resumed, _ = trainer(tmp_path / "resumed", **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for parameter, expected in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(parameter, expected)


def test_a_trainer_of_ones_own_takes_the_mix_in(tmp_path):
    class Halving(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, inputs) / 2

    class Gated(KondoGRPOMixin, Halving):
        gate_normalizer = "rows"

    class Reference(Masked, Halving):
        gate_normalizer = "rows"

    class Undeclared(KondoGRPOMixin, Halving):
        pass

    changes = {"loss_type": "grpo", "gate_rate": 0.3}
    (_, given), (_, expected) = trained(tmp_path, cls=Gated, **changes), trained(tmp_path, cls=Reference, **changes)
    assert relative_error(given[0], expected[0]) < 1e-5
    with pytest.raises(ValueError, match="Halving has a _compute_loss of its own; say what"):
        trainer(tmp_path, cls=Undeclared, **changes)


@pytest.mark.filterwarnings("ignore:gate_advantages='centred'")
def test_advantages_of_each_token_are_gated_too(tmp_path):
    class PerToken(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            position = torch.arange(output["completion_ids"].shape[1])
            return output | {"advantages": output["advantages"][:, None] * (1 + position)}

    class Gated(KondoGRPOMixin, PerToken):
        pass

    class Reference(KondoGRPOMixin, PerToken):
        def _pack(self, buffer):
            return [
                {name: value for name, value in rows.items() if name != "gate_keep"}
                | {"advantages": rows["advantages"] * rows["gate_keep"][:, None]}
                for rows in buffer
            ]

    for advantages in ("trl", "centred"):
        changes = {"gate_rate": 0.3, "gate_advantages": advantages, "loss_type": "bnpo"}
        (_, given), (_, expected) = trained(tmp_path, cls=Gated, **changes), trained(tmp_path, cls=Reference, **changes)
        assert relative_error(given[0], expected[0]) < 1e-5


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_ratios_of_a_foreign_sampler_travel_with_their_rows(tmp_path, rollouts, mode):
    """As with vLLM: a ratio for each token or row, and a log-prob that the sampler could not tell."""

    def foreign(prompts, trainer):
        rolled = trl_task.rollout_with_log_probs(prompts, trainer)
        draws = torch.Generator().manual_seed(0)
        rolled["logprobs"] = [
            [value - 0.3 * float(torch.rand(1, generator=draws)) for value in row] for row in rolled["logprobs"]
        ]
        if not trl.__version__.startswith("1.10."):  # which knows of no log-prob that could not be told
            rolled["logprobs"][0][0] = None
        return rolled

    steps = []
    for cls in (KondoGRPOTrainer, Masked):
        made, gradients = trainer(
            tmp_path,
            cls=cls,
            gate_rate=0.3,
            vllm_importance_sampling_mode=mode,
            vllm_importance_sampling_clip_max=3.0,
            arguments={"rollout_func": foreign},
        )
        made.use_vllm, made._last_loaded_step = True, -1
        made.vllm_generation = SimpleNamespace(sync_weights=lambda: None)
        made.train()
        steps.append(gradients.steps[0])
    assert relative_error(*steps) < 1e-5


def test_dg_weights_the_terms_by_their_delight(tmp_path):
    """Against the weight written out, on the log-probs of the first pass, where cispo's ratio is 1."""
    _, given = trained(tmp_path, loss_type="cispo", epsilon_high=5.0, gate_dg="token", gate_dg_temperature=0.5)

    class Written(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
            attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
            width = inputs["completion_ids"].shape[1]
            log_probs = model(ids, attention_mask=attention).logits[:, -width - 1 : -1].log_softmax(-1)
            log_probs = log_probs.gather(2, inputs["completion_ids"][..., None]).squeeze(2)
            advantages = inputs["advantages"][:, None]
            weight = torch.sigmoid(-advantages * log_probs.detach() / 0.5)
            loss = -(weight * advantages * log_probs * inputs["completion_mask"]).sum()
            return loss / inputs["num_items_in_batch"]

    _, expected = trained(tmp_path, cls=Written, config=GRPOConfig, loss_type="cispo")
    assert relative_error(given[0], expected[0]) < 1e-5


@pytest.mark.parametrize(
    "options",
    [{"gate_rate": 0.3}, {"gate_rate": 0.8}, {"gate_price": 0.3}, {"gate_rate": 0.5, "gate_negative_share": 0.5}],
)
def test_the_decision_is_the_gate_on_the_sequence_delight_of_centred_rewards(tmp_path, options):
    """Written out with sparkjoy's own parts and the model's logits, on all rows."""
    seen = []

    class Watching(KondoGRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
            attention = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
            width = output["completion_ids"].shape[1]
            with torch.no_grad():
                log_probs = self.model(ids, attention_mask=attention).logits[:, -width - 1 : -1].log_softmax(-1)
            log_probs = log_probs.gather(2, output["completion_ids"][..., None]).squeeze(2)
            words = self.processing_class
            texts = [
                words.batch_decode(
                    [
                        row[m.bool()].tolist()
                        for row, m in zip(output[f"{part}_ids"], output[f"{part}_mask"], strict=True)
                    ],
                    skip_special_tokens=True,
                )
                for part in ("prompt", "completion")
            ]
            rewards = torch.tensor(trl_task.copied([text.replace(" ", "") for text in texts[0]], texts[1]))
            advantages = sj.group_mean_advantage(rewards, group_size=4)
            score = sj.sequence_delight(advantages, log_probs, output["completion_mask"])
            seen.append((output["gate_keep"], self._gate(score).keep))
            return output

    trained(tmp_path, cls=Watching, **options)
    assert len(seen) == 1
    assert 0 < seen[0][0].sum() < 16
    assert torch.equal(*seen[0])
