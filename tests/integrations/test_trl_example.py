import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "02_trl.py"


@pytest.mark.slow
def test_the_example_learns_and_skips_within_its_budget():
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, str(EXAMPLE), "--steps", "24"], capture_output=True, text=True, env=environment, timeout=120
    )
    assert run.returncode == 0, run.stderr[-2000:]
    lines = run.stdout.splitlines()
    rows = [line.split() for line in lines[lines.index("step  reward  kept  noise  passes (of 4)") + 1 :]]
    assert [row[0] for row in rows] == ["6", "12", "18", "24"]
    assert float(rows[-1][1]) > float(rows[0][1]) + 0.1
    assert all(0 < int(row[2].rstrip("%")) < 70 and float(row[4]) < 4 for row in rows)
    assert all(0.2 < float(row[3]) < 0.4 for row in rows)


def test_the_diff_against_plain_trl_is_at_most_five_lines():
    code = EXAMPLE.read_text().split('"""', 2)[2]
    assert sum(any(name in line for name in ("sparkjoy", "Kondo", "gate_")) for line in code.splitlines()) <= 5
