"""What the site changes of the pages: the README is its start, and links to files that it does not have become text."""

import re
from pathlib import Path
from typing import Any

README = Path(__file__).parent.parent / "README.md"
ELSEWHERE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]*\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page as the site shows it."""
    if page.file.src_path == "index.md":
        return re.sub(r"\]\(docs/", "](", README.read_text(encoding="utf-8"))
    return ELSEWHERE.sub(r"`\1`", markdown)
