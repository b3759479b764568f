"""Seconds of every screener over those of an exact forward pass without a graph, on token reversal.

    python benchmarks/screening_speed.py             # H = 20, the papers' transformer
    python benchmarks/screening_speed.py --large     # H = 5, 14 million parameters in 8 layers

One thread, 100 rows, all arms by turns in one process; medians. "learn" is a draft's lesson from the rows proposed at
four times a rate of 3%, "verify" the exact pass over these.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from sparkjoy.step.batches import take
from sparkjoy_lab.bench.timing import collect, machine, median, options, print_table, ratio, turns
from sparkjoy_lab.drafts import AdvantageOnly, DistilledDraft, LowerPrecision
from sparkjoy_lab.policies.early_exit import EarlyExit
from sparkjoy_lab.tasks.reversal import ReversalConfig, ReversalTask
from sparkjoy_lab.training.tracking import write_json

LARGE = ReversalConfig(prompt_length=5, layers=8, width=384, heads=6, feed_forward=1536)
PROPOSED = 12


def main() -> None:
    parser = options(__doc__, rounds=30)
    parser.add_argument("--large", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    task = ReversalTask(LARGE if arguments.large else ReversalConfig(prompt_length=20))
    policy = task.policy()
    rows = task.rollout(policy, torch.Generator().manual_seed(0), graph=False).batch
    proposed = take(rows, torch.arange(0, 100, 100 // PROPOSED)[:PROPOSED])
    draft = DistilledDraft(task.draft_policy())

    def exact(some: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return policy.log_probs(some)

    arms: dict[str, Callable[[], object]] = {
        "exact": partial(exact, rows),
        "verify": partial(exact, proposed),
        "bfloat16": partial(LowerPrecision(policy), rows),
        "draft": partial(draft, rows),
        "learn": partial(draft.learn, [(proposed, exact(proposed))]),
        "flat": partial(AdvantageOnly(task.actions), rows),
    }
    for layers in range(1, len(policy.layers), 1 if len(policy.layers) < 4 else 2):
        arms[f"early exit, {layers} of {len(policy.layers)}"] = partial(EarlyExit(policy, layers), rows)
    seconds, _ = collect(turns(arms, arguments.rounds))
    result = {
        name: {"ms": 1000 * median(values), "of exact": ratio(values, seconds["exact"])}
        for name, values in seconds.items()
    }
    print_table("medians", result, {"ms": "8.2f", "of exact": "9.3f"})
    if arguments.out is not None:
        write_json(arguments.out, {"setup": machine(), "screeners": result})


if __name__ == "__main__":
    main()
