"""JSON for files that people commit: what fits on a line stands on one line."""

from __future__ import annotations

import json
from typing import Any

WIDTH = 110


def compact_json(data: Any) -> str:
    """Return `data` as JSON; equal data gives equal text, and keys keep their order."""
    return _format(data, "", 0) + "\n"


def _format(data: Any, indent: str, used: int) -> str:
    """Return a value.

    Args:
        data: The value.
        indent: What stands before its closing bracket.
        used: Characters before it on its line.
    """
    line = json.dumps(data, ensure_ascii=False)
    if used + len(line) <= WIDTH or not isinstance(data, dict | list | tuple) or not data:
        return line
    inner = indent + " "
    if isinstance(data, dict):
        parts = []
        for key, value in data.items():
            head = f"{inner}{json.dumps(key, ensure_ascii=False)}: "
            parts.append(head + _format(value, inner, len(head)))
        return "{\n" + ",\n".join(parts) + f"\n{indent}}}"
    if all(isinstance(item, int | float | str) for item in data):
        return "[\n" + _fill(data, inner) + f"\n{indent}]"
    parts = [inner + _format(item, inner, len(inner)) for item in data]
    return "[\n" + ",\n".join(parts) + f"\n{indent}]"


def _fill(items: Any, indent: str) -> str:
    """Return plain values with as many on a line as fit."""
    lines = [indent]
    for item in items:
        word = json.dumps(item, ensure_ascii=False) + ", "
        if len(lines[-1]) + len(word) > WIDTH and lines[-1] != indent:
            lines.append(indent)
        lines[-1] += word
    return "\n".join(line.rstrip() for line in lines).rstrip(",")
