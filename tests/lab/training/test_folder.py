"""A folder: locked while open, refused where it is another's, left as it was where nothing came of it."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import sparkjoy

from sparkjoy_lab.training.folder import LOCK, opened
from sparkjoy_lab.training.tracking import write_json, write_whole

CONFIG = {"steps": 10, "rates": (0.1, 0.3), "price": None}


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_folder_is_open_once_and_can_be_opened_again(tmp_path):
    with opened(tmp_path / "a", CONFIG):
        with pytest.raises(ValueError, match="another process is at work there"), opened(tmp_path / "a", CONFIG):
            pass
        assert LOCK in names(tmp_path / "a")
    assert names(tmp_path / "a") == ["config.json"]
    with opened(tmp_path / "a", CONFIG):
        pass


def test_what_came_to_nothing_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), opened(tmp_path / "a" / "b", CONFIG):
        raise KeyError
    assert names(tmp_path) == []
    with opened(tmp_path / "a", CONFIG):
        write_json(tmp_path / "a" / "summary.json", {})
    with pytest.raises(KeyError), opened(tmp_path / "a", CONFIG):
        raise KeyError
    assert names(tmp_path / "a") == ["config.json", "summary.json"]


def test_a_config_alone_blocks_nobody_but_results_do(tmp_path):
    write_json(tmp_path / "config.json", {**CONFIG, "steps": 20})
    with opened(tmp_path, CONFIG):
        write_json(tmp_path / "records.jsonl", {})
    with pytest.raises(ValueError, match=r"other settings \(steps\)"), opened(tmp_path, {**CONFIG, "steps": 20}):
        pass
    with pytest.raises(ValueError, match="another command"), opened(tmp_path, {"arms": 3}):
        pass
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 10


def test_lists_of_runs_may_grow_and_nothing_else_may(tmp_path):
    def reopened(**changes):
        return opened(tmp_path, {**CONFIG, **changes}, extends=("rates", "seeds"))

    with opened(tmp_path, CONFIG):
        write_json(tmp_path / "summary.json", {})
    cure = r"\(rates\); begin with those there and then add others, or give"
    for fewer in ((0.1,), (0.3, 0.1, 0.2), ()):
        with pytest.raises(ValueError, match=cure), reopened(rates=fewer):
            pass
    with pytest.raises(ValueError, match=r"\(rates, steps\); give another"), reopened(rates=(0.1, 0.3, 1.0), steps=20):
        pass
    assert json.loads((tmp_path / "config.json").read_text())["rates"] == [0.1, 0.3]
    with reopened(rates=(0.1, 0.3, 1.0)):
        pass
    assert json.loads((tmp_path / "config.json").read_text())["rates"] == [0.1, 0.3, 1.0]


def test_a_longer_list_that_came_to_nothing_leaves_the_shorter_one(tmp_path):
    def fails_after(work):
        with opened(tmp_path, {**CONFIG, "rates": (0.1, 0.3, 1.0)}, extends=("rates",)):
            work()
            raise KeyError

    def save():
        write_json(tmp_path / "summary.json", {})

    with opened(tmp_path, CONFIG):
        save()
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(KeyError):
        fails_after(lambda: None)
    assert (tmp_path / "config.json").read_bytes() == before
    with pytest.raises(KeyError):
        fails_after(save)
    assert (tmp_path / "config.json").read_bytes() != before  # the summary may be of the new ones


@pytest.mark.parametrize(
    "text", ["[]", "null", "3", '"x"', "{", "", "[" * 100_000, "1" * 10_000, "\ufeff{}", '{"a": 1}', '{"a\\nb": 1}']
)
def test_a_config_that_is_not_ours_is_refused_and_stays(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json|another command") as refusal, opened(tmp_path, CONFIG):
        pass
    assert "\n" not in str(refusal.value)
    assert (tmp_path / "config.json").read_text() == text
    assert names(tmp_path) == ["config.json"]


@pytest.mark.parametrize("name", ["records.jsonl", "summary.json", "answers.jsonl", "checkpoint.pt", "pareto.png"])
def test_results_without_a_config_are_refused(tmp_path, name):
    (tmp_path / name).write_text("mine")
    before = names(tmp_path)
    with pytest.raises(ValueError, match=r"no config\.json"), opened(tmp_path, CONFIG):
        pass
    assert names(tmp_path) == before


def test_a_users_own_files_are_never_touched(tmp_path):
    own = ("probe", ".tmp-config.json", ".tmp-mine", "notes.txt", ".lock")
    for name in own:
        (tmp_path / name).write_text("mine")
    stale = tmp_path / ".tmp-records.jsonl-0123456789abcdef"  # of a process that was killed
    stale.write_text("half")
    with opened(tmp_path, CONFIG):
        write_json(tmp_path / "summary.json", {})
    assert names(tmp_path) == sorted([*own, "config.json", "summary.json"])
    assert all((tmp_path / name).read_text() == "mine" for name in own)


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "records.jsonl"
    write_whole(path, b"before")

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ValueError, match=r"records.jsonl cannot be written \(No space left on device\)"):
        write_whole(path, b"after")
    assert path.read_bytes() == b"before"
    assert names(tmp_path) == ["records.jsonl"]


def take(folder, start, found):
    start.wait()
    try:
        with opened(folder, CONFIG):
            write_json(folder / "summary.json", {})
            found.put("in")
            time.sleep(0.3)
    except ValueError as error:
        found.put(str(error))


@pytest.mark.slow
def test_of_two_that_start_at_once_one_is_refused_every_time(tmp_path):
    context = multiprocessing.get_context("fork")
    for number in range(20):
        start, found = context.Barrier(2), context.Queue()
        both = [context.Process(target=take, args=(tmp_path / str(number), start, found)) for _ in range(2)]
        for process in both:
            process.start()
        said = sorted(found.get(timeout=30) for _ in both)
        for process in both:
            process.join()
        assert said[1] == "in"
        assert "another process is at work there" in said[0]


COMMANDS = (
    *(("train", "mnist"), ("train", "reversal"), ("pareto", "mnist"), ("pareto", "reversal"), ("bench",)),
    *(("study", name) for name in ("scores", "screening", "bandit", "scaling", "budget", "gain", "tokens")),
)


def test_every_command_is_refused_a_locked_folder_and_another_commands(monkeypatch, capsys, tmp_path):
    done = tmp_path / "done"
    steps = ("--steps", 10, "--evaluate-every", 10)
    assert sparkjoy(monkeypatch, capsys, "train", "mnist", *steps, "--out", done)[0] == 0
    before = {path.name: path.read_bytes() for path in done.iterdir()}
    for command in COMMANDS:
        status, said = sparkjoy(monkeypatch, capsys, *command, "--out", done)
        assert (status, said.count("\n")) == (2, 1), command
        assert "another command" in said or "other settings" in said
        with opened(tmp_path / "locked", CONFIG):
            status, said = sparkjoy(monkeypatch, capsys, *command, "--out", tmp_path / "locked")
        assert (status, said.count("\n")) == (2, 1), command
        assert "another process is at work there" in said
    assert {path.name: path.read_bytes() for path in done.iterdir()} == before


def test_out_may_be_below_home_and_not_be_empty(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    steps = ("--steps", 10, "--evaluate-every", 10)
    assert sparkjoy(monkeypatch, capsys, "train", "mnist", *steps, "--out=~/run")[0] == 0
    assert (tmp_path / "run" / "summary.json").exists()
    for empty in (["--out="], ["--out", ""]):
        status, said = sparkjoy(monkeypatch, capsys, "train", "mnist", *steps, *empty)
        assert (status, said) == (2, "sparkjoy: --out has an empty value; give one.\n")
    assert names(tmp_path) == sorted(["run", *(f"run/{name}" for name in names(tmp_path / "run"))])


@pytest.mark.slow
def test_a_killed_process_leaves_no_lock(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "sparkjoy_lab", "train", "mnist", "--steps", "100000", "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out / "records.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    config = json.loads((out / "config.json").read_text())
    with pytest.raises(ValueError, match="another process"), opened(out, config):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (out / LOCK).exists()
    with opened(out, config):
        pass
    assert not (out / LOCK).exists()
