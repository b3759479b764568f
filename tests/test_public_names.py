import subprocess
import sys

import sparkjoy


def test_public_names_are_sorted_and_there():
    assert sparkjoy.__all__ == sorted(sparkjoy.__all__)
    assert all(hasattr(sparkjoy, name) for name in sparkjoy.__all__)


def test_importing_sparkjoy_imports_torch_and_numpy_only():
    extras = ("tyro", "rich", "matplotlib", "mlxtend", "sklearn", "tensordict", "transformers")
    code = f"import sys, sparkjoy; print([name for name in {extras!r} if name in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
