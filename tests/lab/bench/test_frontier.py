"""`sparkjoy frontier` on a model made on the spot, with prompts and a reward of the user's own."""

import json
import math
import os
import re
import shutil
import sys
from dataclasses import replace

import pytest
import torch
import trl_task
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2ForCausalLM

from sparkjoy.frontier import Frontier, Setting
from sparkjoy_lab.bench import own_model
from sparkjoy_lab.bench.frontier import FrontierConfig, plot, run
from sparkjoy_lab.bench.own_model import OwnModel, read_prompts, sample
from sparkjoy_lab.cli import main
from sparkjoy_lab.training.stopping import Terminated

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


@pytest.mark.slow
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
    assert not step.answers
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
        ({"prompts": "plain.txt"}, "failed (TypeError"),
        ({"reward": "reward.py"}, "expected FILE.py:FUNCTION"),
        ({"reward": "reward.py:none"}, "no function 'none'"),
        ({"reward": "reward.py:constant"}, "no function 'constant'"),
        ({"reward": "plain.txt:copied"}, "no Python file"),
        ({"reward": "wrong.py:copied"}, "does not run"),
        ({"reward": "reward.py:broken"}, "failed (KeyError"),
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


@pytest.mark.parametrize(
    ("name", "data", "found"),
    [
        ("a.jsonl", '{"prompt": "1\u20282"}\n{"prompt": "3\x854"}\n', ["1\u20282", "3\x854"]),
        ("a.jsonl", '\ufeff{"prompt": "1>"}\r\n\r\n{"prompt": "2>"}\r\n', ["1>", "2>"]),
        ("a.txt", "\ufeff1>\n2\u20283\n4\f5\x0b6\x1c7\n", ["1>", "2\u20283", "4\f5\x0b6\x1c7"]),
        ("a.jsonl", '\n{"prompt": "1>"}\noops', "line 3: no JSON"),
        ("a.jsonl", "[" * 100_000, "line 1: no JSON"),
        ("a.jsonl", '{"prompt": []}', 'line 1: expected an object with a "prompt"'),
        ("a.jsonl", '{"prompt": ["1>"]}', 'line 1: expected an object with a "prompt"'),
        ("a.jsonl", '{"prompt": "1>", "completions": 1}', "rename the column"),
        ("a.txt", b"\xff\xfe1\0>\0", "cannot be read as UTF-8"),
    ],
)
def test_prompt_files_as_other_programs_write_them(tmp_path, name, data, found):
    (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    if isinstance(found, list):
        assert [row["prompt"] for row in read_prompts(tmp_path / name)] == found
    else:
        with pytest.raises(ValueError, match=found):
            read_prompts(tmp_path / name)


RIGHT = "def f(completions, **_): return [len(text) for text in completions]\n"
REWARDS = {
    RIGHT: None,
    "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass A: x: int\n" + RIGHT: None,
    "import pickle\nclass A: pass\npickle.loads(pickle.dumps(A()))\n" + RIGHT: None,
    "import words_beside\n" + RIGHT: None,
    "def f(completions, **_):\n import more_beside\n return [len(text) for text in completions]\n": None,
    "import os\nos.chdir('/')\n" + RIGHT: None,
    "async " + RIGHT: None,
    "import numpy\ndef f(completions, **_): return numpy.array([len(text) for text in completions])\n": None,
    "def f(prompts, completions, **_):\n n = [*map(len, completions)]\n prompts.clear()\n return n\n": None,
    "import sys\nsys.exit(0)\n": "does not run (SystemExit: 0)",
    "import sys\ndef f(**_): sys.exit(0)\n": "failed (SystemExit: 0)",
    "class Own(BaseException): pass\ndef f(**_): raise Own\n": "failed (Own: )",
    "def __getattr__(name): raise KeyError(name)\n": "no function 'f'",
    "def f(completions, **_): return '0123456789'[:len(completions)]\n": "expected a list of numbers",
    "def f(completions, **_): return ['1'] * len(completions)\n": "expected a list of numbers",
    "def f(completions, **_): return dict(enumerate(completions))\n": "expected a list of numbers",
    "def f(completions, **_): return set(range(len(completions)))\n": "expected a list of numbers",
    "def f(completions, **_): return [10**400] * len(completions)\n": "expected a list of numbers",
    "def f(completions, **_):\n yield 1.0\n raise KeyError\n": "expected a list of numbers",
}


@pytest.mark.parametrize("text", REWARDS)
def test_a_reward_is_any_file_that_python_runs_and_never_ends_the_command(monkeypatch, own, tmp_path, text):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", sys.path[:])
    for name in ("words_beside", "more_beside"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text("")
    (tmp_path / "json.py").write_text(text)  # of a name that is taken
    config = OwnModel(**{**options(own, prompts="plain.txt"), "reward": "json.py:f"})
    if REWARDS[text] is None:
        assert len(sample(config).answers) == 12
    else:
        with pytest.raises(ValueError, match=re.escape(REWARDS[text])):
            sample(config)
    assert json.dumps([]) == "[]"
    assert sys.modules["json"] is json


@pytest.mark.parametrize("error", [KeyboardInterrupt, Terminated])
def test_a_signal_while_the_reward_runs_is_no_error_of_its(monkeypatch, own, error):
    def stopped(named):
        def reward(**_):
            raise error

        return reward

    monkeypatch.setattr(own_model, "reward_function", stopped)
    with pytest.raises(error):
        sample(OwnModel(**options(own)))


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def weights(folder, work):
    found = load_file(folder / "model.safetensors")
    work(found)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


FOLDERS = {
    "only config.json": (
        lambda folder: [path.unlink() for path in folder.iterdir() if path.name != "config.json"],
        "cannot be loaded",
    ),
    "nothing": (lambda folder: [path.unlink() for path in folder.iterdir()], "cannot be loaded"),
    "half of the weights": (lambda folder: os.truncate(folder / "model.safetensors", 2_000), "SafetensorError"),
    "a page for weights": (lambda folder: (folder / "model.safetensors").write_text("<html>"), "SafetensorError"),
    "half of the tokenizer": (lambda folder: os.truncate(folder / "tokenizer.json", 300), "cannot be loaded"),
    "a list for a config": (lambda folder: (folder / "config.json").write_text("[]"), "cannot be loaded"),
    "a weight missing": (
        lambda folder: weights(folder, lambda found: found.pop("model.layers.0.self_attn.q_proj.weight")),
        "no weights for model.layers.0.self_attn.q_proj.weight",
    ),
    "NaN": (lambda folder: weights(folder, lambda found: [one.fill_(math.nan) for one in found.values()]), "nan"),
    "another size": (lambda folder: change(folder / "config.json", hidden_size=48), "RuntimeError"),
    "another vocabulary": (
        lambda folder: GPT2LMHeadModel(GPT2Config(vocab_size=5, n_embd=8, n_layer=1, n_head=2)).save_pretrained(folder),
        "gives a token 13, and the model knows 5",
    ),
    "an unknown kind": (lambda folder: change(folder / "config.json", model_type="new"), "model type `new`"),
    "half of a quantised one": (
        lambda folder: change(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        "ImportError",
    ),
    "no end": (
        lambda folder: (
            (folder / "generation_config.json").unlink(),
            change(folder / "config.json", eos_token_id=None),
            change(folder / "tokenizer_config.json", eos_token=None),
        ),
        None,
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_an_odd_model_folder_is_one_line(monkeypatch, capsys, own, tmp_path, name):
    damage, message = FOLDERS[name]
    shutil.copytree(own / "qwen", tmp_path / "model")
    damage(tmp_path / "model")
    capsys.readouterr()
    if message is None:
        assert len(sample(OwnModel(**{**options(own), "model": str(tmp_path / "model")})).answers) == 12
        return
    given = {**options(own), "model": tmp_path / "model"}
    with pytest.raises(SystemExit) as stop:
        frontier(monkeypatch, tmp_path / "out", **given)
    said = capsys.readouterr().err
    assert (stop.value.code, said.count("\n")) == (2, 1), said
    assert said.startswith(f"sparkjoy: --model {tmp_path / 'model'} cannot ")
    assert message in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ('{"prompt": ""}', "no token of one of the prompts"),
        ('{"prompt": "\\ud800"}', "cannot answer (TypeError"),
        ('{"prompt": [{"role": "user"}]}', "no token of one of the prompts"),
    ],
)
def test_a_prompt_that_the_tokenizer_cannot_read_is_named_so(own, tmp_path, prompts, message):
    (tmp_path / "odd.jsonl").write_text(f"{prompts}\n" * 3)
    with pytest.raises(ValueError, match=re.escape(message)):
        sample(OwnModel(**{**options(own, reward="reward.py:length"), "prompts": str(tmp_path / "odd.jsonl")}))


@pytest.mark.parametrize("kind", ["qwen2", "new"])
@pytest.mark.parametrize("trusted", [False, True])
def test_code_in_a_model_folder_runs_with_our_flag_alone(monkeypatch, own, tmp_path, kind, trusted):
    """Neither asked for on a terminal, where anybody may say yes, nor run unasked."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = tmp_path / f"model_{kind}_{trusted}"
    shutil.copytree(own / "qwen", folder)
    change(folder / "config.json", model_type=kind, auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})
    code = "from transformers import Qwen2Config, Qwen2ForCausalLM\n"  # own classes: transformers marks what it loads
    code += f"class C(Qwen2Config):\n    model_type = {kind!r}\nclass M(Qwen2ForCausalLM):\n    config_class = C\n"
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n{code}")
    config = OwnModel(**{**options(own), "model": str(folder)}, trust_remote_code=trusted)
    if trusted or kind == "qwen2":  # a kind that transformers knows needs no code
        assert len(sample(config).answers) == 12
    else:
        with pytest.raises(ValueError, match="which only --trust-remote-code runs"):
            sample(config)
    assert (tmp_path / "ran").exists() == trusted
