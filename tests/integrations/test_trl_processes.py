"""The TRL trainer in a group of two processes: gradients of each, which must agree, packed against masked."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trl_cases import relative_error

ROOT = Path(__file__).parents[2]
SHARDED = {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}


def launch(folder, processes, only, limit, worker="trl_worker.py"):
    """Run the worker in `processes` processes; kill them all when they take longer than `limit` seconds."""
    paths = [ROOT / "src", ROOT / "tests", ROOT / "benchmarks"]
    environment = (
        os.environ
        | {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "OMP_NUM_THREADS": "1",
            "TRL_EXPERIMENTAL_SILENCE": "1",
        }
        | ({"ACCELERATE_USE_CPU": "true"} if worker == "trl_worker.py" else SHARDED)
    )
    group = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(group if processes > 1 else []), f"tests/integrations/{worker}", str(folder), only]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    ) as run:
        try:
            output, _ = run.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            raise
    assert run.returncode == 0, output.decode()[-3000:]
    return [
        (torch.load(folder / f"{rank}.pt"), json.loads((folder / f"{rank}.json").read_text()))
        for rank in range(processes)
    ]


@pytest.mark.slow
def test_two_processes_pack_to_the_masked_gradient(tmp_path):
    (first, logs), (second, _) = launch(tmp_path, 2, "all", limit=240)
    names = sorted({name.split(": ")[0] for name in first})
    assert len(names) == 17
    for name in names:
        packed, masked = first[f"{name}: packed"], first[f"{name}: masked"]
        assert len(packed) == len(masked) > 0
        for step, (ours, theirs) in enumerate(zip(packed, masked, strict=True)):
            assert torch.equal(ours, second[f"{name}: packed"][step]), name  # both processes step alike
            if theirs.norm() == 0:
                assert ours.norm() == 0
            else:
                assert relative_error(ours, theirs) < 1e-5, name
    assert all(step.norm() == 0 for step in first["none: packed"])
    for name in ("shared", "shared, gated", "shared, absolute positions"):
        log = logs[f"{name}: packed"]
        assert log["shared/distinct_tokens"] < 0.9 * log["shared/padded_tokens"], name
    assert logs["none: packed"]["gate/micro_steps"] == 0
    assert logs["one row: packed"]["gate/micro_steps"] == 1
    # Two packed micro-steps of the first generation's rows, and the one pass that averages them over the processes.
    assert logs["none in the last generation of a step: packed"]["gate/micro_steps"] == 2


@pytest.mark.slow
def test_two_processes_decide_and_step_as_one(tmp_path):
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
    (one, log), *_ = launch(tmp_path / "1", 1, "fixed", limit=60)
    (two, logs), (other, _) = launch(tmp_path / "2", 2, "fixed", limit=60)
    for name, steps in one.items():
        assert torch.equal(two[name][0], other[name][0])
        assert relative_error(two[name][0], steps[0]) < 1e-5
        for figure in ("kept_rate", "kept_token_rate", "price", "delight_std"):
            assert logs[name][f"gate/{figure}"] == pytest.approx(log[name][f"gate/{figure}"], rel=1e-5)


@pytest.mark.slow
def test_the_mean_gradient_of_a_noise_budget_is_trls(tmp_path):
    (first, logs), *others = launch(tmp_path, 2, "noise", limit=600)
    assert len(logs) == 8
    for loss, log in logs.items():
        assert max(log["far"]) < 4, (loss, log)
        assert log["differs"] > 0.1
        assert log["kept_rate"] < 0.8
        for other, figures in others:
            assert torch.equal(first[loss], other[loss])
            assert figures[loss] == log
