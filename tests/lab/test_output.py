"""What is said goes on being said, or to nobody; the work does not end for it."""

import os
import subprocess
import sys

import pytest

RUN = (
    "import sys; sys.argv = ['sparkjoy']\n"
    "from sparkjoy.lab import cli, commands\n"
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
