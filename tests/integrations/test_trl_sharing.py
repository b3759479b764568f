"""Sharing tokens in TRL: the gradients and answers are TRL's own, and the model computes fewer tokens."""

import pytest
from torch.nn.utils import parameters_to_vector
from trl import GRPOConfig, GRPOTrainer
from trl_cases import SETTINGS, Masked, relative_error, trained

from sparkjoy.integrations.trl import KondoGRPOTrainer
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
    for loss_type in ("dapo", "bnpo"):
        options = OPTIONS[name] | {"loss_type": loss_type}
        _, given = trained(tmp_path, share_tokens=True, **options)
        _, expected = trained(tmp_path, **options, **EXACT)
        assert same(given, expected)


@pytest.mark.parametrize("gate", [{"gate_rate": 0.4}, {"gate_noise": 0.5}, {"gate_price": 0.0}], ids=str)
@pytest.mark.parametrize("options", [{}, {"gate_log_probs": "exact"}, {"gate_pack_for": "memory"}], ids=str)
def test_under_a_gate_it_is_the_gradient_of_the_weighted_rows(tmp_path, gate, options):
    _, given = trained(tmp_path, share_tokens=True, loss_type="grpo", max_steps=2, **gate, **options)
    _, expected = trained(tmp_path, cls=Masked, share_tokens=True, loss_type="grpo", max_steps=2, **gate, **options)
    assert same(given, expected)


def test_weights_after_five_steps_are_those_of_trl(tmp_path):
    changes = {"max_steps": 5, "optim": "adamw_torch", "learning_rate": 1e-3}
    made, theirs = trained(tmp_path, share_tokens=True, **changes)[0], trained(tmp_path, **changes, **EXACT)[0]
    assert relative_error(*(parameters_to_vector(one.model.parameters()) for one in (made, theirs))) < 1e-5
