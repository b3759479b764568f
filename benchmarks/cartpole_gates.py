"""What examples/01_your_own_loop.py learns with another gate, and how its gradient compares with the dense one.

pip install -e . gymnasium
python benchmarks/cartpole_gates.py                       # five seeds of three arms, in a few minutes
python benchmarks/cartpole_gates.py --seeds 0 --arms "delight 3%"
"""

import contextlib
import io
import runpy
import statistics
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import sparkjoy as sj
from sparkjoy.gradients import Comparison
from sparkjoy_lab.bench.timing import options
from sparkjoy_lab.training.tracking import write_json

EXAMPLE = Path(__file__).parents[1] / "examples" / "01_your_own_loop.py"
ARMS: dict[str, Callable[[], sj.Gate | None]] = {
    "dense": lambda: None,
    "noise 0.1": lambda: sj.UnbiasedGate(noise=0.1),
    "noise 0.3": lambda: sj.UnbiasedGate(noise=0.3),
    "noise 1": lambda: sj.UnbiasedGate(noise=1),
    "delight 3%": lambda: sj.KondoGate(rate=0.03),
    "delight 20%": lambda: sj.KondoGate(rate=0.2),
    "delight 50%": lambda: sj.KondoGate(rate=0.5),
}


def play(arm: str, seed: int, iterations: int) -> tuple[int, list[Comparison], bool]:
    """The return that the example prints last, its comparisons with the dense gradient, and the warnings."""
    found: list[Comparison] = []

    class Watched(sj.GatedBackward):
        def __init__(self, gate: sj.Gate | None) -> None:
            super().__init__(ARMS[arm](), compare_every=2)

        def __call__(self, *args: Any, **kwargs: Any) -> sj.BackwardReport:
            report = super().__call__(*args, **kwargs)
            if report.comparison is not None:
                found.append(report.comparison)
            return report

    arguments = [str(EXAMPLE), "--seed", str(seed), "--iterations", str(iterations)]
    said = io.StringIO()
    with (
        patch.object(sj, "GatedBackward", Watched),
        patch.object(sys, "argv", arguments),
        warnings.catch_warnings(record=True) as caught,
        contextlib.redirect_stdout(said),
    ):
        warnings.simplefilter("always")
        runpy.run_path(str(EXAMPLE))
    last = said.getvalue().splitlines()[-1]
    warned = any("does not follow the dense gradient" in str(warning.message) for warning in caught)
    return int(last.split("return ")[1].split(",")[0]), found, warned


def mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.mean(known):+.2f}" if known else "-"


def main() -> None:
    parser = options(__doc__, arms=ARMS)
    parser.set_defaults(arms=["dense", "noise 0.3", "delight 3%"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--iterations", type=int, default=40)
    given = parser.parse_args()
    results = {}
    for arm in given.arms:
        returns: list[int] = []
        comparisons: list[Comparison] = []
        warned = 0
        for seed in given.seeds:
            reached, found, warning = play(arm, seed, given.iterations)
            returns, comparisons, warned = [*returns, reached], comparisons + found, warned + warning
            print(f"{arm}, seed {seed}: return {reached}", file=sys.stderr, flush=True)
        results[arm] = {"returns": returns, "comparisons": [asdict(found) for found in comparisons], "warned": warned}
        figures = " ".join(
            f"{name} {mean([getattr(comparison, name) for comparison in comparisons])}"
            for name in ("cosine", "relative_error", "norm_ratio")
        )
        print(
            f"{arm}: returns {returns}, mean {statistics.mean(returns):.0f}; {figures}; warned in {warned}", flush=True
        )
    if given.out is not None:
        write_json(given.out, results)


if __name__ == "__main__":
    main()
