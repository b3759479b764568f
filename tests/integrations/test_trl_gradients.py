"""The master test of the TRL trainer: packed gradients equal those with the skipped rows' advantages at 0."""

import pytest
import torch
from trl_cases import SETTINGS, Masked, relative_error, trained

from sparkjoy.integrations.trl.packing import LOSS_NORMALIZERS

FAST = [(loss, "accumulation") for loss in LOSS_NORMALIZERS]
FAST += [("bnpo", setting) for setting in SETTINGS if setting != "accumulation"]
SLOW = [
    (loss, setting)
    for turn, loss in enumerate(LOSS_NORMALIZERS)
    for place, setting in enumerate(SETTINGS)
    if (turn + place) % 3 == 0 and (loss, setting) not in FAST
]


@pytest.mark.parametrize(("loss", "setting"), FAST + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW])
def test_packed_gradients_equal_masked_ones(tmp_path, loss, setting):
    changes = {"loss_type": loss, "gate_rate": 0.3} | SETTINGS[setting]
    packed, given = trained(tmp_path, **changes)
    masked, expected = trained(tmp_path, cls=Masked, **changes)
    assert len(given) == len(expected) == changes.get("max_steps", 1)
    for step, reference in zip(given, expected, strict=True):
        assert reference.norm() > 1e-3
        assert relative_error(step, reference) < 1e-5
    for ours, theirs in zip(packed.state.log_history, masked.state.log_history, strict=True):
        if "loss" in ours:
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4, abs=1e-6)
            assert ours["gate/micro_steps"] < packed.args.gradient_accumulation_steps


@pytest.mark.parametrize(
    "changes",
    [
        {"gate_rate": 0.6, "gate_negative_share": 0.5},
        {"gate_price": 0.0},
        {"gate_price": -0.5, "gate_rate": 0.9},
        {"gate_rate": 0.3, "gate_advantages": "trl"},
        {"gate_rate": 0.3, "gate_price": 0.0, "gate_score": "absolute-advantage"},
        {"gate_rate": 0.3, "loss_type": "vespo", "gate_dg": "token"},
        {"gate_rate": 0.3, "loss_type": "sapo", "gate_dg": "sample", "gate_dg_temperature": 2.0},
        {"gate_rate": 0.3, "importance_sampling_level": "sequence", "loss_type": "grpo"},
        {"gate_rate": 0.3, "off_policy_mask_threshold": 0.1, "num_iterations": 2},
        {"gate_rate": 0.5, "mask_truncated_completions": True},
        {"gate_noise": 0.5},
        {"gate_noise": 2.0, "loss_type": "bnpo", "mask_truncated_completions": True},
        *({"gate_rate": 0.4, "gate_pack_for": "memory", "loss_type": loss} for loss in ("grpo", "bnpo")),
        {"gate_noise": 0.5, "gate_pack_for": "memory", "loss_type": "sapo", "steps_per_generation": 2},
    ],
    ids=lambda changes: ",".join(f"{name.removeprefix('gate_')}={value}" for name, value in changes.items()),
)
def test_so_they_do_with_every_gate(tmp_path, changes):
    (_, given), (_, expected) = trained(tmp_path, **changes), trained(tmp_path, cls=Masked, **changes)
    assert expected[0].norm() > 1e-3
    assert relative_error(given[0], expected[0]) < 1e-5


def test_dropping_rows_of_no_advantage_changes_no_gradient(tmp_path):
    changes = {"loss_type": "grpo", "num_generations": 2}
    dropped, given = trained(tmp_path, gate_price=0.0, gate_score="absolute-advantage", **changes)
    _, expected = trained(tmp_path, **changes)
    assert dropped.state.log_history[0]["gate/kept_rate"] == dropped.state.log_history[0]["gate/teaching_rate"] < 1
    assert relative_error(given[0], expected[0]) < 1e-5


def test_absolute_positions_are_not_moved(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=14, n_positions=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=1)
    )
    state = {name: value.clone() for name, value in model.state_dict().items()}
    changes = {"gate_rate": 0.3, "loss_type": "bnpo", "disable_dropout": True}
    vectors = []
    for cls in (None, Masked):
        model.load_state_dict(state)
        vectors.append(trained(tmp_path, **({"cls": cls} if cls else {}), **changes, model=model)[1][0])
    assert relative_error(*vectors) < 1e-5
