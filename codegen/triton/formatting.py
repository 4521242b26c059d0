"""Format emitted text with ruff; the result is kept in the cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import re
import subprocess
from importlib import metadata
from pathlib import Path

from kvxform.atomic import write_atomically
from kvxform.errors import CodegenError
from kvxform.folders import cache_folder

_OPTIONS = ("--isolated", "--line-length=100", "--target-version=py311")
_EXCERPT_LINES = 3


def format_python(text: str, name: str) -> str:
    """Return `text` as `ruff format` writes it.

    Args:
        text: Python source.
        name: What it is, for messages.

    Raises:
        CodegenError: KVX402 if it is no valid Python.
    """
    key = hashlib.sha256(f"{metadata.version('ruff')}\n{text}".encode()).hexdigest()
    path = cache_folder() / "formatted" / f"{key[:32]}.py"
    known = _read(path)
    if known is not None:
        return known
    formatted = _run_ruff(text, name)
    data = formatted.encode()
    digest = hashlib.sha256(data).hexdigest().encode()
    with contextlib.suppress(OSError):  # a full or read-only disk costs time, nothing else
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, digest + b"\n" + data)
    return formatted


def _read(path: Path) -> str | None:
    """Return the text in an entry of the cache, or None if it is absent or damaged."""
    try:
        digest, _, data = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    whole = digest == hashlib.sha256(data).hexdigest().encode()
    return data.decode() if whole else None


def _run_ruff(text: str, name: str) -> str:
    from ruff import find_ruff_bin

    command = [find_ruff_bin(), "format", *_OPTIONS, "--stdin-filename", f"{name}.py", "-"]
    done = subprocess.run(command, input=text.encode(), capture_output=True)
    if done.returncode == 0:
        return done.stdout.decode()
    message = done.stderr.decode().strip()
    error = CodegenError(
        "KVX402", "an emitted kernel must be valid Python", where=name, got=message
    )
    error.add_note(_excerpt(text, message))
    raise error


def _excerpt(text: str, message: str) -> str:
    """Return the lines around the first line number in a message of ruff."""
    found = re.search(r"\.py:(\d+):", message)
    middle = int(found.group(1)) if found else 1
    first = max(middle - _EXCERPT_LINES, 1)
    lines = text.splitlines()[first - 1 : middle + _EXCERPT_LINES]
    return "\n".join(f"{number:4} | {line}" for number, line in enumerate(lines, first))
