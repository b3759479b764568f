import json
import math
from types import SimpleNamespace

import pytest
import torch
from command_line import sparkjoy
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sparkjoy_lab.language_model import pretrained
from sparkjoy_lab.studies.language import ARMS, LanguageStudy
from sparkjoy_lab.studies.language_results import DENSE, PARTS, crossing, table
from sparkjoy_lab.studies.language_runs import most_learnt
from sparkjoy_lab.studies.language_tasks import TASKS, right_number, without_e
from sparkjoy_lab.studies.language_training import MaxVariance, common_beginning, train_one

CHARACTERS = "0123456789+= \n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Llama of SmolLM2's shape, but small and of random weights, in a folder; a token for each character."""
    folder = tmp_path_factory.mktemp("model")
    words = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *CHARACTERS])}
    characters = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            tie_word_embeddings=True,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    ).save_pretrained(folder)
    return str(folder)


def small(model, **changes):
    options = {"model": model, "steps": 2, "prompts": 2, "group": 4, "micro_batch": 4, "held_out": 6, "seed": 0}
    return {**options, "evaluate_every": 1, "learning_rate": 1e-2, "bf16": False} | changes


@pytest.mark.parametrize("name", TASKS)
def test_the_held_out_problems_are_no_others(name):
    if name == "gym":
        pytest.importorskip("reasoning_gym", reason="of the extra [lm], which [dev] leaves out")
    problems = TASKS[name].problems()
    assert len({row["prompt"] for row in problems}) == len(problems) > 1_000
    assert problems == TASKS[name].problems()


def test_a_sum_is_right_where_its_first_number_is():
    problem = TASKS["sums"].problems()[0]
    assert right_number(f" {problem['answer']}\n", problem) == 1
    assert right_number(f" 1{problem['answer']}\n", problem) == 0
    assert right_number(" so\n", problem) == 0


def test_words_without_e_count_once_each_and_share_with_the_others():
    assert without_e(" ".join(f"a{letter}" for letter in "abcdfghijklmnopqrstu"), {}) == 1
    assert without_e("go " * 30, {}) == 1 / 20
    assert without_e("go here", {}) == 1 / 2 * 1 / 20
    assert without_e("", {}) == 0


@pytest.mark.slow
@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_runs_and_its_seconds_add_up(arm, model, tmp_path):
    task, options = TASKS["sums"], ARMS[arm] | {"share_tokens": arm != DENSE}
    records = train_one(options, task, tmp_path / "run", **small(model))
    assert [row["step"] for row in records] == [0, 1, 2]
    assert all(0 <= row["score"] <= 1 for row in records)
    last = records[-1]
    assert sum(last["seconds"][part] for part in PARTS) == pytest.approx(last["seconds"]["total"])
    assert last["seconds"]["sampling"] > 0
    if arm.startswith(DENSE):
        rows, longest = 2 * 2 * 4, len("12 + 35 = 47\n48 + 19 =") + task.max_tokens
        assert 0 < last["backward_tokens"] <= rows * longest * (0.6 if "shared" in arm else 1)
    assert train_one(options, task, tmp_path / "run", **small(model)) == records  # read, not run
    assert len(train_one(options, task, tmp_path / "run", **small(model, steps=1))) == 2  # its first step, read


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights_and_records(model, tmp_path):
    task, arm = TASKS["sentences"], ARMS["noise 0.3"]  # with partial credit, so that random weights have something
    options = small(model, steps=6)
    whole = train_one(arm, task, tmp_path / "whole", **options)

    class KilledError(RuntimeError):
        """As a signal would."""

    def kill(record):
        if record["step"] == 3:
            raise KilledError

    with pytest.raises(KilledError):
        train_one(arm, task, tmp_path / "killed", **options, on_step=kill)
    assert list((tmp_path / "killed").glob("checkpoint-2"))
    again = train_one(arm, task, tmp_path / "killed", **options)
    assert timeless(again) == timeless(whole)
    assert not list((tmp_path / "killed").glob("checkpoint-*"))


def timeless(records):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in records]


@pytest.mark.slow
def test_the_study_tunes_compares_and_draws_and_grows(model, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    line = f"study language --out {out} --model {model} --prompts 2 --group 4 --micro-batch 4 --held-out 6"
    line += " --evaluate-every 1 --tuning-steps 1 --no-bf16 --learning-rates 1e-3 1e-2 --lora-learning-rates 1e-2"
    words = [*line.split(), "--few", "uniform 15%", "--tuned", "noise 0.3", "--lora", "LoRA, noise 0.3"]
    first = ["--arms", "noise 0.3", "--seeds", "0", "--steps", "2"]
    status, said = sparkjoy(monkeypatch, capsys, *words, *first)
    assert status == 0, said
    found = json.loads((out / "summary.json").read_text())
    arms = [DENSE, "noise 0.3", "uniform 15%", "LoRA", "LoRA, noise 0.3", "noise 0.3, as many seconds"]
    assert [row["arm"] for row in found["table"]] == arms
    assert len(list((out / "runs").glob("*-100*"))) == 4  # two rates for TRL's own, and for what is tuned
    assert found["table"][0]["kept"] == 1
    assert all((out / f"{name}.png").exists() for name in ("language", "language_seconds"))
    before = (out / "summary.json").read_bytes()
    status, said = sparkjoy(monkeypatch, capsys, *words, *first)
    assert status == 0, said
    assert (out / "summary.json").read_bytes() == before
    grown = ["--arms", "noise 0.3", "zero advantages dropped", "--seeds", "0", "1", "--steps", "3"]
    status, said = sparkjoy(monkeypatch, capsys, *words, *grown)
    assert status == 0, said
    found = json.loads((out / "summary.json").read_text())["table"]
    assert [(row["arm"], row["seeds"], row["steps"]) for row in found[:3]] == [
        (DENSE, 2, 3),
        ("noise 0.3", 2, 3),
        ("zero advantages dropped", 2, 3),
    ]


@pytest.mark.parametrize("text", ["[]", "{}", "[1]", '[{"step": 0}]', "{"])
def test_records_of_a_finished_run_that_are_none_are_refused_and_stay(tmp_path, text):
    (tmp_path / "records.json").write_text(text)
    with pytest.raises(ValueError, match=r"records\.json (holds no records|cannot be read)"):
        train_one(ARMS[DENSE], TASKS["sums"], tmp_path, **small("unread"))
    assert (tmp_path / "records.json").read_text() == text


def test_max_variance_keeps_the_ends_of_each_group_that_has_any():
    trainer = SimpleNamespace(
        _gate_rewards=torch.tensor([0.0, 1.0, 0.5, 0.2, 1.0, 1.0, 1.0, 1.0]).unsqueeze(1),
        reward_weights=torch.ones(1),
        num_generations=4,
        kept=2,
        _metrics={"train": {"gate/kept_rate": []}},
        _mine=lambda of_all, local: of_all,
    )
    output = {"advantages": torch.zeros(8)}
    keep = MaxVariance._decide(trainer, None, output)
    assert keep.tolist() == [True, True, *[False] * 6]
    assert output["advantages"][:2].tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5], abs=1e-3)


def row(step, score, seconds):
    tokens = {"backward_tokens": 10 * step}
    return {"step": step, "score": score, "seconds": dict.fromkeys((*PARTS, "total"), seconds), **tokens}


def test_the_target_is_reached_on_the_line_between_two_scores():
    run = [row(0, 0.2, 0.0), row(2, 0.4, 6.0), row(4, 0.8, 10.0)]
    assert crossing(run, 0.6) == {"step": 3, "seconds": 8, "backward_tokens": 30}
    assert crossing(run, 0.1)["step"] == 0
    assert crossing(run, 0.9) is None


def of_arms(scores):
    return [
        {"arm": arm, "seed": seed, "learning_rate": 1e-5, **row(step, score, 2.0 * step)}
        for arm, seeds in scores.items()
        for seed, of_seed in enumerate(seeds)
        for step, score in enumerate(of_seed)
    ]


def test_an_arm_is_compared_with_the_dense_one_at_the_end_and_at_90_percent_of_its_gain():
    dense, gated, other = table(
        of_arms(
            {
                DENSE: [[0.2, 0.4, 0.8, 0.8, 0.8], [0.2, 0.6, 0.8, 0.8, 0.8]],
                "noise 0.3": [[0.2, 0.8, 0.8, 0.8, 0.8], [0.2, 0.8, 0.9, 0.9, 0.9]],
                "uniform 15%": [[0.2, 0.3, 0.3, 0.3, 0.3]],
            }
        )
    )
    assert dense["target"] == pytest.approx(0.2 + 0.9 * 0.6)
    assert dense["seconds_of_dense"][0] == 1
    assert dense["difference"][0] == 0
    assert gated["difference"][0] == pytest.approx(0.05)
    half = 12.706 * 0.0707 / 2**0.5  # Student's t of two seeds
    assert gated["difference"][1:] == pytest.approx([0.05 - half, 0.05 + half], abs=1e-3)
    reached = [(1.85 + 1.7) / 2, 0.54 / 0.6]
    assert [dense["step_to_target"], gated["step_to_target"]] == pytest.approx(reached)
    ratio, low, high = gated["seconds_of_dense"]
    assert ratio == pytest.approx(reached[1] / reached[0])
    assert low <= ratio <= high
    assert other["step_to_target"] is None
    assert other["seconds_of_dense"] is None
    assert math.isnan(other["difference"][1])


def test_all_prompts_beginnings_are_read_once_for_the_score(model):
    policy, _ = pretrained(model)
    policy.eval()
    ids = torch.tensor([[3, 4, 5, 6, 7], [3, 4, 5, 8, 9], [3, 4, 5, 6, 10]])
    plain = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 4, "pad_token_id": 0}
    seen = []
    policy.get_input_embeddings().register_forward_hook(lambda _, given, __: seen.append(given[0].shape))
    cache = common_beginning(policy, ids)
    assert torch.equal(policy.generate(ids, **plain, **cache), policy.generate(ids, **plain))
    assert seen[:2] == [(1, 3), (3, 2)]
    assert common_beginning(policy, torch.tensor([[3, 4], [5, 6]])) == {}


def test_the_rate_is_chosen_by_the_whole_curve():
    soon, late = [row(0, 0.1, 0), row(1, 0.5, 1), row(2, 0.5, 2)], [row(0, 0.1, 0), row(1, 0.3, 1), row(2, 0.6, 2)]
    assert most_learnt({1e-5: late, 2e-5: soon}) == 2e-5
    assert most_learnt({1e-5: soon, 2e-5: soon}) == 1e-5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"task": "poems"}, "--task"),
        ({"arms": ("dense",)}, "--arms"),
        ({"tuned": (DENSE,)}, "--tuned"),
        ({"lora": ("noise 0.3",)}, "--lora"),
        ({"seeds": (0, 0)}, "--seeds"),
        ({"seeds": (100,)}, "--tuning-seed"),
        ({"learning_rates": ()}, "--learning-rates"),
        ({"learning_rates": (-1.0,)}, "--learning-rates"),
        ({"steps": 0}, "--steps"),
        ({"group": 1}, "--group"),
        ({"micro_batch": 7}, "--micro-batch"),
    ],
)
def test_what_cannot_be_run_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        LanguageStudy(**flags)
