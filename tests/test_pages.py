"""README and docs: what can be pasted runs, what is linked and named is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PASTEABLE = re.compile(r"^```python\n(?!>>>)(.*?)^```", flags=re.MULTILINE | re.DOTALL)
README = (ROOT / "README.md").read_text()


def test_the_readme_starts_with_nine_lines_that_run(capsys):
    (block,) = PASTEABLE.findall(README)
    assert len(block.splitlines()) == 9
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    report = names["report"]
    assert capsys.readouterr().out == f"{report.kept} of 100 rows differentiated\n"
    assert 0 < report.backward_rows == report.kept < 100
    assert names["policy"].weight.grad is not None


def test_the_tree_in_the_readme_is_there():
    tree = README.split("## What is where")[1].split("\n## ")[0]
    names = re.findall(r"[a-z_/]+(?:\.py|/)(?=[\s:])", tree)
    assert len(names) > 20
    package = ROOT / "src" / "sparkjoy"
    assert [name for name in names if not (ROOT / name).exists() and not list(package.rglob(name.strip("/")))] == []


@pytest.mark.parametrize("page", sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")]))
def test_paths_in_a_page_are_there(page):
    if page.name == "lab_notebook.md":
        pytest.skip("a dated page keeps the paths of its days")
    text = page.read_text()
    for path in re.findall(r"(?:src/sparkjoy|tests|benchmarks|examples)/[\w/]+\.py", text):
        assert (ROOT / path).is_file(), path
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists(), link
