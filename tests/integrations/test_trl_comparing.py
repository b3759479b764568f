"""Comparing under TRL: the figures are those of two trainers run apart, and the step is what it is without."""

from types import SimpleNamespace

import pytest
import torch
import trl_task
from trl_cases import SETTINGS, Dense, relative_error, trained, trainer

from sparkjoy.gradients import WINDOW
from sparkjoy.integrations.trl import KondoGRPOConfig, KondoGRPOTrainer

FIGURES = {"gate/cosine", "gate/relative_error", "gate/norm_ratio"}


def weights(made):
    return torch.cat([parameter.detach().flatten() for parameter in made.model.parameters()])


def logs(made):
    return [entry for entry in made.state.log_history if "loss" in entry]


class Noting(KondoGRPOTrainer):
    """Notes the weights at the beginning of every optimizer step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.began = []

    def training_step(self, *args):
        if self._step % self.args.gradient_accumulation_steps == 0:
            self.began.append([parameter.detach().clone() for parameter in self.model.parameters()])
        return super().training_step(*args)


def following(began):
    """TRL's own trainer, led along the weights of another."""

    class Following(KondoGRPOTrainer):
        def training_step(self, *args):
            if self._step % self.args.gradient_accumulation_steps == 0:
                for parameter, there in zip(self.model.parameters(), began[self.state.global_step], strict=True):
                    parameter.data.copy_(there)
            return super().training_step(*args)

    return Following


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": "dapo"},
        {"loss_type": "grpo", "gate_pack_for": "memory"},
        {"loss_type": "bnpo", "mask_truncated_completions": True},
        {"loss_type": "grpo", "gate_rate": None, "gate_noise": 0.5, "beta": 0.5, "entropy_coef": 0.3, "lora": True},
        {"loss_type": "cispo", "gate_dg": "token"},
        {"steps_per_generation": 8, "max_steps": 2},
        {"loss_type": "bnpo", "num_iterations": 2, "max_steps": 2},
        {"loss_type": "grpo", "gradient_accumulation_steps": 2, "gate_price": 1e9},  # none is kept
        *(
            pytest.param({"loss_type": "bnpo"} | SETTINGS[name], marks=pytest.mark.slow)
            for name in ("fewer steps a generation", "neither divides", "checkpointing")
        ),
    ],
    ids=lambda changes: ",".join(f"{name.removeprefix('gate_')}={value}" for name, value in changes.items()),
)
def test_the_figures_are_those_of_two_trainers(tmp_path, changes):
    changes = {"gate_rate": 0.3} | changes
    made, gated = trained(tmp_path, cls=Noting, gate_compare_every=1, **changes)
    own = {name: value for name, value in changes.items() if not name.startswith("gate_") or name == "gate_dg"}
    _, dense = trained(tmp_path, cls=following(made.began), **own)
    assert len(gated) == len(dense) == len(logs(made)) == changes.get("max_steps", 1)
    for g, d, log in zip(gated, dense, logs(made), strict=True):
        assert d.norm() > 1e-3
        assert log["gate/relative_error"] == pytest.approx(relative_error(g, d), rel=1e-4)
        assert log["gate/norm_ratio"] == pytest.approx((g.norm() / d.norm()).item(), rel=1e-4)
        if g.norm() > 0:
            assert log["gate/cosine"] == pytest.approx(torch.cosine_similarity(g, d, dim=0).item(), rel=1e-4)
        else:
            assert "gate/cosine" not in log


def test_where_everything_is_kept_both_are_the_same(tmp_path):
    made, _ = trained(tmp_path, gate_noise=1e-9, gate_compare_every=1)
    log = logs(made)[0]
    assert (log["gate/kept_rate"], log["gate/micro_steps"]) == (1, 4)  # TRL's own step
    assert (log["gate/cosine"], log["gate/relative_error"]) == (pytest.approx(1), pytest.approx(0, abs=1e-6))


@pytest.mark.parametrize(
    "changes",
    [
        {"gate_rate": 0.3},
        {"gate_noise": 0.5, "steps_per_generation": 8, "beta": 0.5, "lora": True},
        {"gate_rate": 0.3, "num_iterations": 2, "gate_empty_step": "momentum"},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_the_step_and_its_log_are_what_they_are_without(tmp_path, changes):
    """With dropout, so that passes draw; all of it to the bit."""
    changes = {"max_steps": 3, "optim": "adamw_torch", "learning_rate": 1e-2, "max_grad_norm": 1.0} | changes
    runs = []
    for every in (None, 2):
        model = trl_task.model()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.2
        made, steps = trained(tmp_path, model=model, gate_compare_every=every, **changes)
        runs.append((made, steps, torch.get_rng_state()))
    (bare, expected, state), (compared, given, left) = runs
    assert torch.equal(weights(compared), weights(bare))
    assert torch.equal(torch.stack(given), torch.stack(expected))
    assert torch.equal(left, state)
    moments = [
        torch.cat([moment.flatten() for entry in made.optimizer.state.values() for moment in entry.values()])
        for made in (bare, compared)
    ]
    assert torch.equal(*moments)
    timed = ("step_time", "gate/screen_seconds")
    for number, (ours, theirs) in enumerate(zip(logs(compared), logs(bare), strict=True), start=1):
        assert set(ours) - set(theirs) == (set() if number % 2 else FIGURES)
        assert [ours[name] for name in theirs if name not in timed] == [
            value for name, value in theirs.items() if name not in timed
        ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own, which `warns` passes on
def test_after_twenty_it_warns_and_a_resumed_run_too(tmp_path):
    changes = {
        "gate_price": 1e9,
        "gate_compare_every": 1,
        "cls": Dense,
        "save_strategy": "steps",
        "save_steps": WINDOW - 1,
    }
    made, _ = trainer(tmp_path, max_steps=WINDOW, **changes)
    with pytest.warns(UserWarning, match=r"does not follow the dense gradient.*set gate_noise=0.3, whose"):
        made.train()
    resumed, _ = trainer(tmp_path, max_steps=WINDOW, **changes)
    with pytest.warns(UserWarning, match="does not follow"):
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{WINDOW - 1}"))
    assert resumed._gate_comparisons.state_dict()["seen"] == WINDOW


def test_a_reward_that_leaves_the_policy_evaluating_hides_no_micro_batch(tmp_path):
    logged = []
    for leaves in (False, True):
        policy = trl_task.model()

        def reward(prompts, completions, policy=policy, leaves=leaves, **_):
            policy.train(not leaves)
            return trl_task.copied(prompts, completions)

        changes = {"gate_rate": 0.3, "gate_compare_every": 1, "arguments": {"reward_funcs": reward}}
        made, _ = trained(tmp_path, model=policy, **changes)
        logged.append([logs(made)[0][name] for name in sorted(FIGURES)])
    assert logged[0] == logged[1]


@pytest.mark.parametrize("every", [0, -1, 1.5])
def test_every_is_a_number_of_steps(tmp_path, every):
    with pytest.raises(ValueError, match=f"gate_compare_every is {every}; expected a whole number of steps"):
        KondoGRPOConfig(**trl_task.options(output_dir=str(tmp_path), gate_rate=0.1, gate_compare_every=every))


@pytest.mark.parametrize(
    ("set_up", "message"),
    [
        ({"num_processes": 2}, "with several processes, FSDP or DeepSpeed"),
        ({"is_deepspeed_enabled": True}, "with several processes, FSDP or DeepSpeed"),
        ({"is_fsdp_enabled": True, "is_fsdp2": True}, "with several processes, FSDP or DeepSpeed"),
        ({"mixed_precision": "fp16"}, "with float16"),
    ],
    ids=lambda case: next(iter(case)) if isinstance(case, dict) else "",
)
def test_where_it_is_not_proven_it_is_refused(tmp_path, set_up, message):
    class SetUp(KondoGRPOTrainer):
        def _refuse_unproven_setups(self):
            own = self.accelerator
            self.accelerator = SimpleNamespace(num_processes=1, is_fsdp2=False, mixed_precision="no")
            for name, value in set_up.items():
                setattr(self if name.startswith("is_") and name != "is_fsdp2" else self.accelerator, name, value)
            super()._refuse_unproven_setups()
            self.accelerator = own

    changes = {"cls": SetUp, "gate_rate": 0.1, "gate_empty_step": "momentum"}
    trainer(tmp_path, **changes)  # the gate alone goes with it
    with pytest.raises(ValueError, match=f"gate_compare_every=5 is not proven {message}"):
        trainer(tmp_path, gate_compare_every=5, **changes)
