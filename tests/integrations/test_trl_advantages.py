"""What the gate ranks by belongs to the batch it decides on, and rows that teach nothing use up no quota."""

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
import trl_task
from torch.nn.functional import pad
from trl import GRPOTrainer
from trl_cases import trained, trainer

from sparkjoy.integrations.trl import KondoGRPOMixin, KondoGRPOTrainer
from sparkjoy.integrations.trl.advantages import from_rewards, of_the_gate


def long_enough(completions, **_):
    return [float(len(text.replace(" ", "")) > 4) for text in completions]


def brief(completions, **_):
    return [-2.0 * len(text.replace(" ", "")) for text in completions]


def watching(cls):
    """`cls` with the gate, and the loss's advantages beside what was kept of every generation."""

    class Watching(KondoGRPOMixin, cls):
        def __init__(self, *args, **kwargs):
            self.seen = []
            super().__init__(*args, **kwargs)

        def _decide(self, gate, output):
            keep = super()._decide(gate, output)
            self.seen.append((output["advantages"], keep))
            return keep

    return Watching


class Resampling(GRPOTrainer):
    """Groups without spread are answered a second time, as DAPO does."""

    def _generate_and_score_completions(self, inputs):
        first, second = (super(Resampling, self)._generate_and_score_completions(inputs) for _ in range(2))
        size = self.num_generations
        flat = (first["advantages"].view(-1, size) == 0).all(dim=1).repeat_interleave(size)
        for name, value in first.items():
            if value.dim() == 2:
                left = name.startswith("prompt")
                width = max(value.shape[1], second[name].shape[1])
                value, other = (
                    pad(rows, (width - rows.shape[1], 0) if left else (0, width - rows.shape[1]))
                    for rows in (value, second[name])
                )
                first[name] = torch.where(flat[:, None], other, value)
            elif value.dim() == 1:
                first[name] = torch.where(flat, second[name], value)
        return first


class Replaying(GRPOTrainer):
    """The first group of the first generation stands in the place of the last group of every later one."""

    remembered = None

    def _generate_and_score_completions(self, inputs):
        output, size = super()._generate_and_score_completions(inputs), self.num_generations
        if self.remembered is None:
            self.remembered = {name: value[:size].clone() for name, value in output.items() if value.dim()}
        for name, old in self.remembered.items():
            value, left = output[name], name.startswith("prompt")
            if value.dim() == 2:
                width = max(value.shape[1], old.shape[1])
                value, old = (
                    pad(rows, (width - rows.shape[1], 0) if left else (0, width - rows.shape[1]))
                    for rows in (value, old)
                )
            output[name] = torch.cat([value[:-size], old])
        return output


@pytest.mark.parametrize(
    ("cls", "changes"),
    [
        (GRPOTrainer, {"multi_objective_aggregation": "normalize_then_sum"}),
        (Resampling, {}),
        (Replaying, {}),
    ],
    ids=["gdpo", "resampled", "replayed"],
)
@pytest.mark.filterwarnings("ignore:gate_advantages='centred'")
def test_no_row_that_the_loss_pushes_down_takes_the_place_of_one_it_pushes_up(tmp_path, cls, changes):
    made, _ = trained(
        tmp_path,
        cls=watching(cls),
        gate_rate=0.25,
        max_steps=3,
        arguments={"reward_funcs": [long_enough, brief]},
        **changes,
    )
    assert len(made.seen) == 3
    for own, keep in made.seen:
        assert (own > 0).sum() >= keep.sum() == 4
        assert (own[keep] > 0).all()


def warned(folder, **changes):
    """The sentences about the advantages that a run of two steps warned with, and its log."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made, _ = trained(
            folder, gate_rate=0.25, max_steps=2, arguments={"reward_funcs": [long_enough, brief]}, **changes
        )
    sentences = [str(one.message) for one in caught if "gate_advantages" in str(one.message)]
    return sentences, [entry.get("gate/centred") for entry in made.state.log_history if "loss" in entry]


def test_it_says_once_and_in_the_log_that_it_ranks_by_the_losses_own(tmp_path):
    gdpo = {"multi_objective_aggregation": "normalize_then_sum"}
    (sentence,), centred = warned(tmp_path, **gdpo)
    assert "ranks by the loss's own" in sentence
    assert centred == [0, 0]
    assert warned(tmp_path) == ([], [1, 1])
    assert warned(tmp_path, gate_advantages="trl", **gdpo) == ([], [None, None])


@pytest.mark.parametrize(
    "changes",
    [
        {"scale_rewards": "group"},
        {"scale_rewards": "batch"},
        {"scale_rewards": "none"},
        {"multi_objective_aggregation": "normalize_then_sum"},
    ],
    ids=str,
)
def test_advantages_of_rewards_are_trls(tmp_path, changes):
    seen = []

    def sometimes(completions, **_):
        return [None if index % 3 else float(len(text)) for index, text in enumerate(completions)]

    class Comparing(KondoGRPOTrainer):
        def _decide(self, gate, output):
            given = from_rewards(
                self._gate_rewards,
                self.reward_weights,
                self.num_generations,
                self.scale_rewards,
                self.multi_objective_aggregation,
            )
            seen.append((given, output["advantages"]))
            return super()._decide(gate, output)

    trained(
        tmp_path,
        cls=Comparing,
        gate_rate=0.25,
        gate_advantages="trl",
        reward_weights=[1.0, 0.5],
        arguments={"reward_funcs": [sometimes, brief]},
        **changes,
    )
    assert seen[0][1].abs().max() > 0.1
    torch.testing.assert_close(*seen[0])


ROUNDED = torch.tensor([0.1 + 0.2, 0.3, 0.3, 0.1 + 0.2])[:, None]
FLAT = {
    "differ in the last digit": torch.cat([ROUNDED, torch.nextafter(ROUNDED, torch.ones(1))])[[0, 4, 1, 5]],
    "beside a large offset": torch.tensor([[1e4, 0.1], [1e4, 0.1], [1e4 + 1e-3, 0.1], [1e4, 0.1]]),
    "of terms that cancel": torch.tensor([[1e4, -1e4], [1e4 + 1e-3, -1e4], [1e4, -1e4], [1e4, -1e4]]),
    "without a reward": torch.full((4, 1), math.nan),
}
SPREAD = {1: torch.tensor([[1.0], [0.0], [0.0], [0.0]]), 2: torch.tensor([[1.0, 0.0], [0.0, 0.0]] * 2)}


@pytest.mark.parametrize(
    ("name", "aggregation"),
    [(name, "sum_then_normalize") for name in FLAT]
    + [(name, "normalize_then_sum") for name in FLAT if name != "of terms that cancel"],
)
def test_rewards_equal_up_to_rounding_teach_nothing(name, aggregation):
    rewards = torch.cat([FLAT[name], SPREAD[FLAT[name].shape[1]]])
    weights = torch.ones(rewards.shape[1])
    own = from_rewards(rewards, weights, 4, "group", aggregation)
    for_gate, centred = of_the_gate(own, rewards, weights, 4, "group", aggregation)
    assert centred == (aggregation == "sum_then_normalize")
    assert (for_gate[:4] == 0).all()
    assert (for_gate[4:].sign() == own[4:].sign()).all()
    assert for_gate[4] > 0


def test_a_remembered_group_counts_although_the_rewards_in_its_place_were_equal():
    rewards = torch.cat([torch.ones(2, 1), SPREAD[1][:2]])
    own = torch.tensor([0.7, -0.7, 0.7, -0.7])
    for_gate, centred = of_the_gate(own, rewards, torch.ones(1), 2, "group", "sum_then_normalize")
    assert not centred
    assert torch.equal(for_gate, own)


def test_rows_that_the_loss_has_at_zero_leave_the_others_centred():
    rewards = torch.cat([SPREAD[1], SPREAD[1]])
    own = from_rewards(rewards, torch.ones(1), 4, "group", "sum_then_normalize").index_fill(0, torch.tensor([1]), 0)
    for_gate, centred = of_the_gate(own, rewards, torch.ones(1), 4, "group", "sum_then_normalize")
    assert centred
    assert for_gate.tolist() == [0.75, -0.25, -0.25, -0.25] * 2


def test_rewards_of_another_batch_do_not_count():
    own = torch.tensor([1.0, -1.0])
    for rewards in (None, torch.ones(4, 1)):
        assert of_the_gate(own, rewards, torch.ones(1), 2, "group", "sum_then_normalize") == (own, False)


@pytest.mark.parametrize("ranks_by", ["centred", "trl"])
def test_a_price_of_zero_keeps_nothing_where_rewards_are_equal_up_to_rounding(tmp_path, ranks_by):
    def tenths(completions, **_):
        return [0.1 + 0.2 if index % 2 else 0.3 for index, _ in enumerate(completions)]

    def more_tenths(completions, **_):
        return [0.3 if index % 2 else 0.1 + 0.2 for index, _ in enumerate(completions)]

    made, _ = trained(
        tmp_path,
        gate_price=0.0,
        gate_advantages=ranks_by,
        reward_weights=[0.7, 0.1],
        arguments={"reward_funcs": [tenths, more_tenths]},
    )
    assert made.state.log_history[0]["gate/kept_rate"] == 0


class Foreign(KondoGRPOTrainer):
    """As under vLLM: the ratio to the sampler's log-probs of some rows is above the bound, so that TRL sets it to 0."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.use_vllm, self._last_loaded_step = True, -1
        self.vllm_generation = SimpleNamespace(sync_weights=lambda: None)
        self.decided = []

    def _decide(self, gate, output):
        keep = super()._decide(gate, output)
        silent = (output["importance_sampling_ratio"] == 0) | (output["completion_mask"] == 0)
        self.decided.append((silent.all(dim=1), output["advantages"], keep))
        return keep


def off_by(shifts):
    def rollout(prompts, trainer):
        rolled = trl_task.rollout_with_log_probs(prompts, trainer)
        rolled["logprobs"] = [
            [value - shifts[index % len(shifts)] for value in row] for index, row in enumerate(rolled["logprobs"])
        ]
        return rolled

    return rollout


@pytest.mark.parametrize("mode", ["sequence_mask", "token_mask"])
def test_rows_whose_ratio_is_masked_use_up_no_quota(tmp_path, monkeypatch, mode):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    made, _ = trained(
        tmp_path,
        cls=Foreign,
        gate_rate=0.25,
        vllm_importance_sampling_mode=mode,
        arguments={"rollout_func": off_by([0.0, 2.0]), "reward_funcs": long_enough},
    )
    ((masked, own, keep),) = made.decided
    assert masked.sum() == 8
    assert ((own > 0) & masked).sum() >= 2  # which an unmasked ranking would have kept some of
    assert keep.sum() == 4
    assert not (keep & masked).any()


def test_log_probs_of_a_cut_distribution_are_not_decided_on(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    for changes, screened in (
        ({}, False),
        ({"top_p": 0.9}, True),
        ({"top_k": 5}, True),
        ({"min_p": 0.1}, True),
        ({"repetition_penalty": 1.1}, True),
        ({"generation_kwargs": {"typical_p": 0.9}}, True),
    ):
        made, _ = trained(
            tmp_path, gate_rate=0.25, arguments={"rollout_func": trl_task.rollout_with_log_probs}, **changes
        )
        assert (made.state.log_history[0]["gate/screened_rate"] > 0) == screened, changes


@pytest.mark.parametrize(
    "example",
    [
        {"prompt": [{"role": "user", "content": "What is it?"}], "images": ["a picture"]},
        {"prompt": [{"role": "user", "content": "What is it?"}], "image": "a picture"},
        {"prompt": [{"role": "user", "content": [{"type": "image", "image": "a picture"}]}]},
    ],
    ids=["images", "image", "in the prompt"],
)
def test_images_are_refused_before_training(tmp_path, example):
    made, _ = trainer(tmp_path, gate_rate=0.25)
    made.train_dataset = [example]
    with pytest.raises(ValueError, match="text only"):
        made._refuse_unproven_setups()
    for text in ([{"prompt": "What is it?", "images": []}], [], iter([])):
        made.train_dataset = text
        made._refuse_unproven_setups()
