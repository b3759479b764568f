"""Is a forward pass in fewer bits quicker on this CPU? The matrix products of one transformer block, beside float32.

    python benchmarks/low_precision.py

int8 weights are those of torch's dynamic quantisation, which a policy that learns would need anew at every step: the
time of that stands beside it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from sparkjoy_lab.bench.timing import collect, machine, median, options, print_table, ratio, turns
from sparkjoy_lab.training.tracking import write_json

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


def main() -> None:
    given = options(__doc__, rounds=15).parse_args()
    torch.set_num_threads(1)
    results: list[dict[str, Any]] = []
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
            seconds, _ = collect(turns(arms, given.rounds))
        rows = {
            name: {"ms": 1000 * median(values), "x float32": ratio(values, seconds["float32"])}
            for name, values in seconds.items()
        }
        print_table(f"width {width}, {tokens} tokens", rows, {"ms": "8.2f", "x float32": "10.2f"})
        results.append({"width": width, "tokens": tokens, "arms": rows})
    if given.out is not None:
        write_json(given.out, {"setup": machine(), "sizes": results})


if __name__ == "__main__":
    main()
