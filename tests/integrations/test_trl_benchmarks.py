import pytest
import trl_learning
import trl_memory
import trl_noise
import trl_step
import trl_task


def records(rewards):
    return [
        {"step": step, "reward": reward, "backward_tokens": 100.0 * step, "seconds": 0.1 * step, "kept_rate": 0.25}
        for step, reward in enumerate(rewards, start=1)
    ]


def test_the_learning_study_reports_what_was_reached_and_when():
    runs = {"quick": [records([0.0] * 10 + [1.0] * 20)] * 2, "never": [records([0.0] * 30)]}
    quick, never = trl_learning.table(runs, target=0.8)
    assert (quick["step"], quick["backward_tokens"], quick["seconds"]) == (18, 1800, pytest.approx(1.8))
    assert (quick["reward"], quick["reached"], quick["kept"]) == (1.0, 2, 0.25)
    assert never["step"] is None
    assert len(trl_learning.figure(runs, 0.8).axes) == 3


def test_a_gated_run_counts_fewer_tokens_differentiated():
    gated = trl_learning.run(trl_learning.ARMS["gate 10%"], seed=0, steps=2, target=1.0)
    plain = trl_learning.run(trl_learning.ARMS["TRL's own"], seed=0, steps=2, target=1.0)
    assert gated[0]["reward"] == plain[0]["reward"]  # the same completions
    assert 0 < gated[0]["backward_tokens"] < 0.15 * plain[0]["backward_tokens"]


@pytest.mark.parametrize(("arm", "updates"), [("10%", 1), ("10%", 2), ("10% screened", 1)])
def test_the_step_benchmark_runs_what_it_says(tmp_path, arm, updates):
    size = {"width": 16, "layers": 1, "heads": 2}
    gated = trl_step.run(trl_step.ARMS[arm], 1, str(tmp_path), updates, **size)
    assert gated["kept_rate"][0] == 13 / 128
    assert len(gated["update"]) == len(gated["whole"]) == 1
    assert gated["micro_steps"] == [1]
    assert (gated["screened_rate"][0] > 0) == ("screened" in arm)
    assert 48 <= gated["tokens"][0] <= 80
    assert 0 < gated["update"][0] < gated["whole"][0]


def test_the_memory_benchmark_repeats_one_step():
    size = {"width": 16, "layers": 1, "heads": 2}
    figures = []
    for arm in ("25%, speed", "25%, memory"):
        step = trl_memory.prepare(arm, 0, False, size)
        first, again = step(), step()
        assert first["gate/backward_tokens"] == again["gate/backward_tokens"] > 0
        figures.append((first["gate/kept_rate"], first["gate/micro_steps"], first["gate/screened_rate"]))
    assert figures == [(0.25, 2, 0), (0.25, 8, 0)]


@pytest.mark.slow
def test_squares_hold_the_budget_where_a_sum_of_the_tokens_sizes_does_not():
    added = {name: noise for name, (noise, _) in trl_noise.measure(trl_task.model(), "dapo", 0.3).items()}
    assert 0.2 < added["squares"] < 0.45
    assert added["sum"] > 0.5
