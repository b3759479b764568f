"""Ctrl-C while the command imports is one line; sparkjoy as a library leaves signals alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparkjoy import starting


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="where it is in importing is read from /proc")
@pytest.mark.parametrize("library", ["libtorch_cpu", "libtorch_python", "numpy"])
def test_ctrl_c_while_importing_is_one_line(tmp_path, library):
    command = [sys.executable, "-m", "sparkjoy", "train", "mnist", "--steps", "100000", "--out", str(tmp_path / "out")]
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
    command = [sys.executable, "-m", "sparkjoy", "train", "mnist", "--out", str(tmp_path / "out")]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stderr.count("\n")) == (2, 1)
    assert "No usable temporary directory" in finished.stderr


@pytest.mark.parametrize(
    ("arguments", "original", "is_command"),
    [
        (["/usr/bin/sparkjoy", "bench"], ["python", "/usr/bin/sparkjoy", "bench"], True),
        (["-m", "bench"], ["python", "-X", "dev", "-m", "sparkjoy", "bench"], True),
        (["-m", "sparkjoy"], ["python", "-m", "mine", "sparkjoy"], False),
        (["mine.py"], ["python", "mine.py"], False),
        ([""], ["python"], False),
    ],
)
def test_only_the_command_takes_the_signal(monkeypatch, arguments, original, is_command):
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(sys, "orig_argv", original)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    try:
        starting.quiet_if_command()
        assert (signal.getsignal(signal.SIGINT) is not signal.default_int_handler) == is_command
        assert (sys.excepthook is not sys.__excepthook__) == is_command
        starting.ready()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert sys.excepthook is sys.__excepthook__
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_a_command_of_another_version_says_what_to_do(tmp_path):
    (tmp_path / "sparkjoy").write_text("import sparkjoy\nimport sparkjoy.gone\n")
    finished = subprocess.run([sys.executable, tmp_path / "sparkjoy"], capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stderr.count("\n")) == (2, 1)
    assert "No module named 'sparkjoy.gone'; " in finished.stderr
    assert "pip install" in finished.stderr
