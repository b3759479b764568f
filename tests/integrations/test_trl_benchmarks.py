import pytest
import trl_learning
import trl_step


def records(rewards):
    return [
        {"step": step, "reward": reward, "backward_tokens": 100.0 * step, "seconds": 0.1 * step, "kept_rate": 0.25}
        for step, reward in enumerate(rewards, start=1)
    ]


def test_the_learning_study_reports_what_was_reached_and_when():
    runs = {"quick": [records([0.0] * 10 + [1.0] * 20)] * 2, "never": [records([0.0] * 30)]}
    quick, never = trl_learning.table(runs, target=0.8)
    assert quick["to_target"] == {"step": 18, "backward_tokens": 1800, "seconds": pytest.approx(1.8)}
    assert (quick["reward"], quick["reached"], quick["kept"]) == (1.0, 2, 0.25)
    assert never["to_target"]["step"] is None
    assert len(trl_learning.figure(runs, 0.8).axes) == 3


def test_a_gated_run_counts_fewer_tokens_differentiated():
    gated = trl_learning.run(trl_learning.ARMS["gate 10%"], seed=0, steps=2)
    plain = trl_learning.run(trl_learning.ARMS["TRL's own"], seed=0, steps=2)
    assert gated[0]["reward"] == plain[0]["reward"]  # the same completions
    assert 0 < gated[0]["backward_tokens"] < 0.15 * plain[0]["backward_tokens"]


@pytest.mark.slow
def test_a_gated_update_takes_less_than_trls_own(tmp_path):
    update = {
        name: trl_step.run(trl_step.ARMS[name], 1, str(tmp_path))["update"][0] for name in (trl_step.PLAIN, "10%")
    }
    assert update["10%"] < 0.6 * update[trl_step.PLAIN]  # measured: a quarter; the rest is margin
