"""A process of test_processes.py: trains on its share of every batch, method by method."""

import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from launching import leave

from sparkjoy_lab.tasks.reversal import ReversalConfig, ReversalTask
from sparkjoy_lab.training.loop import train
from sparkjoy_lab.training.processes import Share
from sparkjoy_lab.training.settings import Settings

METHODS = {
    "kondo": {"rate": 0.1},
    "zero price, micro-batches": {"price": 0.0, "micro_batch_size": 7},
    "soft": {"price": 0.0, "temperature": 0.1},
    "uniform": {"method": "uniform", "rate": 0.1},
    "dg": {"method": "dg"},
    "ppo": {"method": "ppo"},
    "grpo": {"method": "grpo"},
    "pmpo": {"method": "pmpo"},
}


def run(share, out):
    for name, settings in METHODS.items():
        config = ReversalConfig(prompt_length=4, credit="token" if name == "dg" else "answer")
        task = ReversalTask(config, share)
        train(task, Settings(steps=10, evaluate_every=5, **settings), out / name, asdict(config), share=share)


def main():
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{os.environ['STORE']}", rank=rank, world_size=count)
    try:
        run(Share(rank, count), Path(sys.argv[1]))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
    leave()
