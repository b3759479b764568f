"""Put in faults by hand, one at a time, and say which tests catch each: `python .ci/faults.py [number ...]`.

Each fault is a line of the library changed as a slip would change it. A suite that is made quicker has to catch them
all still. The source is put back whatever happens.
"""

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "sparkjoy"
TRL = "tests/integrations/test_trl"
FAULTS = [
    ("gates/kondo.py", "keep = score != 0 if", "keep = score == score if", "tests/test_gates.py tests/step"),
    ("gates/kondo.py", "(score > price)", "(score >= price)", "tests/test_gates.py"),
    (
        "signs.py",
        "math.ceil(rate * total - 1e-9)",
        "math.floor(rate * total)",
        "tests/test_gates.py tests/test_signs.py",
    ),
    (
        "signs.py",
        "rule.floor is None or rule.floor <= 0, not rule.floor",
        "True, not rule.floor",
        "tests/test_signs.py",
    ),
    ("gates/unbiased.py", "torch.where(keep, 1 / probability, 0)", "keep.double()", "tests/test_unbiased.py"),
    ("noise.py", "(allowed + squares[last])", "allowed", "tests/test_noise.py"),
    ("gates/unbiased.py", "self._allowance -= GAIN", "self._allowance += GAIN", "tests/test_noise.py"),
    ("gates/budget.py", "_logit(self.rate) - GAIN", "_logit(self.rate) + GAIN", "tests/test_prices.py"),
    ("scores.py", "return -log_probs.clamp(max=0)", "return -log_probs", "tests/test_scores.py tests/step"),
    (
        "baselines.py",
        "equal = most - least <= largest",
        "equal = most - least < 0 * largest",
        "tests/test_baselines.py",
    ),
    (
        "step/deciding.py",
        "largest).square().sum(dim=1).sqrt()",
        "largest).abs().sum(dim=1)",
        "tests/test_unbiased.py",
    ),
    ("step/deciding.py", "keep = decision.keep & teaches", "keep = decision.keep", "tests/step"),
    ("step/deciding.py", "value = value.where(kept | open_, 0)", "pass", "tests/step/test_draft.py"),
    ("step/passes.py", "else weight[part_rows]", "else weight[: part.total]", "tests/step/test_backward.py"),
    ("step/passes.py", "terms = terms if mask is None else", "terms = terms if True else", "tests/step"),
    ("step/passes.py", "inputs.tokens(log_probs, rows)", "inputs.tokens(log_probs)", "tests/step/test_backward.py"),
    ("step/inputs.py", "slice) else tokens[rows.numpy()]", "slice) else tokens[: len(rows)]", "tests/step"),
    ("step/packing.py", "start += size", "start += size + (start == 0)", "tests/step/test_plan.py"),
    ("step/counts.py", 'self._count("backward", gradient.shape[0]', 'self._count("backward", 1', "tests/step"),
    ("processes/ranks.py", "narrow(0, sum(self._sizes[: self._rank]),", "narrow(0, 0,", "tests/processes"),
    ("gradients.py", "if leaf._post_accumulate_grad_hooks or", "if", "tests/step/test_hooks.py tests/frontier"),
    (
        "integrations/trl/packing.py",
        'batch["gate_weight"] * _divides_by(batch, how)',
        'batch["gate_weight"]',
        f"{TRL}_gradients.py {TRL}_packing.py",
    ),
    (
        "integrations/trl/deciding.py",
        "gate.generator = draws(*place)",
        "gate.generator = draws(0)",
        f"{TRL}_noise.py {TRL}_trainer.py",
    ),
    ("prefix_tree.py", "(rows[1:] == rows[:-1]).cumprod(dim=1)", "rows[1:] == rows[:-1]", "tests/test_prefix_tree.py"),
]


def caught(path: Path, old: str, new: str, tests: str) -> str:
    """The first test that fails with the fault, or an empty string."""
    text = path.read_text()
    if text.count(old) != 1:
        raise SystemExit(f"{path}: {old!r} is there {text.count(old)} times; expected once. Change the list.")
    try:
        path.write_text(text.replace(old, new))
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-n",
            "2",
            "-m",
            "not slow and not timing",
            *tests.split(),
        ]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    finally:
        path.write_text(text)
    failed = [line for line in ran.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].split(" - ")[0] if failed else ""


def main() -> None:
    numbers = [int(number) for number in sys.argv[1:]] or range(1, len(FAULTS) + 1)
    missed = []
    for number in numbers:
        name, old, new, tests = FAULTS[number - 1]
        start = time.perf_counter()
        by = caught(SOURCE / name, old, new, tests)
        print(
            f"{number:2} {name}: {old!r} -> {new!r}: {by or 'MISSED'} ({time.perf_counter() - start:.0f} s)", flush=True
        )
        missed += [] if by else [number]
    raise SystemExit(f"missed: {missed}" if missed else 0)


if __name__ == "__main__":
    main()
