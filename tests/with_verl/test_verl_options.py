"""What a verl run is asked besides, by its own configuration, and what the gate does not go with."""

import os
import subprocess
import sys
from functools import partial

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")  # verl says which engines it did not find


@pytest.fixture
def options():
    """A function: verl's fsdp_config with other values, made as verl makes it."""
    import verl_cases  # noqa: F401  # first, so that the CPU is a platform
    from omegaconf import OmegaConf
    from verl.utils.config import omega_conf_to_dataclass

    def made(**changes):
        return omega_conf_to_dataclass(
            OmegaConf.create({"_target_": "sparkjoy.integrations.verl.gated", "strategy": "fsdp2", **changes})
        )

    return made


@pytest.mark.parametrize(
    ("changes", "gate"),
    [
        ({}, "None"),
        ({"gate_rate": 1.0}, "None"),
        ({"gate_noise": 0.3}, "UnbiasedGate(noise=0.3)"),
        ({"gate_noise": 0}, "UnbiasedGate(rate=1)"),
        ({"gate_rate": 0.1, "gate_price": 0}, "KondoGate(rate=0.1, price=0)"),
    ],
)
def test_options_describe_a_gate(options, changes, gate):
    made = options(**changes)
    assert str(made.gate()) == gate
    assert made.strategy == "fsdp2"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gate_noise": 0.3, "gate_rate": 0.1}, "finds its own rate"),
        ({"gate_noise": -1}, "noise is -1"),
        ({"gate_rate": 2}, "rate is 2"),
        ({"tensor_model_parallel_size": 2, "gate_rate": 0.1}, "such as Megatron's"),
    ],
)
def test_wrong_options_are_refused_when_the_configuration_is_made(options, changes, said):
    with pytest.raises(Exception, match=said):  # hydra's own, with our sentence in it
        options(**changes)


def test_another_engine_in_its_place_is_refused(options, monkeypatch):
    monkeypatch.setenv("VERL_ENGINE_DEVICE", "cuda")
    with pytest.raises(Exception, match="without the gate; unset VERL_ENGINE_DEVICE"):
        options(gate_rate=0.1)


@pytest.mark.parametrize(
    ("gate", "actor", "batch", "said"),
    [
        ({"gate_rate": 0.1}, {"use_kl_loss": True, "kl_loss_coef": 0.1}, {}, "kl_loss_coef=0.1"),
        ({"gate_price": 0}, {"entropy_coeff": 0.01}, {}, "entropy_coeff=0.01"),
        ({"gate_noise": 1}, {"policy_loss": {"loss_mode": "clip_cov"}}, {}, "covariance"),
        ({"gate_rate": 0.5}, {"policy_loss": {"loss_mode": "geo_mean"}}, {}, "mean over the rows of each"),
        (
            {"gate_rate": 0.5},
            {"policy_loss": {"loss_mode": "bypass_mode", "rollout_correction": {"rollout_is_batch_normalize": True}}},
            {},
            "rollout_is_batch_normalize=True",
        ),
        ({"gate_noise": 1}, {"use_prefix_grouper": True}, {}, "use_prefix_grouper=False"),
        ({"gate_noise": 1}, {"loss_agg_mode": "seq-mean-token-sum-norm"}, {}, "loss_scale_factor"),
        ({"gate_noise": 1}, {}, {"return_model_output": True}, "return_model_output=True"),
        ({"gate_noise": 1}, {}, {"force_group_size": 2}, "kept whole"),
        ({"gate_noise": 1}, None, {}, "ppo_loss alone"),
    ],
)
def test_what_needs_every_row_is_refused_before_anything_is_run(options, gate, actor, batch, said):
    import verl_cases

    from sparkjoy.integrations.verl import GatedFSDPEngine

    engine = object.__new__(GatedFSDPEngine)  # no processes: it is refused before any is asked
    engine._gate = options(**gate).gate()
    loss = partial(print) if actor is None else verl_cases.actor_loss(**actor)
    with pytest.raises(ValueError, match=said):
        engine.forward_backward_batch(verl_cases.mini_batch(**batch), loss)


def test_sequences_split_over_ranks_are_refused(options, monkeypatch):
    from sparkjoy.integrations import verl

    def init(self, config):
        self.engine_config, self.ulysses_sequence_parallel_size = config, 2

    monkeypatch.setattr(verl.FSDPEngineWithLMHead, "__init__", init)
    verl.GatedFSDPEngine(options())
    with pytest.raises(ValueError, match="ulysses_sequence_parallel_size=2"):
        verl.GatedFSDPEngine(options(gate_price=0))


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip


def test_trl_beside_verl_is_one_sentence(tmp_path):
    info = tmp_path / "trl-1.16.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: trl\nVersion: 1.16.0\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    said = run("import sparkjoy.integrations.verl", PYTHONPATH=path).stderr
    assert "ImportError: verl 0.9 builds no model where TRL 1.14 or later is installed" in said


def test_sparkjoy_alone_imports_nothing_of_it():
    done = run("import sys, sparkjoy; print([name for name in ('verl', 'ray', 'tensordict') if name in sys.modules])")
    assert done.stdout.strip() == "[]"
