"""Print how large a package is: files, lines, lines of code (no docstrings, comments, blanks), median and largest."""

import ast
import statistics
import sys
import tokenize
from pathlib import Path

SILENT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def code_lines(path: Path) -> int:
    with path.open() as lines:
        tokens = [token for token in tokenize.generate_tokens(lines.readline) if token.type not in SILENT]
    code = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for part in node.body:
                if isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant):
                    code -= set(range(part.lineno, (part.end_lineno or part.lineno) + 1))
    return len(code)


for package in map(Path, sys.argv[1:]):
    files = sorted(package.rglob("*.py"))
    lines = [len(path.read_text().splitlines()) for path in files]
    print(
        f"{package}: {len(files)} files, {sum(lines):,} lines, {sum(map(code_lines, files)):,} of code; "
        f"median {statistics.median(lines):g}, largest {max(lines)}"
    )
