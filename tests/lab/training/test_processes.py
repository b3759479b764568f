"""Several processes train as one does, and go on from one another's checkpoints."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import processes_worker
import pytest
import torch
from command_line import sparkjoy
from launching import descendants, kill, run_processes, start

from sparkjoy_lab import cli
from sparkjoy_lab.tasks.reversal import ReversalConfig, ReversalTask
from sparkjoy_lab.training.building import build_step
from sparkjoy_lab.training.checkpoint import load_checkpoint
from sparkjoy_lab.training.processes import WHOLE, Share
from sparkjoy_lab.training.settings import Settings


def records_of(out):
    return [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]


def assert_same_run(found, expected):
    """Equal but for seconds, FLOPs (a process reads a prompt for its own answers only) and the rounding of sums."""
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    for record, reference in zip(found, expected, strict=True):
        assert (record["samples"], record["kept"]) == (reference["samples"], reference["kept"])
        for name in ("backward_samples", "forward_samples", "backward_tokens", "forward_tokens"):
            assert reference[name] <= record[name] <= 1.1 * reference[name], name  # fillers ran, and are counted
        for name in ("error", "reward", "price"):
            value = reference[name]
            assert record[name] == (None if value is None else pytest.approx(value, rel=1e-4)), name


@pytest.mark.slow
def test_two_processes_train_as_one_by_every_method(tmp_path):
    worker = Path(processes_worker.__file__)
    run_processes(worker, 2, [tmp_path / "two"], store=tmp_path / "store")
    processes_worker.run(WHOLE, tmp_path / "one")
    for name in processes_worker.METHODS:
        found, expected = records_of(tmp_path / "two" / name), records_of(tmp_path / "one" / name)
        assert_same_run(found, expected)
        weights = [load_checkpoint(tmp_path / count / name / "checkpoint.pt")["policy"] for count in ("two", "one")]
        for key in weights[0]:
            torch.testing.assert_close(weights[0][key], weights[1][key], rtol=1e-3, atol=1e-4)


FLAGS = {"--prompt-length": "5", "--steps": "60", "--evaluate-every": "5", "--rate": "0.1"}
CODE = "import sparkjoy_lab.training.loop as l; l.CHECKPOINT_SECONDS = 0.0; import sparkjoy_lab.cli as c; c.main()"


def command(processes, script, out, **flags):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [
        sys.executable,
        *(torchrun if processes > 1 else []),
        *(("-m", "sparkjoy_lab") if script == "-m" else (str(script),)),
        "train",
        "reversal",
        *(part for flag in (FLAGS | {f"--{name}": value for name, value in flags.items()}).items() for part in flag),
        "--out",
        out,
    ]


def run(processes, script, out, kill_after=None):
    """Train to the end, or until `kill_after` records are there."""
    log = out.with_suffix(".log")
    process = start(command(processes, script, out), os.environ, log)
    deadline = time.monotonic() + 120
    try:
        while process.poll() is None and time.monotonic() < deadline:
            records = out / "records.jsonl"
            if kill_after is not None and records.exists() and len(records.read_text().splitlines()) >= kill_after:
                break
            time.sleep(0.02)
    finally:
        killed = kill(process)
    assert killed == (kill_after is not None), log.read_text()
    assert killed or process.returncode == 0, log.read_text()


@pytest.mark.slow
def test_a_killed_run_goes_on_with_another_number_of_processes(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(CODE)
    run(1, script, tmp_path / "one")
    run(2, script, tmp_path / "two")
    same, mixed = tmp_path / "same", tmp_path / "mixed"
    run(2, script, same, kill_after=3)
    shutil.copytree(same, mixed)
    run(2, script, same)
    run(1, script, mixed, kill_after=7)
    run(2, script, mixed)
    one, two, mixed, same = (records_of(tmp_path / name) for name in ("one", "two", "mixed", "same"))
    assert len(mixed) == 12
    assert_same_run(two, one)
    assert_same_run(mixed, one)
    for record, reference in zip(same, two, strict=True):  # the same number of processes: the same to the bit
        # What a pass costs is measured by each process, and taken over from the first when a run goes on.
        measured = {"seconds": None, "forward_flops": None, "backward_flops": None}
        assert {**record, **measured} == {**reference, **measured}
    first, second = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("one", "mixed"))
    assert first.keys() == second.keys()
    assert first["policy"].keys() == second["policy"].keys()


WATCHFUL = "import sparkjoy_lab.training.processes as p; p.LOST_BEATS = 4; " + CODE


@pytest.mark.slow
def test_a_process_that_is_stopped_ends_the_others_and_is_named_once(tmp_path):
    script, out = tmp_path / "run.py", tmp_path / "out"
    script.write_text(WATCHFUL)
    log = out.with_suffix(".log")
    process = start(command(2, script, out, steps="1000000"), os.environ, log)
    deadline = time.monotonic() + 180
    stopped = None
    try:
        while "sparkjoy: " not in log.read_text() and process.poll() is None and time.monotonic() < deadline:
            if stopped is None and (out / "records.jsonl").exists():
                stopped = next(pid for pid in descendants(process.pid) if rank_of(pid) == "1")
                os.kill(stopped, signal.SIGSTOP)
            time.sleep(0.05)
        assert stopped is not None, log.read_text()
        os.kill(stopped, signal.SIGKILL)  # torchrun would wait another 30 seconds for it
        assert process.wait(timeout=60) != 0
    finally:
        kill(process)
    said = [line for line in log.read_text().splitlines() if line.startswith("sparkjoy: ")]
    assert len(said) == 1
    assert said[0].startswith("sparkjoy: rank 1 of 2 was stopped or lost: nothing was heard of it for 4 seconds.")


def rank_of(pid):
    """The rank of one of torchrun's processes."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((entry[5:].decode() for entry in entries if entry.startswith(b"RANK=")), None)


@pytest.mark.slow
def test_what_is_refused_is_said_once_for_all_processes(tmp_path):
    log = tmp_path / "log"
    process = start(command(2, "-m", tmp_path / "out", rate="7"), os.environ, log)
    try:
        assert process.wait(timeout=120) != 0
    finally:
        kill(process)
    assert log.read_text().count("sparkjoy: rate is 7.0") == 1
    assert log.read_text().count("sparkjoy: ") == 1


def test_every_share_of_a_rollout_is_its_part_of_the_whole():
    config = ReversalConfig(prompt_length=4, prompts=6, answers=3)
    torch.manual_seed(0)
    policy = ReversalTask(config).policy()
    rollouts = [
        ReversalTask(config, share).rollout(policy, torch.Generator().manual_seed(1), graph=False)
        for share in (WHOLE, Share(0, 2), Share(1, 2))
    ]
    whole, *parts = rollouts
    for name in ("prompts", "answers"):
        assert torch.equal(torch.cat([part.batch[name] for part in parts]), whole.batch[name])
    assert torch.equal(torch.cat([part.advantages for part in parts]), whole.advantages)
    torch.testing.assert_close(torch.cat([part.log_probs for part in parts]), whole.log_probs)


def test_what_several_processes_cannot_do_is_one_line_and_status_2(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "3")
    for arguments, message in (
        (("train", "mnist"), "sparkjoy train mnist runs in one process, not in 3"),
        (("study", "bandit"), "runs in one process"),
        (("train", "reversal"), "--prompts 10: expected a multiple of the 3 processes"),
    ):
        monkeypatch.setattr(sys, "argv", ["sparkjoy", *arguments, "--out", str(tmp_path / "out")])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = capsys.readouterr().err
        assert stop.value.code == 2
        assert message in said
        assert said.count("\n") == 1
        assert not (tmp_path / "out").exists()
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == ""
    for settings in ({"unit": "token"}, {"score_noise": 0.1}):
        with pytest.raises(ValueError, match="run in one process"):
            build_step(Settings(**settings), torch.Generator(), share=Share(0, 2))


@pytest.mark.parametrize("command", [("train", "reversal"), ("pareto", "mnist")])
@pytest.mark.parametrize(("rank", "count"), [("0", "two"), ("0", ""), ("5", "1"), ("0", "0"), ("-1", "2")])
def test_an_environment_that_torchrun_did_not_make_is_one_line(monkeypatch, capsys, tmp_path, command, rank, count):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", count)
    status, said = sparkjoy(monkeypatch, capsys, *command, "--out", tmp_path / "out")
    assert status == 2
    assert said.startswith(f"sparkjoy: the environment has RANK={rank} and WORLD_SIZE={count}; expected")
    assert not (tmp_path / "out").exists()
