"""Ctrl-C while the command imports is one line; sparkjoy as a library leaves signals alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="where it is in importing is read from /proc")
@pytest.mark.parametrize("library", ["libtorch_cpu", "libtorch_python", "numpy"])
def test_ctrl_c_while_importing_is_one_line(tmp_path, library):
    command = [
        sys.executable,
        "-m",
        "sparkjoy_lab",
        "train",
        "mnist",
        "--steps",
        "100000",
        "--out",
        str(tmp_path / "out"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and library not in maps.read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert said.startswith("sparkjoy: interrupted")
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_what_fails_while_importing_is_one_line(tmp_path):
    (tmp_path / "numpy.py").write_text("raise OSError(28, 'No usable temporary directory')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "sparkjoy_lab", "train", "mnist", "--out", str(tmp_path / "out")]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stderr.count("\n")) == (2, 1)
    assert "No usable temporary directory" in finished.stderr


def test_the_library_touches_neither_signals_nor_hooks_nor_arguments():
    code = "import signal, sys; before = sys.argv[:]; import sparkjoy; print(sys.argv == before, "
    code += "sys.excepthook is sys.__excepthook__, signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    command = [sys.executable, "-c", code, "-m", "sparkjoy", "train"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == ["True"] * 3
