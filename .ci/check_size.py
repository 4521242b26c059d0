"""Refuse files of more than 500 lines and functions of more than 60 (generated text excepted)."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60


def tracked_files() -> list[Path]:
    """Return the Python files that git tracks; each once, since git does not follow links."""
    out = subprocess.run(["git", "ls-files", "-z", "*.py"], capture_output=True, check=True)
    names = [name for name in out.stdout.decode().split("\0") if name]
    return [path for path in map(Path, names) if path.is_file()]


def problems(path: Path) -> Iterator[str]:
    """Yield one line for each thing in `path` that is too long."""
    text = path.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    if lines > MAX_FILE_LINES:
        yield f"{path}: {lines} lines; the limit is {MAX_FILE_LINES}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"{path}:{node.lineno}: {node.name} has {length} lines; the limit is " + str(
                    MAX_FUNCTION_LINES
                )


def main() -> int:
    """Check all tracked files; return the exit status."""
    files = tracked_files()
    found = [line for path in files for line in problems(path)]
    print("\n".join(found) if found else f"sizes: {len(files)} files checked")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
