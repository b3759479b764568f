"""What is said goes on being said, or to nobody; the work does not end for it."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import sparkjoy
from sparkjoy_lab.output import warnings_in_a_line

RUN = (
    "import sys; sys.argv = ['sparkjoy']\n"
    "from sparkjoy_lab import cli, commands\n"
    "def work(arguments):\n"
    "    for number in range(2000): print('±', number, flush=True)\n"
    "    print('done', file=sys.stderr)\n"
    "commands.run = work\n"
    "sys.argv.append('x')\n"
    "cli.main()\n"
)


def run(stdout, **environment):
    return subprocess.run(
        [sys.executable, "-c", RUN],
        stdout=stdout,
        stderr=subprocess.PIPE,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.slow
def test_a_reader_that_leaves_does_not_end_the_work():
    read, write = os.pipe()
    os.close(read)
    finished = run(write)
    os.close(write)
    lines = finished.stderr.decode().splitlines()
    assert lines == ["sparkjoy: nobody takes the output any more (Broken pipe); the work goes on", "done"]
    assert finished.returncode == 0


@pytest.mark.slow
def test_nor_does_it_where_errors_go_the_same_way(tmp_path):
    read, write = os.pipe()
    os.close(read)
    command = [
        sys.executable,
        "-c",
        RUN.replace("'done', file=sys.stderr", f"'done', file=open({str(tmp_path / 'x')!r}, 'w')"),
    ]
    finished = subprocess.run(command, stdout=write, stderr=write, check=False)
    os.close(write)
    assert finished.returncode == 0
    assert (tmp_path / "x").exists()


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_an_output_that_is_full_does_not_end_the_work():
    with open("/dev/full", "w") as full:
        finished = run(full)
    assert finished.stderr.decode().splitlines()[-1] == "done"
    assert finished.returncode == 0


@pytest.mark.slow
def test_an_output_of_ascii_only_replaces_what_it_lacks():
    finished = run(subprocess.PIPE, PYTHONIOENCODING="ascii")
    assert finished.stdout.startswith(b"? 0\n? 1\n")
    assert finished.returncode == 0


def test_a_warning_of_ours_is_a_line_said_once_and_that_of_others_is_theirs(monkeypatch, capsys):
    others = []
    monkeypatch.setattr(warnings, "showwarning", lambda *given: others.append(given))
    ours = str(Path(sparkjoy.__file__).parent / "lab" / "training" / "loop.py")
    with warnings.catch_warnings(), warnings_in_a_line():
        warnings.simplefilter("always")
        for number in range(3):
            warnings.warn_explicit(f"run {number} has lost a part", UserWarning, ours, 98)
        warnings.warn_explicit("another of ours", UserWarning, ours, 99)
        warnings.warn_explicit("of others", UserWarning, "/elsewhere/torch.py", 7)
    assert capsys.readouterr().err == "sparkjoy: run 0 has lost a part\nsparkjoy: another of ours\n"
    assert [str(message) for message, *_ in others] == ["of others"]
