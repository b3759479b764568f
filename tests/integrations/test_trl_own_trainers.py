"""Trainers of one's own, and what they do that TRL's does not: nothing of it is taken for something else."""

import json
import warnings

import pytest
import torch
import trl_task
from datasets import IterableDataset
from trl import GRPOTrainer
from trl_cases import Masked, relative_error, trained, trainer

import sparkjoy as sj
from sparkjoy import coverage
from sparkjoy.coverage import Coverage
from sparkjoy.integrations.trl import KondoGRPOConfig, KondoGRPOMixin, KondoGRPOTrainer
from sparkjoy.integrations.trl.deciding import part_of
from sparkjoy.integrations.trl.rows import whole
from sparkjoy.scores import says


def of(base, masked=False):
    """The gated trainer of a user's, or its masked reference."""
    bases = (Masked, KondoGRPOMixin, base) if masked else (KondoGRPOMixin, base)
    return type("Mine", bases, {"gate_normalizer": "rows"})


class Asks(GRPOTrainer):
    """Asks for log-probs of its own, of all rows, where TRL asks for those of the old policy."""

    asked, right = None, None

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        ids, mask, _ = whole(output)
        width = output["completion_ids"].shape[1]
        with torch.no_grad():
            self.asked, _, _ = self._get_per_token_logps_and_entropies(self.model, ids, mask, width)
            of_all = self.model(ids, attention_mask=mask).logits[:, -width - 1 : -1].log_softmax(-1)
        self.right = of_all.gather(2, ids[:, -width:, None]).squeeze(2) * output["completion_mask"]
        return output


@pytest.mark.parametrize("gate", [{"gate_rate": 0.4}, {"gate_noise": 0.5}], ids=str)
def test_log_probs_that_a_user_asks_for_are_computed(tmp_path, gate):
    made, _ = trained(tmp_path, cls=of(Asks), num_iterations=2, max_steps=2, **gate)
    assert torch.allclose(made.asked, made.right, atol=1e-5)


class Looks(GRPOTrainer):
    """Looks at a micro-batch before its loss, without a graph, as a filter or a teacher does."""

    def _compute_loss(self, model, inputs):
        ids, mask, _ = whole(inputs)
        with torch.no_grad():
            self._get_per_token_logps_and_entropies(model, ids, mask, inputs["completion_ids"].shape[1])
        return super()._compute_loss(model, inputs)


@pytest.mark.parametrize("options", [{}, {"entropy_coef": 0.1}, {"loss_type": "cispo", "gate_dg": "token"}], ids=str)
def test_looking_before_the_loss_changes_no_gradient(tmp_path, options):
    given, expected = (trained(tmp_path, cls=of(cls), gate_noise=0.5, **options)[1][0] for cls in (Looks, GRPOTrainer))
    assert relative_error(given, expected) < 1e-6


def test_a_reward_that_leaves_the_policy_evaluating_is_no_evaluation(tmp_path):
    policy = trl_task.model()

    def reward(prompts, completions, **_):
        policy.eval()
        return trl_task.copied(prompts, completions)

    changes = {"gate_noise": 0.5, "loss_type": "grpo", "arguments": {"reward_funcs": reward}}
    _, (given,) = trained(tmp_path, model=policy, **changes)
    _, (expected,) = trained(tmp_path, model=trl_task.model(), gate_noise=0.5, loss_type="grpo")
    assert relative_error(given, expected) < 1e-6


class Process(GRPOTrainer):
    """A reward of each token, as a column of its own."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        drawn = torch.rand(output["completion_ids"].shape, generator=torch.Generator().manual_seed(0))
        return {**output, "step_rewards": drawn}

    def _compute_loss(self, model, inputs):
        return super()._compute_loss(
            model, {**inputs, "advantages": inputs["advantages"][:, None] * inputs["step_rewards"]}
        )


class Filtering(GRPOTrainer):
    """Of each group the shorter half goes on."""

    def _generate_and_score_completions(self, inputs):
        output, size = super()._generate_and_score_completions(inputs), self.num_generations
        tokens = output["completion_mask"].sum(1).view(-1, size)
        shorter = tokens.argsort(dim=1, stable=True)[:, : size // 2]
        rows = (shorter + size * torch.arange(len(tokens))[:, None]).flatten()
        output = {name: value[rows] if value.dim() else value for name, value in output.items()}
        return {**output, "num_items_in_batch": output["completion_mask"].sum()}


@pytest.mark.parametrize("base", [Process, Filtering])
@pytest.mark.parametrize(
    "options", [{"gate_rate": 0.4, "gate_advantages": "trl"}, {"gate_noise": 0.5}, {"share_tokens": True}], ids=str
)
def test_columns_and_groups_of_ones_own_are_packed(tmp_path, base, options):
    changes = {"loss_type": "grpo"} | options
    if "share_tokens" in options:
        given, expected = (
            trained(tmp_path, cls=cls, loss_type="grpo", **more)[1][0]
            for cls, more in ((of(base), options), (of(base), {}))
        )
    else:
        given, expected = (trained(tmp_path, cls=of(base, masked), **changes)[1][0] for masked in (False, True))
    assert relative_error(given, expected) < 1e-5


def test_streamed_datasets_have_no_length(tmp_path):
    rows = [dict(row) for row in trl_task.prompts(16, 2, 5)]
    config = KondoGRPOConfig(**trl_task.options(output_dir=str(tmp_path), gate_rate=0.4))
    KondoGRPOTrainer(
        model=trl_task.model(),
        reward_funcs=trl_task.copied,
        args=config,
        train_dataset=IterableDataset.from_generator(lambda: iter(rows)),
        processing_class=trl_task.tokenizer(),
    ).train()


def test_an_example_may_have_an_environment_alone():
    assert part_of({"environment": "chess"}, None) == "'chess'"


def test_what_is_remembered_of_prompts_is_bounded(monkeypatch):
    monkeypatch.setattr(coverage, "MOST", 3)
    seen = Coverage(patience=2)
    for _ in range(12):
        lost = seen.seen(["a", "a", "b", "b"], torch.tensor([0.5, 0.5, -1.0, -1.0]), torch.tensor([1, 1, 0, 0]).bool())
    assert seen.lost == ["b"]
    assert lost == []
    for part in "cdef":
        seen.seen([part], torch.tensor([1.0]), torch.tensor([True]))
    assert seen.parts == 3
    assert seen.lost == []


SAVING = {"save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({"gate_noise": 0.3}, {"gate_noise": 0.1}, r"is of UnbiasedGate\(noise=0.3\), and this run has UnbiasedGate"),
        ({"gate_rate": 0.25}, {"gate_noise": 0.3}, r"is of KondoGate\(rate=0.25\)"),
        ({}, {"gate_noise": 0.3}, "is missing: the run so far had no gate"),
    ],
)
def test_a_run_resumed_with_another_gate_is_told(tmp_path, first, second, said):
    trained(tmp_path, max_steps=1, **SAVING, **first)
    made, _ = trainer(tmp_path, max_steps=2, **SAVING, **second)
    with pytest.raises(ValueError, match=said):
        made.train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-1" / "gate_state.json").write_text("null")
    made, _ = trainer(tmp_path, max_steps=2, **SAVING, **second)
    made.train(resume_from_checkpoint=True)
    assert made.state.global_step == 2


def test_a_run_resumed_without_its_gate_is_told(tmp_path):
    trained(tmp_path, max_steps=1, **SAVING, gate_noise=0.3)
    made, _ = trainer(tmp_path, max_steps=2, **SAVING)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        made.train(resume_from_checkpoint=True)
    assert any("goes on without one" in str(warning.message) for warning in seen)


def test_a_damaged_state_is_refused_by_name(tmp_path):
    trained(tmp_path, max_steps=1, **SAVING, gate_noise=0.3)
    file = tmp_path / "checkpoint-1" / "gate_state.json"
    text = file.read_text()
    saved = json.loads(text)
    other = json.dumps(saved | {"state": saved["state"].replace("1", "7")})
    for damaged in (text[: len(text) // 2], other, "[]", json.dumps({"gate": 1})):
        file.write_text(damaged)
        made, _ = trainer(tmp_path, max_steps=2, **SAVING, gate_noise=0.3)
        with pytest.raises(ValueError, match=r"gate_state.json is damaged"):
            made.train(resume_from_checkpoint=True)


class Halves:
    """The best half of the completions, with a count that a resumed run goes on with; says nothing of its weights."""

    def __init__(self):
        self.batches = torch.zeros(())

    def __call__(self, score, cost):
        self.batches = self.batches + 1
        keep = (score >= score.median()) & (score != 0)
        return sj.Decision(keep, None, keep.to(score.dtype), torch.full_like(score, 2.0))

    def state_dict(self):
        return {"batches": self.batches}

    def load_state_dict(self, state):
        self.batches = state["batches"]


def test_a_gate_of_a_users_own_decides_weighs_and_is_resumed(tmp_path):
    changes = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    made, (given, *_) = trained(tmp_path, arguments={"gate": Halves()}, **changes)
    _, (expected, *_) = trained(tmp_path / "masked", cls=Masked, arguments={"gate": Halves()}, **changes)
    assert relative_error(given, expected) < 1e-5
    assert 0 < made.state.log_history[0]["gate/kept_rate"] <= 0.6
    assert made._gate.batches == 2
    resumed, _ = trainer(tmp_path, arguments={"gate": Halves()}, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed._gate.batches == 2


def test_a_score_of_a_users_own_ranks(tmp_path):
    @says(reads_log_probs=False, sign_of_advantage=True)
    def shortfall(advantages, log_probs):
        return advantages * 3

    steps = [
        trained(tmp_path / name, gate_rate=0.3, arguments=arguments, **changes)[1][0]
        for name, arguments, changes in (
            ("own", {"score": shortfall}, {}),
            ("named", {}, {"gate_score": "advantage"}),
        )
    ]
    assert relative_error(*steps) < 1e-6


def test_a_score_that_is_not_finite_is_named(tmp_path):
    def broken(advantages, log_probs):
        return advantages * torch.nan

    with pytest.raises(ValueError, match="what score=the function broken returned has 16 of 16 values NaN"):
        trained(tmp_path, gate_rate=0.3, arguments={"score": broken})


@pytest.mark.parametrize(
    ("arguments", "changes", "says_so"),
    [
        ({"gate": sj.KondoGate(rate=0.5)}, {"gate_rate": 0.3}, "and the config has KondoGate"),
        ({"score": sj.delight}, {}, "is set without a gate: set gate_rate or gate_price"),
        ({"score": sj.delight}, {"gate_noise": 0.3}, "is for a gate that is not weighted"),
        ({"gate": sj.KondoGate(rate=0.5)}, {"entropy_coef": 0.1}, "the entropy bonus needs"),
    ],
)
def test_what_does_not_go_with_a_gate_of_ones_own_is_refused(tmp_path, arguments, changes, says_so):
    with pytest.raises(ValueError, match=says_so):
        trainer(tmp_path, arguments=arguments, **changes)
