"""The README's code on an installed sparkjoy that is not this checkout's, and its command."""

import re
import subprocess
import sys
from pathlib import Path

import sparkjoy

where = Path(sparkjoy.__file__).resolve()
if "unpacked" not in where.parts:
    sys.exit(f"{where} is not the wheel's")
blocks = re.findall(r"^```python\n(.*?)^```", Path(sys.argv[1]).read_text(), flags=re.MULTILINE | re.DOTALL)
for block in blocks:
    exec(compile(block, sys.argv[1], "exec"), {})
command = subprocess.run([sys.executable, "-m", "sparkjoy_lab", "--help"], capture_output=True, text=True)
print(f"{where.parent}: {len(blocks)} blocks ran; sparkjoy --help ends with {command.returncode}")
sys.exit(not blocks or command.returncode)
