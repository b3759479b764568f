#!/usr/bin/env bash
# GRPO with verl's own trainer, of which two options are sparkjoy's. On one GPU or more, with vLLM:
#
#     pip install sparkjoy[verl] vllm       # without TRL beside it
#     MODEL=Qwen/Qwen2.5-0.5B-Instruct DATA=~/data/gsm8k bash examples/06_verl.sh trainer.n_gpus_per_node=8
#
# DATA has the train.parquet and test.parquet of verl's examples/data_preprocess/gsm8k.py. What follows on the command
# line goes to verl. Each step's line then says what the gate did, over all ranks:
#
#     actor/gate/kept_rate:0.42 - actor/gate/backward_tokens:31520.0 - actor/gate/noise:0.29 - ...
set -euo pipefail
: "${MODEL:=Qwen/Qwen2.5-0.5B-Instruct}" "${DATA:=$HOME/data/gsm8k}"

gate=(
  actor_rollout_ref.actor.fsdp_config._target_=sparkjoy.integrations.verl.gated
  +actor_rollout_ref.actor.fsdp_config.gate_noise=0.3 # or gate_rate=0.1, or gate_price=0
)

exec python -m verl.trainer.main_ppo \
  algorithm.adv_estimator=grpo \
  data.train_files="$DATA/train.parquet" \
  data.val_files="$DATA/test.parquet" \
  data.train_batch_size=256 \
  data.max_prompt_length=512 \
  data.max_response_length=1024 \
  actor_rollout_ref.model.path="$MODEL" \
  actor_rollout_ref.actor.strategy=fsdp2 \
  actor_rollout_ref.actor.ppo_mini_batch_size=128 \
  actor_rollout_ref.actor.use_dynamic_bsz=True \
  actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384 \
  actor_rollout_ref.rollout.name=vllm \
  actor_rollout_ref.rollout.n=8 \
  actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True \
  actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
  trainer.logger=console \
  trainer.total_epochs=1 \
  "${gate[@]}" "$@"
