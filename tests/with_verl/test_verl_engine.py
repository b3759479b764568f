"""The gate in verl's engines, on two processes of a CPU: `verl_worker.py` runs, and here is what must have come out."""

import json
from pathlib import Path
from statistics import mean

import pytest
from launching import run_processes

WORKER = Path(__file__).with_name("verl_worker.py")
OF_FSDP1 = ("equal", "chosen", "one_sided", "weighed", "refused")  # its checkpoints need an accelerator


@pytest.fixture(scope="module", params=["fsdp2", "fsdp"])
def found(request, tmp_path_factory):
    """Figures of every case, by process."""
    folder = tmp_path_factory.mktemp(request.param)
    names = () if request.param == "fsdp2" else OF_FSDP1
    run_processes(WORKER, 2, [folder, request.param, *names], store=folder / "store", timeout=300)
    return [json.loads((folder / f"{request.param}-{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture
def case(found):
    def figures(name):
        if name not in found[0]:
            pytest.skip(
                "run under FSDP 2 alone: FSDP 1 writes checkpoints on accelerators only, and the rest takes minutes"
            )
        return [of_rank[name] for of_rank in found]

    return figures


def test_rows_without_advantage_are_skipped_and_the_gradient_stays(case):
    for figures in case("equal"):
        for name, one in figures.items():
            assert one["error"] < 1e-6, name
            assert one["rate"] == [1.0 if name.startswith("kl") else 0.5], name
        assert (figures["token-mean, fixed"]["passes"], figures["token-mean, fixed"]["of"]) == (4, 8)
        assert figures["token-mean, dynamic"]["passes"] < figures["token-mean, dynamic"]["of"]


def test_a_hard_gate_is_the_engine_with_skipped_advantages_at_zero(case):
    mine, other = case("chosen")
    for name, kept in {"rate": 5, "price": 7}.items():
        assert mine[name]["error"] < 1e-6
        assert mine[name]["kept"] + other[name]["kept"] == kept
        assert mine[name]["kept"] != other[name]["kept"]
        assert mine[name]["passes"] == other[name]["passes"] == max(mine[name]["kept"], other[name]["kept"])


def test_a_rank_without_rows_to_train_on_runs_as_many_micro_batches(case):
    mine, other = case("one_sided")
    for name in set(mine) - {"none"}:
        assert mine[name]["error"] < 1e-6, name
        assert mine[name]["passes"] == other[name]["passes"], name
        assert (mine[name]["dummies"], other[name]["dummies"] > [0.0]) == ([0.0], True), name
    assert (mine["0, 1"]["passes"], mine["0, 2"]["passes"]) == (4, 2)
    assert mine["none"] == {"error": 0.0, "passes": 1, "rate": [0.0]}


def test_a_draw_is_the_sum_of_its_rows_gradients_times_their_weights(case):
    (figures, _) = case("weighed")
    assert figures["error"] < 1e-6
    assert 0 in figures["weights"]
    assert max(figures["weights"]) > 2


def test_the_mean_of_a_budgets_draws_is_the_dense_gradient(case):
    figures = case("budget")[0]
    assert figures["off"] < 4
    assert figures["rate"] < 0.5
    assert figures["noise"] == pytest.approx(1.0, rel=0.1)


def test_what_is_wrong_on_one_rank_is_raised_on_both(case):
    mine, other = case("refused")
    assert mine["nan"] == other["nan"]
    assert mine["nan"].startswith("rank 1 has 1 of 8 rows with NaN or infinite advantages or log-probs")
    assert mine["passes after"] == other["passes after"] > 0


def test_a_resumed_run_is_the_unbroken_one(case):
    figures = case("resumed")[0]
    assert figures["file"] == ["gate_rank_0.pt", "gate_rank_1.pt"]
    assert figures["again"] == 0
    assert figures["rates"]["again"] == figures["rates"]["unbroken"]
    assert figures["anew"] > 0  # without the gate's state the draws are others


def test_ten_steps_learn_as_verls_own(case):
    figures = case("learning")[0]
    dense = figures["dense"]["gains"]
    spread = max(dense) - min(dense)
    for name, share in {"noise": 0.6, "price": 0.4}.items():
        assert abs(mean(figures[name]["gains"]) - mean(dense)) < spread, name
        assert min(figures[name]["gains"]) > 0.02, name
        assert figures[name]["passes"] < share * figures["dense"]["passes"], name
