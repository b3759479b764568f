"""Is a forward pass in fewer bits quicker on this CPU? The matrix products of one transformer block, beside float32.

    python benchmarks/low_precision.py

int8 weights are those of torch's dynamic quantisation, which a policy that learns would need anew at every step: the
time of that stands beside it.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

ROUNDS = 15
SIZES = ((64, 128, 1000), (384, 1536, 1000))  # width, feed-forward width, tokens


def block(width: int, feed_forward: int) -> nn.Module:
    """The products of a block, one after another."""
    layers = (nn.Linear(width, 3 * width), nn.Linear(3 * width, width), nn.Linear(width, feed_forward), nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(feed_forward, width)).eval()


def quantised(module: nn.Module) -> nn.Module:
    """int8 weights, activations quantised as they come."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in favour of a package that is not installed with torch
        short: nn.Module = torch.ao.quantization.quantize_dynamic(copy.deepcopy(module), {nn.Linear}, dtype=torch.qint8)
    return short


def autocast(module: nn.Module, states: torch.Tensor) -> object:
    """The module with its products in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        return module(states)


def seconds(arms: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Medians over rounds, the arms one after another in each."""
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(ROUNDS + 2):
        for name, run in arms.items():
            began = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(values[2:]) for name, values in taken.items()}


def main() -> None:
    torch.set_num_threads(1)
    for width, feed_forward, tokens in SIZES:
        exact, states = block(width, feed_forward), torch.randn(tokens, width)
        short = quantised(exact)
        brief = copy.deepcopy(exact).bfloat16()

        with torch.no_grad():
            arms: dict[str, Callable[[], object]] = {
                "float32": partial(exact, states),
                "bfloat16 autocast": partial(autocast, exact, states),
                "bfloat16 weights": partial(brief, states.bfloat16()),
                "int8": partial(short, states),
                "int8, quantising": partial(quantised, exact),
            }
            taken = seconds(arms)
        for name, value in taken.items():
            ratio = value / taken["float32"]
            print(f"width {width}, {tokens} tokens: {name}: {1e3 * value:.2f} ms, {ratio:.2f} x float32")


if __name__ == "__main__":
    main()
