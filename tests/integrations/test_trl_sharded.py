"""The TRL trainer under FSDP2 and DeepSpeed in two processes: weights after steps of SGD, packed against masked."""

import importlib.util

import pytest
import torch
import trl_task
from test_trl_processes import launch
from trl_cases import relative_error

NEEDS_DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
KINDS = ["fsdp2", *(pytest.param(kind, marks=NEEDS_DEEPSPEED) for kind in ("zero1", "zero2", "zero3"))]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_sharded_steps_of_kept_rows_are_those_of_all_masked(tmp_path, kind):
    (first, logs), (second, _) = launch(tmp_path, 2, kind, limit=280, worker="trl_sharded_worker.py")
    assert logs["kind"] == f"DistributedType.{'FSDP' if kind == 'fsdp2' else 'DEEPSPEED'}"
    start = torch.cat([parameter.detach().flatten() for parameter in trl_task.model().parameters()])
    names = sorted({name.split(": ")[0] for name in first})
    assert len(names) == 10
    for name in names:
        packed, masked = (first[f"{name}: {side}"] - start for side in ("packed", "masked"))
        assert torch.equal(first[f"{name}: packed"], second[f"{name}: packed"]), name
        if name == "none":
            assert packed.norm() == masked.norm() == 0
        else:
            assert masked.norm() > 1e-3
            assert relative_error(packed, masked) < 1e-5, name
    passes = [logs[f"dapo: {side}"]["gate/micro_steps"] for side in ("packed", "masked")]
    assert passes == ([2, 4] if kind == "fsdp2" else [4, 4])  # DeepSpeed runs a filler where there are no rows
