"""README and docs: what can be pasted runs, what is linked and named is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PASTEABLE = re.compile(r"^```python\n(?!>>>)(.*?)^```", flags=re.MULTILINE | re.DOTALL)
README = (ROOT / "README.md").read_text()
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")])
ENTRY = re.compile(r"\*\*([^*]+)\*\*")
PRIVATE = (
    "row dense gate price rate quota size score rule undecided open teaches worth screening plan normalizer draft "
    "verify audit recall parts arm friction"
)
"""Words that mean something particular here, which a reader may not guess."""


def test_the_readme_starts_with_nine_lines_that_run(capsys):
    (block,) = PASTEABLE.findall(README)
    assert len([line for line in block.splitlines() if line]) == 9
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    report = names["report"]
    assert capsys.readouterr().out == f"{report.kept} of 100 rows differentiated\n"
    assert 0 < report.backward_rows == report.kept < 100
    assert names["policy"].weight.grad is not None


def test_the_tree_of_what_is_where_is_there():
    tree = (ROOT / "CONTRIBUTING.md").read_text().split("## What is where")[1].split("\n## ")[0]
    names = re.findall(r"[a-z_/]+(?:\.py|/)(?=[\s:])", tree)
    assert len(names) > 20
    package = ROOT / "src" / "sparkjoy"
    assert [name for name in names if not (ROOT / name).exists() and not list(package.rglob(name.strip("/")))] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_in_a_page_are_there(page):
    text = page.read_text()
    if page.name != "lab_notebook.md":  # a dated page keeps the paths of its days
        for path in re.findall(r"(?:src/sparkjoy|tests|benchmarks|examples)/[\w/]+\.py", text):
            assert (ROOT / path).is_file(), path
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists(), link


def glossary():
    """The entries of the glossary's words, such as `noise budget`."""
    words = (ROOT / "docs" / "glossary.md").read_text().split("## Words")[1]
    return [
        word for line in words.splitlines() if line.startswith("| **") for word in ENTRY.findall(line.split("|")[1])
    ]


def test_every_private_word_is_in_the_glossary():
    assert set(PRIVATE.split()) - set(glossary()) == set()
    words = (ROOT / "docs" / "glossary.md").read_text().split("## Words")[1]
    assert words.count("\n| **") <= 25


def test_a_word_is_explained_once():
    assert len(glossary()) == len(set(glossary()))


@pytest.mark.parametrize("word", glossary())
def test_a_word_of_the_glossary_is_used(word):
    pages = [page for page in ROOT.glob("docs/*.md") if page.name not in ("glossary.md", "lab_notebook.md")]
    library = [file for file in (ROOT / "src" / "sparkjoy").rglob("*.py") if "lab" not in file.parts]
    stem = word.replace("-", "[- ]").removesuffix("s").removesuffix("e").removesuffix("y")
    assert any(re.search(rf"\b{stem}", file.read_text(), re.IGNORECASE) for file in [*pages, *library])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_says_what_is(page):
    """Not who wanted it, nor when: dates are the notebook's."""
    text = page.read_text()
    assert re.findall(r"\b(?:asked:|was asked|must show|session|issue #?\d+)\b", text) == []
    assert page.name == "lab_notebook.md" or re.findall(r"\b20\d\d-\d\d-\d\d\b", text) == []
