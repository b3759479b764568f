"""Set-ups in which processes would wait for one another for good, or silently drift apart: each works or is refused."""

import json
from pathlib import Path

import pytest
from launching import run_processes

import sparkjoy as sj

WORKER = Path(__file__).with_name("hazards_worker.py")


def both_ranks(tmp_path, *scenarios):
    said = run_processes(WORKER, 2, scenarios, store=tmp_path / "store", timeout=90)
    return [[json.loads(line[7:]) for line in text.splitlines() if line.startswith("RESULT ")] for text in said]


@pytest.mark.slow
def test_errors_and_modules_that_do_not_fit_are_refused_on_every_rank(tmp_path):
    scenarios = ("errors_of_one_rank", "modules_that_do_not_fit", "accumulation_that_ends_without_survivors")
    for rank, found in enumerate(both_ranks(tmp_path, *scenarios)):
        *errors, modules, accumulation = found
        assert [result["kind"] for result in errors] == ["ddp", "fsdp"]
        for result in errors:
            causes = (
                "advantages has 1 of 4",
                "the screening forward pass",
                "log_probs is 'given' on rank 0",
                "micro-batch 1 of 3",
            )
            for said, expected in zip(result["said"], causes, strict=True):
                assert expected in said
                assert ("rank 1 of 2 failed" in said) == (expected != "log_probs is 'given' on rank 0")
            assert result["untouched"]
            assert result["kept"] == 7
        assert "2 processes, but no module" in modules["forgotten"]
        assert "module is a Policy" in modules["plain"]
        assert "meshes of shape (1, 2); expected one mesh of one dimension" in modules["hybrid"]
        assert "does not call the DistributedDataParallel module" in modules["inside"]
        assert modules["untouched"]
        assert modules["alone"] == (4 if rank else 9)
        # The last of two accumulated calls keeps nothing; a filler row averages what the first has left behind.
        assert accumulation["kept"] == [7, 0]
        assert accumulation["rows"] == [1, 0]
        assert accumulation["error"] < 1e-12


@pytest.mark.slow
def test_options_of_ddp_and_rows_of_any_kind_train_as_one_process(tmp_path):
    scenarios = ("options_of_ddp", "lengths_that_differ", "tensordicts_on_one_rank_only")
    for rank, found in enumerate(both_ranks(tmp_path, *scenarios, "shards_after_a_step_without_survivors")):
        assert len(found) == 12 + 2 + 1 + 1
        assert all(result["error"] < 1e-12 for result in found)
        assert all(result["kept"] == [7, 0, 7] for result in found[:12])
        assert found[-2]["rows"] == (1 if rank else 9)


def test_a_module_that_is_not_wrapped_is_refused():
    with pytest.raises(ValueError, match="module is a str"):
        sj.GatedBackward(None, module="remote")
