import re
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_the_api_page_has_every_public_name_once():
    page = (Path(__file__).parent.parent / "docs" / "api.md").read_text()
    named = re.findall(r"^::: sparkjoy\.(\w+)$", page, flags=re.MULTILINE)
    assert sorted(named) == sparkjoy.__all__


def test_the_library_never_imports_its_laboratory():
    library = Path(sparkjoy.__file__).parent.rglob("*.py")
    assert [file for file in library if "sparkjoy_lab" in file.read_text()] == []


@pytest.mark.parametrize("name", sparkjoy.__all__)
def test_a_public_name_has_a_docstring_with_an_example(name):
    assert ">>>" in (getattr(sparkjoy, name).__doc__ or "")
