"""The gradient of several processes is that of one with all rows, under DistributedDataParallel and fully_shard."""

import json
from pathlib import Path

import pytest
from launching import run_processes

WORKER = Path(__file__).with_name("distributed_worker.py")


SLOW = [pytest.param((count, "equivalence"), marks=pytest.mark.slow) for count in (1, 2, 4)]


@pytest.fixture(scope="module", params=[(2, "quick_equivalence"), *SLOW], ids=str)
def results(request, tmp_path_factory):
    """What every process found for every case, one list per process."""
    count, cases = request.param
    said = run_processes(WORKER, count, [cases], store=tmp_path_factory.mktemp("ranks") / "store", timeout=150)
    return [[json.loads(line[7:]) for line in text.splitlines() if line.startswith("RESULT ")] for text in said]


def test_gradients_are_those_of_one_process(results):
    for rank in results:
        assert {result["case"] for result in rank} >= {"everywhere", "on one rank only", "nowhere", "soft"}
        for result in rank:
            assert result["untouched"] == (result["kept"][0] == 0), result
            assert result["untouched"] == (result["case"] == "nowhere"), result
            assert result["untouched"] or result["error"] < 1e-12, result


def test_reports_are_about_all_rows_and_alike_everywhere(results):
    for rank in results:
        for result in rank:
            assert result["same_decision"], result
            assert result["total"] == 13
            assert result["kept"][0] == result["kept"][1]
            price, expected = result["price"]
            assert price == (None if expected is None else pytest.approx(expected, rel=1e-12))
            assert result["loss"][0] == pytest.approx(result["loss"][1], rel=1e-12)


def test_noise_and_what_is_learnt_of_it_are_those_of_one_process(results):
    found = [result for rank in results for result in rank if result["noise"][1] is not None]
    assert {result["case"] for result in found} >= {"noise", "noise, known"}
    for result in found:
        assert result["noise"][0] == pytest.approx(result["noise"][1], rel=1e-9), result
        states = result["state"]
        for name, value in states[1].items():
            assert states[0][name] == pytest.approx(value, rel=1e-9), result
        assert (states[0]["allowance"] != 0) == (result["case"] == "noise, known"), result


def test_every_rank_does_as_many_passes(results):
    for ranks in zip(*results, strict=True):
        passes = [(result["forwards"], result["backwards"]) for result in ranks]
        if ranks[0]["kind"] == "fsdp":
            assert len(set(passes)) == 1, ranks
        assert len({backwards for _, backwards in passes}) == 1, ranks
        rows = [result["backward_rows"] for result in ranks]
        kept = ranks[0]["kept_by_rank"]
        if len(ranks) == 1:
            assert passes[0][1] == (ranks[0]["kept"][0] > 0) or ranks[0]["micro_batch_size"]
        elif ranks[0]["kept"][0] and ranks[0]["micro_batch_size"] is None:
            assert rows == [max(1, count) for count in kept], ranks


def test_rows_that_the_signs_of_all_advantages_settle_are_not_screened(results):
    for ranks in zip(*results, strict=True):
        screened = [result["screened_rows"] for result in ranks]
        if ranks[0]["case"] == "on one rank only" and len(ranks) > 1:
            assert screened == [0] * len(ranks), ranks  # a price of 0 keeps what did better than expected
        if ranks[0]["case"] == "everywhere" and len(ranks) > 1:
            assert sum(screened) < 13, ranks  # the quota is filled by rows of positive advantage


@pytest.mark.slow
def test_the_mean_gradient_over_draws_is_the_dense_one(tmp_path):
    said = run_processes(WORKER, 2, ["unbiased"], store=tmp_path / "store", timeout=300)
    for text in said:
        found = [json.loads(line[7:]) for line in text.splitlines() if line.startswith("RESULT ")]
        assert [result["case"] for result in found] == ["exact", "stale", "sizes of advantages"]
        for result in found:
            assert result["drawn"] > 50, result
            assert result["kept"] < 12, result  # of 13
            assert result["relative"] < 0.1, result
            assert result["errors"] < 4, result
            assert result["certain"] < 1e-9, result
