"""A part of the prompts that the gate passes over for good is counted in TRL's log, and warned of."""

import warnings

import pytest
import torch
import trl_cases

from sparkjoy.integrations.trl.deciding import part_of


def by_topic(prompts, completions, topic, **_):
    """Rewards of one topic are a thousand times the other's, which are never the best once centred on their group."""
    scores = torch.rand(len(completions), generator=torch.Generator().manual_seed(len(completions[0])))
    return [score * (1000 if name == "loud" else 1) for score, name in zip(scores.tolist(), topic, strict=True)]


def made(folder, **changes):
    trainer, _ = trl_cases.trainer(folder, train_rows=4, arguments={"reward_funcs": by_topic}, **changes)
    trainer.train_dataset = trainer.train_dataset.add_column("topic", ["loud", "quiet"] * 2)
    return trainer


@pytest.mark.slow
def test_a_topic_that_is_never_kept_is_counted_and_warned_of(tmp_path):
    trainer = made(tmp_path, gate_rate=0.1, gate_parts="topic", max_steps=12, logging_steps=1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        trainer.train()
    said = [str(warning.message) for warning in told if "stopped keeping" in str(warning.message)]
    assert len(said) == 1
    assert "1 of 2 parts of the data (quiet)" in said[0]
    lost = [entry["gate/lost_parts"] for entry in trainer.state.log_history if "gate/lost_parts" in entry]
    assert lost[0] == 0
    assert lost[-1] == 1


@pytest.mark.slow
def test_a_noise_budget_loses_none(tmp_path):
    trainer = made(tmp_path, gate_noise=0.3, gate_parts="topic", max_steps=12, logging_steps=1)
    trainer.train()
    assert {entry.get("gate/lost_parts", 0.0) for entry in trainer.state.log_history} == {0.0}


def test_a_part_is_a_column_or_a_prompt_shortened_but_told_apart():
    long = {"prompt": "a" * 100 + "b", "topic": 3}
    assert part_of(long, "topic") == "3"
    assert part_of({"prompt": "hello"}, None) == "'hello'"
    assert len(part_of(long, None)) < 60
    assert part_of(long, None) != part_of({"prompt": "a" * 101}, None)
    with pytest.raises(ValueError, match="gate_parts is 'level'; the dataset has the columns prompt, topic"):
        part_of(long, "level")
