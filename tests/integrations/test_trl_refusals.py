"""What does not go with the gate in TRL is refused, in a sentence, before training."""

import runpy
import sys
from types import SimpleNamespace

import pytest
import trl_task
from trl import GRPOTrainer
from trl_cases import trainer

import sparkjoy as sj
from sparkjoy.integrations import trl as ours
from sparkjoy.integrations.trl import KondoGRPOConfig, KondoGRPOMixin, KondoGRPOTrainer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate_rate": 0}, "^gate_rate is 0"),
        ({"gate_rate": 0.1, "beta": 0.04}, "Set beta=0"),
        ({"gate_rate": 0.1, "entropy_coef": 0.01}, "Set entropy_coef=0"),
        ({"gate_price": 0.0, "use_adaptive_entropy": True}, "use_adaptive_entropy=False"),
        ({"gate_rate": 0.1, "top_entropy_quantile": 0.2}, "Set top_entropy_quantile=1"),
        ({"gate_dg": "token", "loss_type": "dapo"}, "choose one of cispo, sapo, vespo"),
        ({"gate_dg": "token", "loss_type": "cispo", "gate_dg_temperature": 0}, "gate_dg_temperature is 0"),
        ({"gate_negative_share": 0.25}, "is a share of what gate_rate or gate_price keeps"),
        ({"gate_rate": 0.1, "gate_negative_share": 1.0}, "negative_share is 1.0"),
        ({"gate_rate": 0.1, "gate_score": "surprise"}, "gate_score is 'surprise'; expected 'delight', 'advantage'"),
        ({"gate_rate": 0.1, "gate_advantages": "raw"}, "gate_advantages is 'raw'"),
        ({"gate_rate": 0.1, "gate_empty_step": "stop"}, "gate_empty_step is 'stop'"),
        ({"gate_rate": 0.1, "gate_pack_for": "least"}, "gate_pack_for is 'least'; expected 'speed' or 'memory'"),
    ],
)
def test_what_does_not_go_with_a_gate_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        KondoGRPOConfig(**trl_task.options(output_dir=str(tmp_path), **options))


@pytest.mark.parametrize(
    "option", [{"gate_pack_for": "memory"}, {"gate_compare_every": 5}, {"gate_log_probs": "none"}], ids=str
)
def test_what_is_of_a_gate_is_refused_without_one_and_taken_with_ones_own(tmp_path, option):
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=f"{name}={value!r} is set without a gate"):
        trainer(tmp_path, **option)
    trainer(tmp_path, arguments={"gate": sj.UnbiasedGate(noise=0.3)}, **option)


def test_what_needs_every_row_is_fine_without_a_gate(tmp_path):
    KondoGRPOConfig(**trl_task.options(output_dir=str(tmp_path), gate_rate=1.0, beta=0.04, entropy_coef=0.01))


@pytest.mark.parametrize(
    ("set_up", "message"),
    [
        ({"is_deepspeed_enabled": True}, "Set gate_empty_step='momentum'"),
        ({"is_fsdp_enabled": True}, "version 1 of FSDP. Set version=2"),
        ({"aux_loss_enabled": True}, "Set router_aux_loss_coef=0"),
        ({"use_liger_kernel": True}, "Set use_liger_kernel=False"),
        ({"parallelism_config": "tensor parallel"}, "a parallelism_config, which splits"),
    ],
    ids=lambda case: next(iter(case)) if isinstance(case, dict) else "",
)
def test_unproven_set_ups_are_refused_before_training(tmp_path, set_up, message):
    class SetUp(KondoGRPOTrainer):
        def _refuse_unproven_setups(self):
            for name, value in set_up.items():
                setattr(self.args if name == "parallelism_config" else self, name, value)
            super()._refuse_unproven_setups()

    with pytest.raises(ValueError, match=message) as refusal:
        trainer(tmp_path, cls=SetUp, gate_rate=0.1)
    assert "without the gate" in str(refusal.value)


def test_images_are_refused(tmp_path):
    class WithImages(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            return super()._generate_and_score_completions(inputs) | {"num_images": [1] * len(inputs)}

    class Gated(KondoGRPOMixin, WithImages):
        pass

    made, _ = trainer(tmp_path, cls=Gated, gate_rate=0.1)
    with pytest.raises(ValueError, match="text only"):
        made.train()


@pytest.mark.parametrize(
    ("stand_in", "message"),
    [
        (None, r"pip install sparkjoy\[trl\]"),
        (SimpleNamespace(__version__="1.17.0"), "found 1.17.0"),
        (SimpleNamespace(__version__="1.9.2"), "found 1.9.2"),
    ],
)
def test_a_missing_or_another_trl_is_said(monkeypatch, stand_in, message):
    monkeypatch.setitem(sys.modules, "trl", stand_in)
    with pytest.raises(ImportError, match=message):
        runpy.run_path(ours.__file__)


def test_the_oldest_and_the_newest_trl_are_let_through(monkeypatch):
    for version in ("1.10.0", "1.16.9"):
        monkeypatch.setitem(sys.modules, "trl", SimpleNamespace(__version__=version))
        runpy.run_path(ours.__file__)
