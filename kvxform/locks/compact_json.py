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
        return (
            "{\n" + _lines([_entry(*item, inner) for item in data.items()], inner) + f"\n{indent}}}"
        )
    return "[\n" + _lines([_format(x, inner, len(inner)) for x in data], inner) + f"\n{indent}]"


def _entry(key: str, value: Any, indent: str) -> str:
    head = f"{json.dumps(key, ensure_ascii=False)}: "
    return head + _format(value, indent, len(indent) + len(head))


def _lines(parts: list[str], indent: str) -> str:
    """Return parts with commas between them, with as many short ones on a line as fit."""
    lines: list[str] = []
    for part in parts:
        is_short = "\n" not in part and lines and "\n" not in lines[-1]
        if is_short and len(lines[-1]) + len(part) + 3 <= WIDTH:
            lines[-1] += f", {part}"
        else:
            lines.append(indent + part)
    return ",\n".join(lines)
