"""`sparkjoy frontier` on a model made on the spot, with prompts and a reward of the user's own."""

import json
from dataclasses import replace

import pytest
import torch
import trl_task
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2ForCausalLM

from sparkjoy.frontier import Frontier, Setting
from sparkjoy.lab.bench.frontier import FrontierConfig, plot, run
from sparkjoy.lab.bench.own_model import OwnModel, sample
from sparkjoy.lab.cli import main

PROMPTS = ["12>", "345>", "6>", "7890>"]
REWARD = """
def copied(prompts, completions, digits, **_):
    assert all(prompt.startswith(copy) for prompt, copy in zip(prompts, digits))
    return [sum(a == b for a, b in zip(*pair)) - 0.1 * len(pair[0]) for pair in zip(completions, digits)]

def length(completions, **_):
    return [len(text) for text in completions]

def chat(prompts, completions, **_):
    return [len(answer[0]["content"]) + 0 * len(turns[0]["content"]) for turns, answer in zip(prompts, completions)]

def same(completions, **_):
    return [1.0] * len(completions)

def few(completions, **_):
    return [1.0]

def nothing(completions, **_):
    return [None] * len(completions)

def broken(completions, **_):
    raise KeyError("answer")

constant = 3
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder with two models, prompts of three kinds, and rewards."""
    folder = tmp_path_factory.mktemp("own")
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=14, n_positions=24, n_embd=16, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=1)
    )
    tokenizer = trl_task.tokenizer()
    tokenizer.chat_template = "{% for turn in messages %}{{ turn['content'] }}{% endfor %}"
    for name, model in {"qwen": trl_task.model(), "gpt2": gpt2}.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = {
        "columns.jsonl": [{"prompt": text, "digits": text[:-1]} for text in PROMPTS],
        "chat.jsonl": [{"prompt": [{"role": "user", "content": text}]} for text in PROMPTS],
        "odd.jsonl": [{"prompt": "1>"}, {"prompt": "2>", "digits": "2"}],
        "no_prompt.jsonl": [{"question": "1>"}],
    }
    for name, lines in rows.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "plain.txt").write_text("\n".join([*PROMPTS, "", ""]))
    (folder / "empty.txt").write_text("\n")
    (folder / "no.jsonl").write_text("prompt: 1>\n")
    (folder / "reward.py").write_text(REWARD)
    (folder / "wrong.py").write_text("import nowhere_to_be_found\n")
    return folder


def options(own, **changes):
    given = {"model": "qwen", "prompts": "columns.jsonl", "reward": "reward.py:copied"}
    given |= {name: changes.pop(name) for name in list(changes) if name in given}
    return {name: str(own / value) for name, value in given.items()} | {
        "group_size": 4, "prompts_per_step": 3, "max_new_tokens": 6
    } | changes  # fmt: skip


def frontier(monkeypatch, out, **given):
    flags = [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    monkeypatch.setattr("sys.argv", ["sparkjoy", "frontier", "--threads", "1", "--out", str(out), *flags])
    main()


def test_the_command_leaves_answers_a_summary_and_figures(monkeypatch, capsys, own, tmp_path):
    frontier(monkeypatch, tmp_path, **options(own), rounds=1)
    result = json.loads((tmp_path / "summary.json").read_text())
    assert list(result) == ["known", "not known"]
    for name, one in result.items():
        assert one["known"] == (name == "known")
        assert one["rows"] == 12
        assert one["micro_batch_size"] == result["known"]["micro_batch_size"]
        names = [setting["name"] for setting in one["settings"]]
        assert names[:3] == ["dense", "noise 0.1", "noise 0.3"]
        assert one["recommended"] in names
        assert one["reason"]
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 12
    assert {answer["prompt"] for answer in answers} <= set(PROMPTS)
    assert json.loads((tmp_path / "config.json").read_text())["step"]["group_size"] == 4
    assert (tmp_path / "frontier.png").stat().st_size > 10_000
    assert (tmp_path / "frontier.svg").exists()
    printed = capsys.readouterr().out
    assert printed.count("noise 0.3") >= 2
    assert result["known"]["reason"] in printed


@pytest.mark.parametrize(("prompts", "reward"), [("plain.txt", "length"), ("chat.jsonl", "chat")])
@pytest.mark.parametrize("model", ["qwen", "gpt2"])
def test_log_probs_are_those_of_each_answer_alone_without_padding(own, model, prompts, reward):
    config = OwnModel(**options(own, model=model, prompts=prompts, reward=f"reward.py:{reward}", temperature=0.7))
    step = sample(config)
    policy = {"qwen": Qwen2ForCausalLM, "gpt2": GPT2LMHeadModel}[model].from_pretrained(own / model).eval()
    assert torch.equal(step.log_probs, step.log_prob_fn(step.batch))
    length = step.mask.shape[1]
    ended = 0
    for row, (tokens, attention) in enumerate(zip(step.batch["tokens"], step.batch["attention"], strict=True)):
        read, ends = tokens[attention.bool()], (tokens[-length:] == 1).nonzero().flatten()
        answer = 1 + int(ends[0]) if len(ends) else length
        assert torch.equal(step.mask[row], torch.arange(length) < answer)
        ended += answer < length
        log_probs = (policy(read[None]).logits[0] / 0.7).log_softmax(1)[:-1].gather(1, read[1:, None]).squeeze(1)
        torch.testing.assert_close(step.log_probs[row][step.mask[row]], log_probs[-answer:], atol=1e-5, rtol=1e-4)
    assert ended > 0
    rewards = torch.tensor([answer["reward"] for answer in step.answers])
    torch.testing.assert_close(step.advantages.view(3, 4), rewards.view(3, 4) - rewards.view(3, 4).mean(1, True))


def test_the_figure_has_a_panel_for_each_measurement():
    dense = Setting("dense", None, "dense", 4.0, 16.0, 1.0, 1, 0.0, 1.0, 0.0, 3)
    one = Frontier((dense,), 4, 16, 4, True, "bytes")
    assert [len(plot(found, 0.3).axes) for found in ({"known": one}, {"known": one, "not known": one})] == [1, 2]


def test_the_same_seed_gives_the_same_batch(own):
    first, again, other = (sample(OwnModel(**options(own, seed=seed))) for seed in (0, 0, 1))
    assert torch.equal(first.batch["tokens"], again.batch["tokens"])
    assert first.answers != other.answers


def test_a_decoder_of_bench_needs_neither_prompts_nor_reward():
    small = OwnModel(model="gpt2-2m", group_size=2, prompts_per_step=2, max_new_tokens=4)
    told = []
    config = FrontierConfig(small, rounds=1, micro_batch_size=4, threads=1)
    step, found = run(config, lambda *said: told.append(said))
    assert [(one.tokens, one.known, one.dense.turns) for one in found.values()] == [(16, True, 1), (16, False, 1)]
    assert step.answers == []
    assert list(run(replace(config, known_only=True), lambda *said: None)[1]) == ["known"]
    assert [fraction for fraction, _ in told] == sorted(fraction for fraction, _ in told)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "nowhere"}, "nowhere"),
        ({"prompts": "nowhere.txt"}, "cannot be read"),
        ({"prompts": "empty.txt"}, "at least one prompt"),
        ({"prompts": "no.jsonl"}, "line 1: no JSON"),
        ({"prompts": "no_prompt.jsonl"}, 'an object with a "prompt"'),
        ({"prompts": "odd.jsonl"}, "line 2: other columns"),
        ({"prompts_per_step": 9}, "holds 4"),
        ({"prompts": "plain.txt"}, "raised TypeError"),
        ({"reward": "reward.py"}, "expected FILE.py:FUNCTION"),
        ({"reward": "reward.py:none"}, "no function 'none'"),
        ({"reward": "reward.py:constant"}, "no function 'constant'"),
        ({"reward": "plain.txt:copied"}, "no Python file"),
        ({"reward": "wrong.py:copied"}, "does not run"),
        ({"reward": "reward.py:broken"}, "raised KeyError"),
        ({"reward": "reward.py:few"}, "returned 1 numbers"),
        ({"reward": "reward.py:nothing"}, "expected a list of numbers"),
        ({"reward": "reward.py:same"}, "the same reward"),
        ({"group_size": 1}, "--group-size 1"),
        ({"temperature": 0}, "--temperature 0"),
        ({"noise": 0}, "--noise 0"),
        ({"rounds": 0}, "--rounds 0"),
        ({"device": "cuda"}, "--device cuda"),
        ({"model": "gpt2", "max_new_tokens": 30}, "can read"),
    ],
)
def test_what_a_user_got_wrong_is_one_line_and_status_two(monkeypatch, capsys, own, tmp_path, changes, message):
    with pytest.raises(SystemExit) as stop:
        frontier(monkeypatch, tmp_path / "out", **options(own, **changes))
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in said.splitlines()[-1]
    assert said.splitlines()[-1].startswith("sparkjoy: ")


def test_a_model_without_prompts_or_with_both_weights_and_prompts_is_refused(monkeypatch, capsys, own, tmp_path):
    for flags, message in (
        ({"model": own / "qwen"}, "expected --prompts FILE and --reward"),
        ({"model": "gpt2-2m", "prompts": own / "plain.txt"}, "neither --prompts nor --reward"),
    ):
        with pytest.raises(SystemExit):
            frontier(monkeypatch, tmp_path, **flags)
        assert message in capsys.readouterr().err
