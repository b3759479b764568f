"""A gated loop in several processes, under DistributedDataParallel or FSDP2, that resumes on another number of them.

    torchrun --nproc-per-node 2 examples/03_many_processes.py --iterations 100
    torchrun --nproc-per-node 1 examples/03_many_processes.py --iterations 200         # goes on from there
    torchrun --nproc-per-node 2 examples/03_many_processes.py --iterations 300 --fsdp  # and so does this

Every process draws rows of its own; the gate decides about all of them at one price.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import sparkjoy as sj

parser = argparse.ArgumentParser()
parser.add_argument("--iterations", type=int, default=200)
parser.add_argument("--rows", type=int, default=256, help="of all processes together")
parser.add_argument("--rate", type=float, default=0.1)
parser.add_argument("--fsdp", action="store_true", help="shard the weights instead of copying them")
parser.add_argument("--checkpoint", type=Path, default=Path("out/many_processes"))
options = parser.parse_args()


class Policy(nn.Module):
    """Adds two digits: what is wrapped has one method, so forward() gives the log-probs of the actions taken."""

    def __init__(self):
        super().__init__()
        self.digits = nn.Embedding(20, 64)
        self.hidden = nn.Linear(64, 128)
        self.out = nn.Linear(128, 19)

    def forward(self, rows, sample=False):
        every = self.out(self.hidden(self.digits(rows["digits"]).sum(1)).relu()).log_softmax(1)
        if sample:
            rows["actions"] = torch.multinomial(every.exp(), 1)
        return every.gather(1, rows["actions"]).sum(1)


def train():
    rank, count = dist.get_rank(), dist.get_world_size()
    if options.rows % count:
        raise SystemExit(f"--rows {options.rows}: expected a multiple of the {count} processes.")
    torch.manual_seed(0)  # the same weights everywhere
    module = Policy()
    if options.fsdp:
        for layer in (module.digits, module.hidden, module.out, module):
            fully_shard(layer)
    else:
        module = DistributedDataParallel(module)
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    done = load(module, optimizer)
    step = sj.GatedBackward(sj.KondoGate(rate=options.rate), module=module)  # the wrapper, once
    for iteration in range(done, options.iterations):
        torch.manual_seed(iteration * count + rank)  # other rows in every process
        rows = {"digits": torch.randint(10, (options.rows // count, 2))}
        right = rows["digits"].sum(1)
        rows["digits"] = rows["digits"] + torch.tensor([0, 10])
        with torch.no_grad():
            log_probs = module(rows, sample=True)
        rewards = (rows["actions"].squeeze(1) == right).float()
        total = rewards.sum()
        dist.all_reduce(total)  # the baseline is of all rows too
        mean = total / options.rows
        report = step(module, rows, rewards - mean, log_probs=log_probs)
        if report.kept:
            optimizer.step()
            optimizer.zero_grad()
        if rank == 0 and (iteration + 1) % 50 == 0:
            print(
                f"iteration {iteration + 1}, {count} processes: {100 * mean:.0f}% right, kept {report.kept} of "
                f"{report.total} rows at price {report.decision.price or 0:.2f}, {report.backward_rows} of them here",
                flush=True,
            )
    save(module, optimizer)


def save(module, optimizer):
    """Every process writes its part; the names do not depend on how the module is wrapped."""
    model, optim = get_state_dict(module, optimizer)
    state = {"model": model, "optimizer": optim, "iterations": options.iterations}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(options.checkpoint, overwrite=True))


def load(module, optimizer):
    """Iterations done: read into the shards of however many processes there are now."""
    if not (options.checkpoint / ".metadata").exists():
        return 0
    model, optim = get_state_dict(module, optimizer)
    state = {"model": model, "optimizer": optim, "iterations": 0}
    dcp.load(state, checkpoint_id=options.checkpoint)
    set_state_dict(module, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return state["iterations"]


if __name__ == "__main__":
    dist.init_process_group("gloo")  # "nccl" on GPUs
    try:
        train()
    finally:
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # at once: threads of torch now and then abort the interpreter's own way out
