"""What the site changes of the pages.

The README is its start, links to files that it does not have become text, and examples with prompts are marked as such,
so that the copy button leaves prompts and output out (`site.css`).
"""

import re
from pathlib import Path
from typing import Any

README = Path(__file__).parent.parent / "README.md"
PROMPTS = re.compile(r"^```python(?=\n>>>)", flags=re.MULTILINE)
ELSEWHERE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]*\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page as the site shows it."""
    if page.file.src_path == "index.md":
        return re.sub(r"\]\(docs/", "](", README.read_text(encoding="utf-8"))
    return PROMPTS.sub("```pycon", ELSEWHERE.sub(r"`\1`", markdown))
