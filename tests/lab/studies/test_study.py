"""The one way to run a study: in processes of its own as in one, to the bit; stopped, it goes on and leaves nobody."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd
import pytest
from command_line import sparkjoy
from matplotlib.figure import Figure

from sparkjoy_lab.studies import budget, study
from sparkjoy_lab.studies.budget import BudgetStudy
from sparkjoy_lab.studies.frictions import FrictionsStudy
from sparkjoy_lab.studies.pareto import ParetoConfig, ParetoReversal
from sparkjoy_lab.studies.runs import Run
from sparkjoy_lab.studies.scaling import ScalingStudy
from sparkjoy_lab.studies.score_comparison import ScoresStudy
from sparkjoy_lab.studies.study import Study, run_study
from sparkjoy_lab.tasks.reversal import ReversalConfig
from sparkjoy_lab.training.settings import Settings

TINY = ReversalConfig(prompt_length=2, prompts=4, answers=4, held_out=20, layers=1, width=8, heads=2, feed_forward=8)
STUDIES = {
    "pareto": ParetoReversal(ParetoConfig(methods=("dg", "kondo"), rates=(0.5,), seeds=(0, 1), steps=6), TINY),
    "frictions": FrictionsStudy(
        prompt_lengths=(2,),
        frictions=("none", "all"),
        arms=("dg", "noise 0.3"),
        learning_rates=(1e-3, 2e-3),
        tuning_seeds=(9,),
        seeds=(0,),
        steps_per_token=3,
    ),
}


@pytest.fixture
def started():
    """Start a study in two processes that would take hours, and give it once both are at work."""
    processes = []

    def start(out):
        line = ["pareto", "mnist", "--methods", "dg", "pg", "--seeds", "0", "--steps", "1000000", "--jobs", "2"]
        process = subprocess.Popen(
            [sys.executable, "-m", "sparkjoy_lab", *line, "--evaluate-every", "20", "--out", str(out)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        processes.append(process)
        deadline = time.monotonic() + 120
        while len(list(out.glob("runs/*/records.jsonl"))) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stderr.close()


def children(pid):
    """The processes that train; multiprocessing has one more, which keeps count of what is shared."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


@dataclass(frozen=True)
class Few(Study):
    """Some runs, each as it is told."""

    settings: tuple[Settings, ...] = ()
    task: ReversalConfig = field(default_factory=lambda: TINY)

    @property
    def runs(self):
        return len(self.settings)

    def run(self, work):
        runs = [Run(one, self.task) for one in self.settings]
        return [records[-1] for records in work.each(work.train, runs)]

    def summary(self, rows):
        return {"runs": rows}

    def tables(self, rows):
        return {"errors": pd.DataFrame({"error": [f"{row['error']:.2f}" for row in rows]})}

    def figures(self, rows):
        return {"few": Figure()}


def results(out):
    """Every JSON file below a folder, without seconds."""
    paths = [path for path in sorted(out.rglob("*.json*")) if path.is_file()]
    return {str(path.relative_to(out)): timeless([json.loads(line) for line in lines(path)]) for path in paths}


def lines(path):
    text = path.read_text()
    return text.splitlines() if path.suffix == ".jsonl" else [text]


def timeless(value):
    if isinstance(value, dict):
        if value.get("budget") == "seconds":  # the scaling study's longest prompts
            return None
        return {key: timeless(item) for key, item in value.items() if "seconds" not in key}
    return [timeless(item) for item in value] if isinstance(value, list) else value


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_runs_in_two_processes_leave_what_runs_in_one_leave(tmp_path, name, capsys):
    run_study(STUDIES[name], tmp_path / "one")
    alone = capsys.readouterr().out
    run_study(STUDIES[name], tmp_path / "two", jobs=2)
    together = capsys.readouterr().out
    assert results(tmp_path / "two") == results(tmp_path / "one")
    names = [sorted(str(path.relative_to(out)) for path in out.rglob("*")) for out in tmp_path.iterdir()]
    assert names[0] == names[1]
    finished = [sorted(line for line in said.splitlines() if ": error" in line) for said in (alone, together)]
    assert finished[0] == finished[1]  # each run is told of
    assert len(finished[0]) == STUDIES[name].runs
    before = {path: path.read_bytes() for path in (tmp_path / "two").rglob("*.jsonl")}
    run_study(STUDIES[name], tmp_path / "two", jobs=2)
    assert {path: path.read_bytes() for path in (tmp_path / "two").rglob("*.jsonl")} == before  # nothing ran again


PARETO = ParetoConfig(methods=("kondo",), rates=(0.5,), seeds=(0,), steps=6)
MORE = replace(PARETO, methods=("kondo", "dg"), rates=(0.5, 0.1), prices=(0.0,), noises=(0.3,), seeds=(0, 1))
TUNED = {"arms": ("dg",), "learning_rates": (1e-3, 3e-3), "tuning_seeds": (9,), "seeds": (0,)}
GROWN = {
    "pareto": (ParetoReversal(PARETO, TINY), {"study": MORE}, {"study": replace(MORE, steps=7)}),
    "scaling": (
        ScalingStudy(prompt_lengths=(2,), width=8, answers=500, target_error=0.6, **TUNED),
        {"prompt_lengths": (2, 3), "arms": ("dg", "pg"), "seeds": (0, 1)},
        {"tuning_seeds": (9, 10)},
    ),
    "frictions": (
        FrictionsStudy(
            prompt_lengths=(2,), frictions=("none",), steps_per_token=1, **{**TUNED, "learning_rates": (1e-3,)}
        ),
        {"prompt_lengths": (2, 3), "frictions": ("none", "all"), "arms": ("dg", "noise 0.3"), "seeds": (0, 1)},
        {"steps_per_token": 2},
    ),
    "budget": (
        BudgetStudy(tasks=("reversal H=10 M=2",), reversal_steps=2, **TUNED),
        {"tasks": ("reversal H=10 M=2", "reversal H=10 M=5"), "arms": ("dg", "hard 3%"), "seeds": (0, 1)},
        {"reversal_steps": 3},
    ),
    "scores": (
        ScoresStudy(scores=("delight",), seeds=(0,), steps=10, evaluate_every=5),
        {"scores": ("delight", "uniform"), "seeds": (0, 1)},
        {"rate": 0.1},
    ),
}
"""Of each study one with few runs, what gives it more, and what makes other runs of them."""


@pytest.mark.slow
@pytest.mark.parametrize("name", GROWN)
def test_runs_that_are_added_leave_what_all_at_once_leave_and_the_others_alone(monkeypatch, tmp_path, name):
    monkeypatch.setattr(budget, "REVERSAL", {"reversal H=10 M=2": TINY, "reversal H=10 M=5": replace(TINY, answers=5)})
    few, more, other = GROWN[name]
    run_study(few, tmp_path / "grown")
    trained = {path: path.read_bytes() for path in (tmp_path / "grown").rglob("checkpoint.pt")}
    with pytest.raises(ValueError, match=r"other settings .*; give another folder"):
        run_study(replace(few, **{**more, **other}), tmp_path / "grown")
    run_study(replace(few, **more), tmp_path / "grown")
    run_study(replace(few, **more), tmp_path / "fresh")
    assert results(tmp_path / "grown") == results(tmp_path / "fresh")
    assert {path: path.read_bytes() for path in trained} == trained  # seconds and all: they were not trained again
    assert len(list((tmp_path / "fresh").rglob("checkpoint.pt"))) > len(trained) > 0
    with pytest.raises(ValueError, match="begin with those there and then add others"):
        run_study(few, tmp_path / "grown")


def flip_a_bit(run):
    data = bytearray((run / "checkpoint.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (run / "checkpoint.pt").write_bytes(data)


def put_a_file_there(run):
    shutil.rmtree(run)
    run.write_text("mine")


DAMAGES = {
    "bit": flip_a_bit,
    "config": lambda run: (run / "config.json").write_text("{"),
    "other settings": lambda run: (run / "config.json").write_text("{}"),
    "file": put_a_file_there,
}


TWO = replace(PARETO, methods=("kondo", "dg"))
FINISHED = {
    "pareto": (ParetoReversal(TWO, TINY), {"study": replace(TWO, seeds=(0, 1))}),
    "scaling": (replace(GROWN["scaling"][0], prompt_lengths=(2, 3)), {"arms": ("dg", "pg")}),
}
"""Studies of two runs that count, and what puts another one between them."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    for name, (few, _) in FINISHED.items():
        run_study(few, folder / name)
    return folder


@pytest.mark.parametrize(("name", "damage"), [*(("pareto", damage) for damage in DAMAGES), ("scaling", "bit")])
def test_a_damaged_run_leaves_the_results_of_all(tmp_path, finished, name, damage):
    few, more = FINISHED[name]
    shutil.copytree(finished / name, tmp_path, dirs_exist_ok=True)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.json*") if path.name != "config.json"}
    last = max(tmp_path.rglob("checkpoint.pt"), key=lambda path: path.stat().st_mtime_ns).parent
    DAMAGES[damage](last)
    for study_again in (few, replace(few, **more)):
        with pytest.raises(ValueError, match=r"nothing was changed|another|cannot write"):
            run_study(study_again, tmp_path)
        assert {path: path.read_bytes() for path in before} == before


@pytest.mark.slow
def test_the_error_of_one_run_is_the_study_s_and_ends_the_others(tmp_path):
    breaks = Settings(learning_rate=1e12, steps=50, evaluate_every=10)
    long = Settings(method="dg", steps=100_000, evaluate_every=1_000)
    with pytest.raises(ValueError, match="--learning-rate 1e\\+12 is too large"):
        run_study(Few((long, breaks)), tmp_path, jobs=2)
    assert (tmp_path / "runs" / "dg-seed-0" / "checkpoint.pt").exists()  # it ended after a step


@pytest.mark.slow
def test_a_process_that_is_killed_is_one_line(tmp_path, started):
    process = started(tmp_path / "out")
    os.kill(children(process.pid)[0], signal.SIGKILL)
    said = without_warning(process.communicate(timeout=120)[1].decode())
    assert process.returncode == 2
    assert said == "sparkjoy: a process that trained was ended from outside, as where memory runs out.\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "to_group", "status"),
    [(signal.SIGTERM, False, 143), (signal.SIGINT, True, 130)],
)
def test_a_signal_leaves_checkpoints_and_no_process(tmp_path, started, number, to_group, status):
    out = tmp_path / "out"
    process = started(out)
    working = children(process.pid)
    assert len(working) == 2
    (os.killpg if to_group else os.kill)(process.pid, number)
    said = without_warning(process.communicate(timeout=120)[1].decode())
    assert process.returncode == status, said
    assert said.count("\n") == 1, said
    assert len(list(out.glob("runs/*/checkpoint.pt"))) == 2
    assert not any(alive(pid) for pid in working)
    assert not list(out.rglob(".sparkjoy-lock"))


@pytest.mark.slow
def test_processes_whose_first_one_is_killed_end_by_themselves(tmp_path, started):
    process = started(tmp_path / "out")
    working = children(process.pid)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while any(alive(pid) for pid in working):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_jobs_are_at_least_one_and_not_without_end(monkeypatch, capsys, tmp_path):
    for jobs in (0, -1, 100_000):
        status, said = sparkjoy(monkeypatch, capsys, "study", "frictions", "--jobs", jobs, "--out", tmp_path / "out")
        assert status == 2
        assert said.startswith(f"sparkjoy: --jobs {jobs}: expected a number from 1 to ")
    status, said = sparkjoy(monkeypatch, capsys, "study", "gain", "--jobs", 2, "--out", tmp_path / "out")
    assert (status, "--jobs" in said) == (2, True)  # what is timed is alone
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("cpus", "threads", "jobs", "said"),
    [
        (2, 1, 2, None),
        (2, 1, 9, "4 runs at once, of 1 thread each, wait for one another on 2 CPUs; --jobs 2 fits"),
        (3, 2, 2, "2 runs at once, of 2 threads each, wait for one another on 3 CPUs; --jobs 1 fits"),
        (1, 4, 1, None),
    ],
)
def test_more_threads_than_cpus_are_told_of_and_left_alone(monkeypatch, capsys, tmp_path, cpus, threads, jobs, said):
    monkeypatch.setattr(study, "available_cpus", lambda: cpus)
    monkeypatch.setattr(study, "Workers", lambda count, out: nullcontext())
    arms = ParetoReversal(ParetoConfig(methods=("dg",), seeds=(0, 1, 2, 3), threads=threads), TINY)
    with study.working(arms, tmp_path, jobs):
        pass
    shown = capsys.readouterr().err
    assert shown.count("\n") == (said is not None)
    assert said is None or said in shown


def without_warning(said):
    """What was said, but for what a machine of one CPU is told."""
    return "".join(line for line in said.splitlines(keepends=True) if "wait for one another" not in line)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
