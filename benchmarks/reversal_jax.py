"""A DG update on token reversal in torch beside the same update jitted by JAX, on one core.

    python benchmarks/reversal_jax.py --jax-python VENV/bin/python --out out/reversal_jax.json

100 answers (10 prompts x 10 answers), papers' size. The JAX side is made like the author's published code (flax layers,
optax, prompt and whole answer of every row read, no norm before the output layer), without its logging; torch is our
policy as `sparkjoy train` runs it. Two processes take turns on one core, some seconds each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

LAYERS, WIDTH, HEADS, FEED_FORWARD, VOCABULARY = 3, 64, 4, 128, 2
PROMPTS, ANSWERS = 10, 10
LEARNING_RATE = 3e-4
XLA_FLAGS = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


def torch_update(length: int) -> Callable[[], float]:
    """An update through the policy, the loss and Adam."""
    import torch

    from sparkjoy.losses import delightful
    from sparkjoy_lab.tasks.reversal import ReversalConfig, ReversalTask

    torch.set_num_threads(1)
    torch.manual_seed(0)
    task = ReversalTask(ReversalConfig(prompt_length=length))
    policy = task.policy()
    optimizer = torch.optim.Adam(policy.parameters(), LEARNING_RATE, fused=True)
    rollout = task.rollout(policy, torch.Generator().manual_seed(0), graph=False)
    loss = delightful()

    def update() -> float:
        mean = loss(policy.log_probs(rollout.batch), rollout.advantages, None, None).mean()
        mean.backward()
        optimizer.step()
        optimizer.zero_grad()
        return mean.item()

    return update


def jax_update(length: int) -> Callable[[], float]:
    """An update as the author's code makes it: his network's layers in flax, his loss, optax, all jitted."""
    try:
        import flax.linen as nn
        import jax
        import jax.numpy as jnp
        import optax
    except ImportError as error:
        sys.exit(f"{error}: run `pip install flax` for {sys.executable}, or name another Python by --jax-python.")

    class Network(nn.Module):  # type: ignore[misc]
        @nn.compact  # type: ignore[untyped-decorator]
        def __call__(self, tokens: Any) -> Any:
            hidden = nn.Embed(VOCABULARY, WIDTH)(tokens) + nn.Embed(2 * length, WIDTH)(jnp.arange(tokens.shape[1]))
            causal = nn.make_causal_mask(tokens)
            for _ in range(LAYERS):
                normed = nn.LayerNorm(use_bias=False)(hidden)
                attention = nn.MultiHeadDotProductAttention(num_heads=HEADS, use_bias=False)
                hidden = hidden + attention(normed, normed, normed, mask=causal)
                active = nn.relu(nn.Dense(FEED_FORWARD, use_bias=False)(nn.LayerNorm(use_bias=False)(hidden)))
                hidden = hidden + nn.Dense(WIDTH, use_bias=False)(active)
            return nn.Dense(VOCABULARY, use_bias=False)(hidden)

    network, optimizer = Network(), optax.adam(LEARNING_RATE)

    def dg_loss(model: Any, prompts: Any, answers: Any, rewards: Any) -> Any:
        sequence = jnp.concatenate([prompts, answers], axis=1)
        every = jax.nn.log_softmax(network.apply(model, sequence)[:, length - 1 : -1])
        taken = jnp.take_along_axis(every, answers[:, :, None], axis=2)[:, :, 0]
        of_prompt = rewards.reshape(PROMPTS, ANSWERS)
        advantages = (of_prompt - of_prompt.mean(1, keepdims=True)).reshape(-1, 1)
        weight = jax.nn.sigmoid(jax.lax.stop_gradient(-taken) * advantages)
        return -(weight * advantages * taken).mean()

    def step(model: Any, state: Any, *batch: Any) -> tuple[Any, Any, Any]:
        loss, gradient = jax.value_and_grad(dg_loss)(model, *batch)
        change, state = optimizer.update(gradient, state)
        return optax.apply_updates(model, change), state, loss

    keys = jax.random.split(jax.random.PRNGKey(0), 3)
    prompts = jax.random.randint(keys[0], (PROMPTS, length), 0, VOCABULARY).repeat(ANSWERS, axis=0)
    answers = jax.random.randint(keys[1], (PROMPTS * ANSWERS, length), 0, VOCABULARY)
    rewards = (answers == prompts[:, ::-1]).mean(1)
    model = network.init(keys[2], jnp.concatenate([prompts, answers], axis=1))
    held = [model, optimizer.init(model)]
    jitted = jax.jit(step, donate_argnums=(0, 1))

    def update() -> float:
        held[0], held[1], loss = jitted(*held, prompts, answers, rewards)
        return float(loss)  # waits for it

    return update


def work(update: Callable[[], float]) -> None:
    """For every line of seconds on stdin, the milliseconds of all updates done in that time, as a line of JSON."""
    for _ in range(10):
        update()
    print("ready", flush=True)
    for line in sys.stdin:
        times = [time.perf_counter()]
        while times[-1] - times[0] < float(line):
            update()
            times.append(time.perf_counter())
        print(json.dumps([1000 * (after - before) for before, after in pairwise(times)]), flush=True)


def start(python: str, side: str, length: int) -> subprocess.Popen[str]:
    command = [python, __file__, "--side", side, "--prompt-length", str(length)]
    environment = {**os.environ, "XLA_FLAGS": XLA_FLAGS, "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=1
    )
    assert process.stdout is not None
    if process.stdout.readline().strip() != "ready":
        sys.exit(f"the {side} side did not start; see above.")
    return process


def turn(process: subprocess.Popen[str], seconds: float) -> float:
    """The median of one turn, in milliseconds."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{seconds}\n")
    process.stdin.flush()
    times: list[float] = json.loads(process.stdout.readline())
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jax-python", default=sys.executable, help="a Python with flax; it needs no torch")
    parser.add_argument("--prompt-length", type=int, default=10, help="H")
    parser.add_argument("--turns", type=int, default=6, help="turns of either side")
    parser.add_argument("--seconds", type=float, default=5, help="seconds a turn")
    parser.add_argument("--core", type=int, default=0, help="the core both run on")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--side", choices=["torch", "jax"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side is not None:
        work({"torch": torch_update, "jax": jax_update}[arguments.side](arguments.prompt_length))
        return
    os.sched_setaffinity(0, {arguments.core})
    pythons = {"torch": sys.executable, "jax": arguments.jax_python}
    processes = {side: start(python, side, arguments.prompt_length) for side, python in pythons.items()}
    medians: dict[str, list[float]] = {side: [] for side in processes}
    for number in range(arguments.turns):
        for side, process in processes.items():
            medians[side].append(turn(process, arguments.seconds))
        print(f"turn {number + 1}: " + ", ".join(f"{side} {values[-1]:.2f} ms" for side, values in medians.items()))
    for process in processes.values():
        process.communicate()
    ratio = statistics.median(mine / other for mine, other in zip(medians["torch"], medians["jax"], strict=True))
    print(f"torch takes {ratio:.2f}x the time of JAX, median of turns")
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"milliseconds": medians, "ratio": ratio}, indent=2) + "\n")


if __name__ == "__main__":
    main()
