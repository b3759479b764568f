"""What transformers samples with is recorded while it generates, so that deciding is free in TRL's default too."""

import pytest
import torch
import trl_task
from trl import GRPOConfig, GRPOTrainer
from trl_cases import SETTINGS, relative_error, trained

from sparkjoy.integrations.sampling import Recorder, recording
from sparkjoy.integrations.trl import KondoGRPOTrainer
from sparkjoy.integrations.trl.rows import loss_mask


class Comparing(KondoGRPOTrainer):
    """Keeps what was recorded beside an exact pass over all rows."""

    recorded, exact, mask = None, None, None

    def _decide(self, gate, output):
        self.mask = loss_mask(output).bool()
        self.recorded = output.get("sampling_per_token_logps")
        self.exact = self._screen(output, torch.arange(len(self.mask)))
        return super()._decide(gate, output)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora": True},
        {"temperature": 0.7},
        {"top_k": 3, "top_p": 0.8, "repetition_penalty": 1.2},
        {"gradient_checkpointing": True},
        {"generation_kwargs": {"min_new_tokens": 5}},
    ],
    ids=str,
)
def test_they_are_those_of_an_exact_pass(tmp_path, changes):
    made, _ = trained(tmp_path, cls=Comparing, gate_rate=0.3, **changes)
    assert made.mask.sum(dim=1).unique().numel() > 1  # answers that ended, and were padded
    torch.testing.assert_close(made.recorded[made.mask], made.exact[made.mask], atol=1e-5, rtol=0)
    assert made.state.log_history[0]["gate/screened_rate"] == 0


@pytest.mark.parametrize("setting", SETTINGS)
def test_they_decide_as_an_exact_pass_does(tmp_path, setting):
    free, given = trained(tmp_path, gate_rate=0.3, **SETTINGS[setting])
    _, expected = trained(tmp_path, gate_rate=0.3, gate_log_probs="exact", **SETTINGS[setting])
    assert free.state.log_history[0]["gate/screened_rate"] == 0
    assert len(given) == len(expected)
    for got, wanted in zip(given, expected, strict=True):
        assert relative_error(got, wanted) < 1e-4


@pytest.mark.parametrize("setting", ["more steps a generation", "two iterations"])
def test_old_log_probs_are_computed_for_kept_rows_alone(tmp_path, setting):
    ran, kept = [], []

    class Counting(KondoGRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            kept.append(int(output["gate_keep"].sum()))
            assert torch.equal(output["old_per_token_logps"].any(dim=1), output["gate_keep"])
            return output

        def _screen(self, output, rows):
            ran.append(len(rows))
            return super()._screen(output, rows)

    trained(tmp_path, cls=Counting, gate_rate=0.3, **SETTINGS[setting])
    assert ran == kept
    assert kept[0] > 0


def test_what_is_sampled_stays_the_same(tmp_path):
    sampled = []

    def reward(completion_ids, **_):
        sampled.append(completion_ids)
        return [float(len(ids)) for ids in completion_ids]

    for cls, config in ((GRPOTrainer, {"config": GRPOConfig}), (KondoGRPOTrainer, {"gate_rate": 0.3})):
        trained(tmp_path, cls=cls, arguments={"reward_funcs": reward}, **config)
    assert sampled[0] == sampled[1]


@pytest.mark.parametrize(
    "changes", [{"gate_price": 0.0}, {"gate_rate": 0.3, "gate_log_probs": "exact"}, {"gate_rate": 1.0}], ids=str
)
def test_nothing_is_recorded_where_nothing_is_needed(tmp_path, changes):
    class Watching(KondoGRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            assert "sampling_per_token_logps" not in output
            return output

    trained(tmp_path, cls=Watching, **changes)


def sampled_by_hand():
    """A model's completions of one prompt, and the recorder that watched."""
    policy = trl_task.model()
    prompt = torch.tensor([[3, 4, 13]]).repeat(5, 1)
    torch.manual_seed(0)
    with recording(policy, temperature=1.0) as recorder:
        ids = policy.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=True, max_new_tokens=6)
    return [row[3:].tolist() for row in ids], recorder


def test_other_passes_than_one_a_token_are_noticed():
    completions, recorder = sampled_by_hand()
    assert recorder.log_probs([[*row, 2] for row in completions]) is None  # a token that no pass chose
    assert recorder.log_probs(completions[:-1]) is None
    completions, recorder = sampled_by_hand()
    changed = [[(row[0] + 1) % 14, *row[1:]] for row in completions]
    assert recorder.log_probs(changed) is None
    completions, recorder = sampled_by_hand()
    assert [len(row) for row in recorder.log_probs(completions)] == [len(row) for row in completions]
    assert Recorder(1.0).log_probs(completions) is None  # nothing ran


def test_the_watch_ends_with_the_generation():
    policy = trl_task.model()
    with pytest.raises(ZeroDivisionError), recording(policy, 1.0):
        _ = 1 / 0
    assert not policy._forward_hooks
