"""A DG update on token reversal in torch beside the same update jitted by JAX, on one core.

    python benchmarks/reversal_jax.py --jax-python VENV/bin/python --out out/reversal_jax.json

100 answers (10 prompts x 10 answers), papers' size. JAX reads prompt and answer of every row, as plain code would;
torch is our policy as `sparkjoy train` runs it. Two processes take turns on one core, some seconds each.
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
    from sparkjoy.tasks.reversal import ReversalConfig, ReversalTask

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
    """The same, one jitted function from weights to weights."""
    try:
        import jax
        import jax.numpy as jnp
    except ImportError:
        sys.exit(f"{sys.executable} has no jax; run `pip install jax` there, or name another one by --jax-python.")

    def weights(key: Any) -> dict[str, Any]:
        keys = iter(jax.random.split(key, 3 + 4 * LAYERS))

        def matrix(rows: int, columns: int) -> Any:
            return jax.random.normal(next(keys), (rows, columns)) * rows**-0.5

        def block() -> dict[str, Any]:
            return {
                "attention_norm": jnp.ones(WIDTH),
                "qkv": matrix(WIDTH, 3 * WIDTH),
                "out": matrix(WIDTH, WIDTH),
                "feed_forward_norm": jnp.ones(WIDTH),
                "up": matrix(WIDTH, FEED_FORWARD),
                "down": matrix(FEED_FORWARD, WIDTH),
            }

        return {
            "tokens": matrix(VOCABULARY, WIDTH),
            "positions": matrix(2 * length - 1, WIDTH),
            "blocks": [block() for _ in range(LAYERS)],
            "norm": jnp.ones(WIDTH),
            "head": matrix(WIDTH, VOCABULARY),
        }

    def normed(hidden: Any, weight: Any) -> Any:
        centred = hidden - hidden.mean(-1, keepdims=True)
        return centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight

    def log_probs(model: dict[str, Any], prompts: Any, answers: Any) -> Any:
        sequence = jnp.concatenate([prompts, answers[:, :-1]], axis=1)
        count, slots = sequence.shape
        hidden = model["tokens"][sequence] + model["positions"][:slots]
        causal = jnp.tril(jnp.ones((slots, slots), bool))
        for block in model["blocks"]:
            qkv = (normed(hidden, block["attention_norm"]) @ block["qkv"]).reshape(count, slots, 3, HEADS, -1)
            queries, keys, values = (qkv[:, :, part].transpose(0, 2, 1, 3) for part in range(3))
            scores = queries @ keys.transpose(0, 1, 3, 2) * (WIDTH // HEADS) ** -0.5
            seen = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf)) @ values
            hidden = hidden + seen.transpose(0, 2, 1, 3).reshape(count, slots, WIDTH) @ block["out"]
            active = jax.nn.relu(normed(hidden, block["feed_forward_norm"]) @ block["up"])
            hidden = hidden + active @ block["down"]
        every = jax.nn.log_softmax(normed(hidden, model["norm"]) @ model["head"])[:, prompts.shape[1] - 1 :]
        return jnp.take_along_axis(every, answers[:, :, None], axis=2)[:, :, 0]

    def dg_loss(model: dict[str, Any], prompts: Any, answers: Any, advantages: Any) -> Any:
        taken = log_probs(model, prompts, answers)
        weight = jax.nn.sigmoid(jax.lax.stop_gradient(-taken) * advantages[:, None])
        return -(weight * advantages[:, None] * taken).mean()

    def step(state: Any, prompts: Any, answers: Any, advantages: Any) -> tuple[Any, Any]:
        model, first, second, count = state
        loss, gradient = jax.value_and_grad(dg_loss)(model, prompts, answers, advantages)
        count = count + 1
        first = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, first, gradient)
        second = jax.tree.map(lambda old, new: 0.999 * old + 0.001 * new**2, second, gradient)

        def moved(weight: Any, mean: Any, square: Any) -> Any:
            root = jnp.sqrt(square / (1 - 0.999**count)) + 1e-8
            return weight - LEARNING_RATE * (mean / (1 - 0.9**count)) / root

        return (jax.tree.map(moved, model, first, second), first, second, count), loss

    keys = jax.random.split(jax.random.PRNGKey(0), 4)
    model = weights(keys[0])
    prompts = jax.random.randint(keys[1], (PROMPTS, length), 0, VOCABULARY).repeat(ANSWERS, axis=0)
    answers = jax.random.randint(keys[2], (PROMPTS * ANSWERS, length), 0, VOCABULARY)
    rewards = (answers == prompts[:, ::-1]).mean(1).reshape(PROMPTS, ANSWERS)
    advantages = (rewards - rewards.mean(1, keepdims=True)).reshape(-1)
    zeros = jax.tree.map(jnp.zeros_like, model)
    held = [(model, zeros, jax.tree.map(jnp.zeros_like, model), jnp.zeros(()))]
    jitted = jax.jit(step, donate_argnums=0)

    def update() -> float:
        held[0], loss = jitted(held[0], prompts, answers, advantages)
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
    parser.add_argument("--jax-python", default=sys.executable, help="a Python with jax; it needs no torch")
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
