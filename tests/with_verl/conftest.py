import importlib.util
from pathlib import Path

if importlib.util.find_spec("verl") is None:  # it has an environment of its own: `make verl`
    collect_ignore_glob = [str(Path(__file__).parent / "test_*.py")]
