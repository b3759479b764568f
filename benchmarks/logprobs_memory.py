"""Seconds and peak memory of one training step: all logits at once, in chunks, and torch's own chunks.

    python benchmarks/logprobs_memory.py --out out/logprobs_memory.json

A GPT-2-shaped decoder with tied embeddings and random weights; forward and backward pass of a policy-gradient loss.
Each arm's memory is measured in a process of its own, above weights, gradients and optimizer state; its seconds in
turns with the other arms within one process, CPU seconds on one thread. Every chunked arm has the same chunks, 64 MiB
of logits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2Model

from sparkjoy_lab.bench.timing import collect, machine, median, options, print_table, ratio, turns
from sparkjoy_lab.studies.memory import Step, peak_memory
from sparkjoy_lab.training.tracking import write_json

CHUNK_LOGITS = 64 * 2**20 // 4  # 64 MiB in float32

COLUMNS = {"seconds": "8.3f", "ratio": "6.2f", "MB": "7.0f", "MB ratio": "9.2f", "tensors MB": "10.0f"}


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """All logits, a log-softmax, and the taken token's: what research code does."""
    log_probs = F.linear(hidden, weight).log_softmax(dim=-1)
    return log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def torchs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """torch 2.13's chunks; its own choice of their size is slower on a CPU."""
    chunk = torch.nn.LinearCrossEntropyOptions(
        batch_chunk_size=max(1, CHUNK_LOGITS // len(weight)), chunking_method=None
    )
    loss = F.linear_cross_entropy(hidden.flatten(0, -2), weight, targets.flatten(), reduction="none", options=chunk)
    return -loss.view(targets.shape)


def checkpointed(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The recipe of ten lines: each chunk of positions under torch's activation checkpointing."""
    chunk = max(1, CHUNK_LOGITS // len(weight))
    parts = zip(hidden.flatten(0, -2).split(chunk), targets.flatten().split(chunk), strict=True)
    return torch.cat([checkpoint(full_logits, h, weight, t, use_reentrant=False) for h, t in parts]).view(targets.shape)


ARMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "full logits": full_logits,
    "chunks checkpointed": checkpointed,
}
if hasattr(F, "linear_cross_entropy"):
    ARMS["torch's linear_cross_entropy"] = torchs


def model_step(vocabulary: int, rows: int, width: int, layers: int, tokens: int = 128) -> Callable[[str], None]:
    """What takes one step by the arm named, with gradients and optimizer state in place."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=vocabulary, n_embd=width, n_layer=layers, n_head=width // 64, n_positions=tokens + 1)
    config.bos_token_id = config.eos_token_id = None
    model = GPT2Model(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    sequences = torch.randint(vocabulary, (rows, tokens + 1))
    advantages = torch.randn(rows, 1)

    def step(arm: str) -> None:
        optimizer.zero_grad(set_to_none=False)
        hidden = model(sequences[:, :-1], use_cache=False).last_hidden_state
        log_probs = ARMS[arm](hidden, model.wte.weight, sequences[:, 1:])
        (-(advantages * log_probs).sum() / log_probs.numel()).backward()

    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return step


def prepare(arm: str, *shape: int) -> Step:
    """One step of an arm, for a process of its own."""
    return partial(model_step(*shape), arm)


def measure(arms: list[str], shape: tuple[int, ...], rounds: int, threads: int) -> dict[str, dict[str, Any]]:
    """Of every arm, seconds and bytes of a step, and their ratios to the first arm's, within a round."""
    torch.set_num_threads(threads)
    found: dict[str, dict[str, Any]] = {arm: {"seconds": math.nan, "ratio": math.nan} for arm in arms}
    if rounds:
        step = model_step(*shape)
        clock = time.process_time if threads == 1 else time.perf_counter  # whatever else the machine does
        seconds, _ = collect(turns({arm: partial(step, arm) for arm in arms}, rounds, warm_up=1, clock=clock))
        del step
        for arm in arms:
            found[arm] = {"seconds": median(seconds[arm]), "ratio": ratio(seconds[arm], seconds[arms[0]])}
    for arm in arms:
        peak = peak_memory(prepare, arm, *shape, threads=threads)
        found[arm] |= asdict(peak) | {"MB": (peak.resident or 0) / 1e6, "tensors MB": (peak.tensors or 0) / 1e6}
        found[arm]["MB ratio"] = found[arm]["MB"] / found[arms[0]]["MB"]
    return found


def main() -> None:
    parser = options(__doc__, rounds=5, arms=ARMS)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[8192, 50257])
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 7, 16], help="rows of 128 tokens in a micro-batch")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    lines: list[dict[str, Any]] = []
    for vocabulary in given.vocabularies:
        for rows in given.rows:
            shape = (vocabulary, rows, given.width, given.layers)
            found = measure(given.arms, shape, given.rounds, given.threads)
            print_table(f"{vocabulary:,} tokens, {rows} rows", found, COLUMNS)
            lines += [{"vocabulary": vocabulary, "rows": rows, "arm": arm, **row} for arm, row in found.items()]
    if given.out is not None:
        sizes = {"width": given.width, "layers": given.layers, "rounds": given.rounds}
        write_json(given.out, {"setup": machine() | sizes, "lines": lines})


if __name__ == "__main__":
    main()
