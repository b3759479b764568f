"""Each arm at its own best learning rate, chosen on seeds that do not count."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from sparkjoy_lab.training.loop import Record

RunOne = Callable[[float, int, int], Record]
"""`(learning rate, seed, samples allowed) -> the summary of a run`."""


def soonest(rates: Sequence[float], seeds: Sequence[int], samples: int, least: int, run: RunOne) -> float:
    """The rate that reaches the target with the fewest samples over all seeds; among equals the earlier one.

    A rate that has needed more than the best one so far is stopped there.

    Args:
        rates: the first one should be the likeliest: the sooner one is good, the sooner the others have lost.
        seeds: to try each on.
        samples: allowed to a run.
        least: samples of one step: what a run must be allowed at least.
        run: trains to the target.
    """

    def cost(rate: float, bound: float) -> tuple[float, float]:
        """Errors of unsolved seeds, then samples; needing more than `bound` is losing."""
        missed, spent = 0.0, 0
        for seed in seeds:
            allowed = min(samples, bound - spent)
            if allowed < least:
                return math.inf, math.inf
            record = run(rate, seed, int(allowed))
            missed += record["error"] if record["to_target"] is None else 0.0
            spent += record["samples"]
        return missed, spent

    best, fewest = rates[0], (math.inf, math.inf)
    for rate in rates:
        of_rate = cost(rate, math.inf if fewest[0] else fewest[1])
        if of_rate < fewest:
            best, fewest = rate, of_rate
    return best


def most_accurate(rates: Sequence[float], seeds: Sequence[int], samples: int, run: RunOne) -> float:
    """The rate of least error, a mean over the last evaluations and seeds; among equals the earlier one."""
    return min(rates, key=lambda rate: sum(run(rate, seed, samples)["mean_error"] for seed in seeds))
