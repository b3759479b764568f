"""TRL's asynchronous trainer with a gate, on a CPU: worker and weights are stubs, attention follows its paths."""

import dataclasses
import itertools
import queue

import numpy as np
import pytest
import torch
import trl_task
from datasets import Dataset
from torch.nn import functional as F
from transformers import Qwen2ForCausalLM
from trl_cases import Gradients, far_from, relative_error

import sparkjoy as sj

asynchronous = pytest.importorskip(
    "sparkjoy.integrations.trl.asynchronous", reason="TRL before its asynchronous trainer's tree", exc_type=ImportError
)
packing = pytest.importorskip("trl.experimental.async_grpo.packing")
RolloutSample = pytest.importorskip("trl.experimental.async_grpo.async_rollout_worker").RolloutSample


def over_paths(module, query, key, value, attention_mask, *, scaling=None, **tree):
    """TRL's tree attention without its kernel: each segment's queries see the path that leads to them."""
    query, key, value = (x.transpose(1, 2)[0] for x in (query, key, value))
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    ends, paths = tree["tree_cu_seqlens_q"].tolist(), tree["tree_cu_seqlens_k"].tolist()
    parts = []
    for i, (start, end) in enumerate(itertools.pairwise(ends)):
        index = tree["tree_kv_index"][paths[i] : paths[i + 1]]
        q, k, v = (x.transpose(0, 1)[None] for x in (query[start:end], key[index], value[index]))
        mask = torch.ones(end - start, len(index), dtype=torch.bool).tril(len(index) - (end - start))
        parts.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)[0].transpose(0, 1))
    return torch.cat(parts)[None], None


class Worker:
    """Answers that were given before, in order, and then for ever again."""

    def __init__(self, completions):
        self.completions, self.metrics_queue, self.rollout_buffer = completions, queue.Queue(), queue.Queue()

    def start(self):
        for _ in range(210):
            for completion in self.completions:
                self.rollout_buffer.put(completion)

    def stop(self):
        pass

    def update_model_version(self, version):
        pass

    def check_health(self, stale_after_s):
        raise AssertionError("the queue is empty")


class NoTransfer:
    def init_weight_transfer(self):
        pass

    pause = resume = destroy = init_weight_transfer

    def send_weights(self, iterator):
        list(iterator)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    trl_task.model().save_pretrained(folder)
    trl_task.tokenizer().save_pretrained(folder)
    return folder


def answers(folder, advantages, group=4):
    """One completion for each advantage, `group` to a prompt; log-probs a little off the policy's."""
    model, random = Qwen2ForCausalLM.from_pretrained(folder), torch.Generator().manual_seed(1)
    made = []
    for row, advantage in enumerate(advantages):
        if row % group == 0:
            prompt = torch.randint(0, model.config.vocab_size, (4,), generator=random)
        answer = torch.randint(0, model.config.vocab_size, (2 + row % 4,), generator=random)
        ids = torch.cat([prompt, answer])
        with torch.no_grad():
            log_probs = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        log_probs = (log_probs + 0.05 * torch.randn(len(log_probs), generator=random)).clamp(max=0)
        made.append(
            RolloutSample(
                prompt=[],
                completion=[],
                input_ids=ids.numpy(),
                completion_mask=np.array([0] * 4 + [1] * len(answer)),
                old_log_probs=np.concatenate([[0.0], log_probs.numpy()]),
                advantage=float(advantage),
                model_version=0,
                group_id=row // group,
                metrics={"reward": float(row)},
            )
        )
    return made


def trainer(monkeypatch, folder, out, completions, gate=None, **options):
    monkeypatch.setattr(packing, "tree_attention", over_paths)
    monkeypatch.setattr(asynchronous.trls, "get_peak_flops_per_device", lambda *_: 1.0)
    gradients = Gradients()
    settings = {
        "output_dir": str(out), "dtype": "float32", "max_steps": 1, "per_device_train_batch_size": 8, "seed": 3,
        "gradient_accumulation_steps": 1, "learning_rate": 0.05, "optim": "sgd", "max_grad_norm": 0.0,
        "max_staleness": 10_000, "logging_steps": 1, "report_to": "none", "save_strategy": "no",
        "bf16": False, "gradient_checkpointing": False, "use_cpu": True, "disable_tqdm": True, "token_budget": 0,
    }  # fmt: skip
    made = asynchronous.KondoAsyncGRPOTrainer(
        str(folder),
        reward_funcs=None,
        args=asynchronous.KondoAsyncGRPOConfig(**settings | options),
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 64}),
        callbacks=[gradients],
        rollout_worker=Worker(completions),
        weight_transfer=NoTransfer(),
        **({} if gate is None else {"gate": gate}),
    )
    return made, gradients


def trained(*given, **options):
    made, gradients = trainer(*given, **options)
    made.train()
    return gradients.steps, made


ADVANTAGES = [1.0, -0.5, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("gate", [{"gate_rate": 0.25}, {"gate_price": 0.0}, {"gate_noise": 0.5}])
def test_the_gradient_is_trls_with_skipped_advantages_at_zero_and_the_others_weighted(
    monkeypatch, folder, tmp_path, gate
):
    completions = answers(folder, ADVANTAGES)
    chosen = []
    decide = asynchronous.GatedBatcher.chosen
    monkeypatch.setattr(
        asynchronous.GatedBatcher, "chosen", lambda self, seen: chosen.append(w := decide(self, seen)) or w
    )
    found, made = trained(monkeypatch, folder, tmp_path / "gated", completions, **gate)
    kept = {id(s["input_ids"]): s["advantage"] for row in chosen[0] for s in row.samples}
    assert 0 < len(kept) < 8
    masked = [
        dataclasses.replace(completion, advantage=kept.get(id(completion.input_ids), 0.0)) for completion in completions
    ]
    expected, _ = trained(monkeypatch, folder, tmp_path / "masked", masked)
    assert relative_error(found[0], expected[0]) < 1e-6
    logged = made.state.log_history[0]
    assert logged["gate/kept_rate"] == pytest.approx(len(kept) / 8)
    assert logged["batch/trained_tokens_per_step"] == sum(c.completion_mask.sum() for c in completions)  # TRL's divisor
    assert logged["reward"] == 3.5  # of all, kept or not


def test_dropping_what_has_no_advantage_changes_no_gradient(monkeypatch, folder, tmp_path):
    completions = answers(folder, ADVANTAGES)
    found, made = trained(monkeypatch, folder, tmp_path / "gated", completions, gate_noise=0, gate_floor=0.0)
    expected, _ = trained(monkeypatch, folder, tmp_path / "own", completions)
    assert relative_error(found[0], expected[0]) < 1e-6
    assert made.state.log_history[0]["gate/kept_rate"] == 3 / 8
    assert made._trained_groups >= {0, 1}  # a group of equal rewards was seen too: epochs end as without a gate


def test_a_window_without_a_teaching_completion_is_a_step_of_gradient_zero(monkeypatch, folder, tmp_path):
    found, _ = trained(monkeypatch, folder, tmp_path, answers(folder, [0.0] * 8), gate_noise=0.3)
    assert float(found[0].abs().max()) == 0


def test_the_mean_of_draws_is_trls_gradient(monkeypatch, folder, tmp_path):
    completions = answers(folder, [1.0, -0.5, 0.3, 2.0, 1.0, -1.0, 0.2, -0.4])
    found, _ = trained(
        monkeypatch, folder, tmp_path / "gated", completions, gate_noise=1.0, max_steps=200, learning_rate=0.0
    )
    expected, _ = trained(monkeypatch, folder, tmp_path / "own", completions)
    assert len(found) == 200
    assert max(far_from(torch.stack(found), expected[0])) < 4


def test_two_processes_get_a_row_each_where_one_completion_is_kept(folder):
    metrics = {name: [] for name in ("kept_rate", "kept_token_rate", "backward_tokens", "distinct_tokens", "dummies")}
    metrics = {f"gate/{name}": values for name, values in metrics.items()}
    batcher = asynchronous.GatedBatcher([], sj.KondoGate(rate=0.1), 2, 8, metrics)
    seen = [dataclasses.asdict(completion) for completion in answers(folder, ADVANTAGES)]
    rows = batcher.chosen(seen)
    assert [len(row.samples) for row in rows] == [1, 1]
    assert sorted(sample["advantage"] for row in rows for sample in row.samples) == [0.0, 2.0]
    assert metrics["gate/dummies"] == [1.0]
    assert metrics["gate/distinct_tokens"][0] == pytest.approx(_distinct(seen))


def _distinct(seen):
    """Tokens of TRL's tree, which forks one token before completions differ."""
    return len({(*c["input_ids"][: n + 2], "at", n) for c in seen for n in range(len(c["input_ids"]))})


def test_a_resumed_run_draws_as_an_unbroken_one(monkeypatch, folder, tmp_path):
    """From the decision on that the checkpoint was written after: a queue gives what it gives."""
    completions = answers(folder, [1.0, -0.5, 0.3, 2.0, 1.0, -1.0, 0.2, -0.4])
    saving = {"gate_noise": 1.0, "max_steps": 3, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.0}
    made, _ = trainer(monkeypatch, folder, tmp_path, completions, **saving)
    made.train()
    again, _ = trainer(monkeypatch, folder, tmp_path, completions, **saving | {"max_steps": 2})
    again._load_gate(tmp_path / "checkpoint-2")
    other, _ = trainer(monkeypatch, folder, tmp_path / "other", completions, **saving | {"max_steps": 2})
    other.train()
    assert again._gate.state_dict() == other._gate.state_dict()
    assert torch.equal(again._gate.generator.get_state(), other._gate.generator.get_state())
    resumed, gradients = trainer(monkeypatch, folder, tmp_path, completions, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(gradients.steps) == 1


def test_a_gate_of_ones_own_and_what_is_refused(monkeypatch, folder, tmp_path):
    completions = answers(folder, ADVANTAGES)

    def best_one(score, cost=None):
        assert float(cost.sum()) == pytest.approx(_distinct([dataclasses.asdict(one) for one in completions]))
        keep = score == score.max()
        return sj.Decision(keep, None, keep.to(score.dtype), torch.ones_like(score))

    _, made = trained(monkeypatch, folder, tmp_path, completions, gate=best_one, token_budget=0)
    assert made.state.log_history[0]["gate/kept_rate"] == 1 / 8
    with pytest.raises(ValueError, match="give one of them"):
        trainer(monkeypatch, folder, tmp_path, completions, gate=best_one, gate_rate=0.5)
    for options, words in (
        ({"gate_noise": 0.3, "gate_rate": 0.5}, "give it alone"),
        ({"gate_noise": 0.3, "token_budget": 64}, "Leave token_budget out"),
    ):
        with pytest.raises(ValueError, match=words):
            asynchronous.KondoAsyncGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **options)
    nan = answers(folder, [float("nan"), *ADVANTAGES[1:]])
    with pytest.raises(ValueError, match="NaN"):
        trained(monkeypatch, folder, tmp_path, nan, gate_noise=0.3)


def test_a_run_learns(monkeypatch, folder, tmp_path):
    """Completions of advantage 1 become likelier, those of -1 less likely."""
    completions = answers(folder, [1.0, -1.0] * 4)

    def gain(model):
        likelihoods = []
        for completion in completions:
            ids = torch.as_tensor(completion.input_ids)
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
            likelihoods.append(completion.advantage * float(logits.gather(1, ids[1:, None])[3:].sum()))
        return sum(likelihoods)

    _, made = trained(
        monkeypatch, folder, tmp_path / "run", completions, gate_noise=0.3, max_steps=10, learning_rate=0.5
    )
    made.save_model(str(tmp_path / "learnt"))
    assert (
        gain(Qwen2ForCausalLM.from_pretrained(tmp_path / "learnt")) > gain(Qwen2ForCausalLM.from_pretrained(folder)) + 1
    )
