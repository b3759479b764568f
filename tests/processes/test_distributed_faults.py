"""What goes wrong on one rank is said on all, in the same words; none waits, and the next step is sound."""

import json
from pathlib import Path

import pytest
from launching import run_processes

WORKER = Path(__file__).with_name("faults_worker.py")


def every_rank(tmp_path, count, *scenarios):
    said = run_processes(WORKER, count, scenarios, store=tmp_path / "store", timeout=240)
    return [[json.loads(line[7:]) for line in text.splitlines() if line.startswith("RESULT ")] for text in said]


SLOW = [pytest.param((kind, 40), marks=pytest.mark.slow, id=kind) for kind in ("ddp", "fsdp")]


@pytest.mark.parametrize("scenario", [pytest.param(("quick", 12), id="quick"), *SLOW])
def test_what_fails_on_one_rank_fails_on_all_and_the_next_step_is_sound(tmp_path, scenario):
    name, least = scenario
    ranks = every_rank(tmp_path, 2, name)
    assert len(ranks[0]) == len(ranks[1]) >= least
    for first, second in zip(*ranks, strict=True):
        for found in (first, second):
            for said, grad in zip(found["said"], found["grad"], strict=True):
                kept = said[1].endswith(".grad is as it was.") or "rank 1;" in said[1]
                if found is first or found["case"] != "interrupt":
                    assert kept or said[1].endswith("some of the gradient had been added to it."), found
                    assert grad == "as it was" if kept else grad != "changed", found
            assert max(found["error"]) < 1e-12, found
        if first["case"] == "interrupt":
            assert {kind for kind, _ in second["said"]} == {"KeyboardInterrupt"}
            assert all("rank 1 of 2 failed" in text for _, text in first["said"])
        else:
            assert first["said"] == second["said"]
            assert all("rank 1" in text for _, text in first["said"]), first


@pytest.mark.slow
def test_a_rank_that_has_left_out_a_call_is_found_by_the_number_of_the_step(tmp_path):
    for found in zip(*every_rank(tmp_path, 2, "skips"), strict=True):
        for one in found:
            assert one["said"].startswith("step_number is 1 on rank 0 and 2 on rank 1; expected the same"), one
            assert one["grad"] == "as it was"


@pytest.mark.parametrize("how", ["ends", pytest.param("waits", marks=pytest.mark.slow)])
def test_a_rank_that_is_not_there_is_named(tmp_path, how):
    *others, last = every_rank(tmp_path, 3, how)
    assert last == []
    assert len(others) == 2
    for (found,) in others:
        assert found["said"].startswith("rank 2 of 3 does not answer"), found
