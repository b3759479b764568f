"""The example in verl's own trainer: Ray, its queue, two workers, a reference, and a sampler in vLLM's place."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from launching import kill, start

ROOT = Path(__file__).parents[2]
ACTOR = "actor_rollout_ref.actor"
ON_A_CPU = [
    "data.train_batch_size=8", "data.val_batch_size=8", "data.max_prompt_length=8", "data.max_response_length=6",
    "data.dataloader_num_workers=0", "data.filter_overlong_prompts=False",
    "actor_rollout_ref.model.use_remove_padding=False", "actor_rollout_ref.model.enable_gradient_checkpointing=False",
    "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
    f"{ACTOR}.ppo_mini_batch_size=4", f"{ACTOR}.ppo_max_token_len_per_gpu=64", f"{ACTOR}.optim.lr=0.01",
    f"{ACTOR}.use_torch_compile=False", f"{ACTOR}.fsdp_config.use_torch_compile=False",
    *(
        f"+actor_rollout_ref.{role}.fsdp_config.mixed_precision.{kind}_dtype=fp32"
        for role in ("actor", "ref")
        for kind in ("param", "reduce", "buffer")
    ),
    f"{ACTOR}.use_kl_loss=True", f"{ACTOR}.kl_loss_coef=0.1", f"{ACTOR}.entropy_coeff=0.01",
    "actor_rollout_ref.ref.fsdp_config.use_torch_compile=False",
    "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=64",
    "actor_rollout_ref.rollout.name=stub", "actor_rollout_ref.rollout.n=4",
    "actor_rollout_ref.rollout.agent.num_workers=1", "actor_rollout_ref.rollout.free_cache_engine=False",
    f"reward.custom_reward_function.path={Path(__file__).with_name('v1_data.py')}",
    "reward.custom_reward_function.name=share_of_letter", "reward.num_workers=1",
    "trainer.device=cpu", "trainer.n_gpus_per_node=2", "trainer.val_before_train=False", "trainer.test_freq=-1",
    "trainer.save_freq=3", "trainer.total_training_steps=3",
    "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
    "ray_kwargs.ray_init.num_cpus=16", "+ray_kwargs.ray_init.num_gpus=2",
    "+ray_kwargs.ray_init.include_dashboard=False",
]  # fmt: skip


def run(folder):
    """What the example printed."""
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "MODEL": str(folder), "DATA": str(folder), "VERL_PLATFORM": "cpu", "RAY_USAGE_STATS_ENABLED": "0",
        "VERL_USE_EXTERNAL_MODULES": "cpu_platform,stub_rollout", "PYTHONWARNINGS": "ignore",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    log = folder / "log"
    command = [
        "bash",
        ROOT / "examples" / "06_verl.sh",
        *ON_A_CPU,
        f"trainer.default_local_dir={folder}/out",
        f"hydra.run.dir={folder}",
    ]
    process = start(command, environment, log)
    try:
        assert process.wait(timeout=400) == 0, log.read_text()[-3000:]
    except subprocess.TimeoutExpired:
        pytest.fail(log.read_text()[-3000:])
    finally:
        kill(process)
    return log.read_text()


def test_verls_own_trainer_trains_on_what_the_gate_keeps(tmp_path):
    subprocess.run([sys.executable, "-W", "ignore", Path(__file__).with_name("v1_data.py"), tmp_path], check=True)
    said = run(tmp_path)
    figures = {name: list(map(float, re.findall(rf"actor/gate/{name}:([\d.e-]+)", said))) for name in
               ("kept_rate", "teaching_rate", "backward_tokens", "tokens", "noise", "micro_batches")}  # fmt: skip
    assert [len(values) for values in figures.values()] == [3] * 6
    assert all(
        0 < kept <= teaching for kept, teaching in zip(figures["kept_rate"], figures["teaching_rate"], strict=True)
    )
    assert sum(figures["kept_rate"]) / 3 < 0.8
    assert figures["tokens"] == [128.0] * 3  # 4 prompts of 4 answers, each of 2 tokens and 6
    assert all(
        tokens == 128 * rate for tokens, rate in zip(figures["backward_tokens"], figures["kept_rate"], strict=True)
    )
    assert (
        max(map(float, re.findall(r"training/rollout_probs_diff_max:([\d.e-]+)", said))) < 1e-5
    )  # it sent its weights
    saved = tmp_path / "out" / "global_step_3" / "actor"
    assert sorted(file.name for file in saved.glob("gate*")) == ["gate_rank_0.pt", "gate_rank_1.pt"]
