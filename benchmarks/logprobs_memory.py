"""Seconds and peak memory of one training step: all logits at once, in chunks, and torch's own chunks.

    python benchmarks/logprobs_memory.py --out out/logprobs_memory.json

A GPT-2-shaped decoder with tied embeddings and random weights; forward and backward pass of a policy-gradient loss.
Each arm's memory is measured in a process of its own, above weights, gradients and optimizer state; its seconds in
turns with the other arms within one process.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2Model

from sparkjoy.lab.studies.memory import Step, peak_memory
from sparkjoy.lab.training.tracking import write_json
from sparkjoy.logprobs import token_log_probs

FULL, CHUNKED, TORCHS = "full logits", "token_log_probs", "torch's linear_cross_entropy"


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """All logits, a log-softmax, and the taken token's: what research code does."""
    log_probs = F.linear(hidden, weight).log_softmax(dim=-1)
    return log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def torchs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """torch 2.13's chunks, with as many positions each as ours: its own choice of size is slower on a CPU."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=max(1, 2**24 // len(weight)), chunking_method=None)
    loss = F.linear_cross_entropy(hidden.flatten(0, -2), weight, targets.flatten(), reduction="none", options=options)
    return -loss.view(targets.shape)


ARMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    FULL: full_logits,
    CHUNKED: token_log_probs,
    TORCHS: torchs,
}


def prepare(arm: str, vocabulary: int, rows: int, width: int = 384, layers: int = 6, tokens: int = 128) -> Step:
    """One step of an arm, with gradients and optimizer state in place."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=vocabulary, n_embd=width, n_layer=layers, n_head=width // 64, n_positions=tokens + 1)
    model = GPT2Model(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    sequences = torch.randint(vocabulary, (rows, tokens + 1))
    advantages = torch.randn(rows, 1)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        hidden = model(sequences[:, :-1], use_cache=False).last_hidden_state
        log_probs = ARMS[arm](hidden, model.wte.weight, sequences[:, 1:])
        (-(advantages * log_probs).sum() / log_probs.numel()).backward()

    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return step


def seconds(arms: tuple[str, ...], rounds: int, *shape: int) -> dict[str, dict[str, float]]:
    """Of every arm the median seconds of a step and the median ratio to the first arm's within a round."""
    if rounds == 0:
        return {arm: {"seconds": math.nan, "ratio": math.nan} for arm in arms}
    steps = {arm: prepare(arm, *shape) for arm in arms}
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm, step in steps.items():
            start = time.perf_counter()
            step()
            times[arm].append(time.perf_counter() - start)
    first = np.array(times[arms[0]])
    return {
        arm: {"seconds": float(np.median(of_arm)), "ratio": float(np.median(np.array(of_arm) / first))}
        for arm, of_arm in times.items()
    }


def measure(vocabulary: int, rows: int, width: int, layers: int, rounds: int, threads: int) -> list[dict[str, Any]]:
    """One line for each arm, ratios to full logits."""
    torch.set_num_threads(threads)
    arms = tuple(arm for arm in ARMS if arm != TORCHS or hasattr(F, "linear_cross_entropy"))
    shape = (vocabulary, rows, width, layers)
    timed = seconds(arms, rounds, *shape)
    lines = []
    for arm in arms:
        peak = peak_memory(prepare, arm, *shape, threads=threads)
        lines.append({"vocabulary": vocabulary, "rows": rows, "arm": arm, **timed[arm], **asdict(peak)})
    for line in lines:
        for counted in ("resident", "tensors"):
            line[f"{counted}_ratio"] = line[counted] / lines[0][counted]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[8192, 50257])
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 7, 16], help="rows of 128 tokens in a micro-batch")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5, help="rounds timed; 0: memory only")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    given = parser.parse_args()
    lines = []
    print(f"{'vocabulary':>10} {'rows':>5} {'arm':30} {'s':>7} {'ratio':>6} {'MB':>7} {'ratio':>6} tensors MB ratio")
    for vocabulary in given.vocabularies:
        for rows in given.rows:
            for line in measure(vocabulary, rows, given.width, given.layers, given.rounds, given.threads):
                lines.append(line)
                print(
                    f"{vocabulary:10} {rows:5} {line['arm']:30} {line['seconds']:7.3f} {line['ratio']:6.2f} "
                    f"{line['resident'] / 1e6:7.0f} {line['resident_ratio']:6.2f} {line['tensors'] / 1e6:10.0f} "
                    f"{line['tensors_ratio']:5.2f}",
                    flush=True,
                )
    if given.out is not None:
        setup: dict[str, Any] = {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
        setup |= {name: value for name, value in vars(given).items() if name != "out"}
        write_json(given.out, {"setup": setup, "lines": lines})


if __name__ == "__main__":
    main()
