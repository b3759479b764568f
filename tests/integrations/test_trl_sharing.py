"""Sharing tokens in TRL: the gradients and answers are TRL's own, and the model computes fewer tokens."""

import warnings

import pytest
import torch
import trl_task
from torch.nn.utils import parameters_to_vector
from trl import GRPOConfig, GRPOTrainer
from trl_cases import SETTINGS, Masked, relative_error, trained

from sparkjoy.integrations.trl import KondoGRPOMixin, KondoGRPOTrainer
from sparkjoy.integrations.trl.packing import LOSS_NORMALIZERS

EXACT = {"cls": GRPOTrainer, "config": GRPOConfig}
OPTIONS = {
    "KL": {"beta": 0.2},
    "entropy": {"entropy_coef": 0.05},
    "KL of adapters": {"beta": 0.2, "lora": True},
    "two iterations, KL": {"num_iterations": 2, "max_steps": 2, "beta": 0.2},
    "ratios of whole completions": {"importance_sampling_level": "sequence", "num_iterations": 2, "max_steps": 2},
    "temperature": {"temperature": 0.7},
    "truncated completions": {"mask_truncated_completions": True},
    "a group over several micro-batches": {"num_generations": 16},
    **SETTINGS,
}


def same(given, expected):
    return all(relative_error(*pair) < 1e-5 for pair in zip(given, expected, strict=True))


@pytest.mark.parametrize("loss_type", LOSS_NORMALIZERS)
def test_every_loss_has_its_gradient(tmp_path, loss_type):
    made, given = trained(tmp_path, loss_type=loss_type, share_tokens=True, num_iterations=2, max_steps=2)
    _, expected = trained(tmp_path, loss_type=loss_type, num_iterations=2, max_steps=2, **EXACT)
    assert same(given, expected)
    log = made.state.log_history[0]
    assert log["shared/distinct_tokens"] < 0.7 * log["shared/padded_tokens"]


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_has_its_gradient(tmp_path, name):
    options = OPTIONS[name] | {"loss_type": ("dapo", "bnpo")[list(OPTIONS).index(name) % 2]}
    if "beta" in options and "lora" not in options:
        trl_task.model().save_pretrained(tmp_path / "model")  # TRL loads the reference by name
        options["model"] = str(tmp_path / "model")
    _, given = trained(tmp_path, share_tokens=True, **options)
    _, expected = trained(tmp_path, **options, **EXACT)
    assert same(given, expected)


@pytest.mark.parametrize(
    ("gate", "options"),
    [
        ({"gate_rate": 0.4}, {"gate_log_probs": "exact"}),
        ({"gate_rate": 0.4}, {"gate_pack_for": "memory"}),
        ({"gate_noise": 0.5}, {}),
        ({"gate_noise": 0.5}, {"gate_log_probs": "exact"}),
        ({"gate_price": 0.0}, {"gate_pack_for": "memory"}),
    ],
    ids=str,
)
def test_under_a_gate_it_is_the_gradient_of_the_weighted_rows(tmp_path, gate, options):
    _, given = trained(tmp_path, share_tokens=True, loss_type="grpo", max_steps=2, **gate, **options)
    _, expected = trained(tmp_path, cls=Masked, share_tokens=True, loss_type="grpo", max_steps=2, **gate, **options)
    assert same(given, expected)


def test_weights_after_five_steps_are_those_of_trl(tmp_path):
    changes = {"max_steps": 5, "optim": "adamw_torch", "learning_rate": 1e-3}
    made, theirs = trained(tmp_path, share_tokens=True, **changes)[0], trained(tmp_path, **changes, **EXACT)[0]
    assert relative_error(*(parameters_to_vector(one.model.parameters()) for one in (made, theirs))) < 1e-5


class Watching(KondoGRPOTrainer):
    """Counts the tokens that the model computes while it samples."""

    def _generate_single_turn(self, *args, **kwargs):
        self.sampled = []
        embeddings = self.accelerator.unwrap_model(self.model).get_input_embeddings()
        hook = embeddings.register_forward_hook(lambda _, given, __: self.sampled.append(given[0].numel()))
        output = super()._generate_single_turn(*args, **kwargs)
        hook.remove()
        return output


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        ({}, True),
        ({"gate_noise": 0.5}, True),
        ({"lora": True}, True),
        ({"top_k": 3, "top_p": 0.8, "repetition_penalty": 1.2, "temperature": 0.7}, True),
        ({"gradient_checkpointing": True}, True),
        ({"bf16": True}, True),
        ({"generation_kwargs": {"num_beams": 2}}, False),
        ({"generation_kwargs": {"cache_implementation": "static"}}, False),
        ({"generation_kwargs": {"use_cache": False}}, False),
    ],
    ids=str,
)
def test_answers_are_the_same_and_prompts_are_read_once(tmp_path, options, shares):
    sampled, tokens = [], []

    def reward(completion_ids, **_):
        sampled.append(completion_ids)
        return [float(len(ids)) for ids in completion_ids]

    for share in (True, False):
        given = {"arguments": {"reward_funcs": reward}} | options
        made, _ = trained(tmp_path, cls=Watching, share_tokens=share, **given)
        tokens.append(sum(made.sampled))
        if "gate_noise" in options:
            assert made.state.log_history[0]["gate/screened_rate"] == 0  # log-probs are recorded all the same
    assert sampled[0] == sampled[1]
    assert (tokens[0] < 0.9 * tokens[1]) == shares


def test_tokens_of_tools_are_heeded(tmp_path):
    class Masked(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            return {**output, "tool_mask": output["completion_mask"] * (output["completion_ids"] % 3 != 0)}

    class Mine(KondoGRPOMixin, Masked):
        pass

    (_, given), (_, expected) = (
        trained(tmp_path, cls=cls, loss_type="grpo", **more)
        for cls, more in ((Mine, {"share_tokens": True}), (Masked, {"config": GRPOConfig}))
    )
    assert same(given, expected)


def test_a_model_that_looks_at_more_than_its_mask_is_noticed_once(tmp_path):
    def position_in_the_pass(module, args, given):
        """Into the states, which neither a mask nor a position id tells."""
        embedded = module.embed_tokens(given.pop("input_ids"))
        number = torch.arange(embedded.shape[1]).view(1, -1, 1)
        return args, {**given, "inputs_embeds": embedded * (1 + number)}

    def model():
        made = trl_task.model()
        made.model.register_forward_pre_hook(position_in_the_pass, with_kwargs=True)
        return made

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        made, given = trained(tmp_path, share_tokens=True, model=model(), max_steps=2)
    said = "tokens are not shared: Qwen2ForCausalLM's log-probs would be off by"
    assert [said in str(warning.message) for warning in seen].count(True) == 1
    _, expected = trained(tmp_path, model=model(), max_steps=2, **EXACT)
    assert same(given, expected)
    assert made.state.log_history[0]["shared/distinct_tokens"] == made.state.log_history[0]["shared/padded_tokens"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"top_entropy_quantile": 0.5}, "Set top_entropy_quantile=1, or train with share_tokens=False"),
        ({"use_adaptive_entropy": True}, "Set use_adaptive_entropy=False, or train with share_tokens=False"),
    ],
)
def test_what_looks_at_whole_micro_batches_is_refused(tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        trained(tmp_path, share_tokens=True, **options)


def test_log_probs_of_ones_own_are_refused(tmp_path):
    class Own(GRPOTrainer):
        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    class Mine(KondoGRPOMixin, Own):
        pass

    with pytest.raises(ValueError, match="Own has a _get_per_token_logps_and_entropies of its own"):
        trained(tmp_path, cls=Mine, share_tokens=True)
    trained(tmp_path, cls=Mine, gate_rate=0.5)
