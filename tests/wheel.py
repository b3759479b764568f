"""The examples of the README on an installed sparkjoy that is not this checkout's, and its command."""

import doctest
import subprocess
import sys
from pathlib import Path

import sparkjoy

where = Path(sparkjoy.__file__).resolve()
if "unpacked" not in where.parts:
    sys.exit(f"{where} is not the wheel's")
failed, tried = doctest.testfile(sys.argv[1], module_relative=False)
command = subprocess.run([sys.executable, "-m", "sparkjoy", "--help"], capture_output=True, text=True)
print(f"{where.parent}: {tried} examples, {failed} failed; sparkjoy --help ends with {command.returncode}")
sys.exit(bool(failed) or not tried or command.returncode)
