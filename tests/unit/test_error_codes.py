"""docs/errors.md lists every code that the source raises, under the right class and no other."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CODE = re.compile(r"KVX\d{3}")


def raised_codes() -> dict[str, str]:
    """Return each code that is a string of its own in the source, with one place it stands."""
    found = {}
    for top in ("kvxform", "passes", "codegen"):
        for path in sorted((ROOT / top).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
                if is_text and CODE.fullmatch(node.value):
                    found[node.value] = f"{path.relative_to(ROOT)}:{node.lineno}"
    return found


def documented_codes() -> Counter[str]:
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    return Counter(re.findall(r"^\| (KVX\d{3}) \|", text, re.MULTILINE))


def test_every_raised_code_is_documented_once_and_no_other():
    raised, documented = raised_codes(), documented_codes()
    missing = {code: place for code, place in raised.items() if code not in documented}
    assert missing == {}
    assert set(documented) - set(raised) == set(), "documented, but raised nowhere"
    assert set(documented.values()) == {1}
