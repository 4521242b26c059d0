"""Recipes side by side: which passes and which of their options are not the same.

Most differences of two builds begin here, so a reader should see it first.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvxform.diffing.fields import flatten
from kvxform.diffing.records import Finding, RecipeChange

StepData = str | Mapping[str, Any]  # as recipes write a pass: a name, or a name with its options
Step = tuple[str, Mapping[str, Any]]
_MOST_WORDS = 4  # changes that the finding names
_SIGNS = {"added": "+", "removed": "-", "moved": "~", "changed": "~"}


def compare_recipes(
    a: Sequence[StepData] | None, b: Sequence[StepData] | None
) -> tuple[RecipeChange, ...]:
    """Return passes that only one recipe has, passes in another place, and options that differ.

    Passes are paired by name and order. One that is left over on both sides has moved.

    Args:
        a: Passes of A in the order they ran, or None if they are not known; then nothing is said.
        b: The same of B.
    """
    if a is None or b is None:
        return ()
    return tuple(_changes([_parts(step) for step in a], [_parts(step) for step in b]))


def recipe_findings(changes: Sequence[RecipeChange]) -> tuple[Finding, ...]:
    """Return one finding that names the changes, or none."""
    if not changes:
        return ()
    words = [f"{change.name} {_words(change)}" for change in changes[:_MOST_WORDS]]
    if len(changes) > _MOST_WORDS:
        words.append(f"and {len(changes) - _MOST_WORDS} more")
    return (Finding("recipe", "warning", f"recipe: {', '.join(words)}"),)


def recipe_lines(changes: Sequence[RecipeChange]) -> list[str]:
    """Return each change in a line with its sign: `~ quantize-kv  key.bits 4 -> 8`."""
    return [f"{_SIGNS[c.kind]} {c.name}  {_detail(c)}".rstrip() for c in changes]


def _words(change: RecipeChange) -> str:
    return change.kind if change.kind in ("added", "removed") else _detail(change)


def _detail(change: RecipeChange) -> str:
    if change.kind in ("added", "removed"):
        return change.after or change.before
    if change.kind == "moved":
        return f"moved from {change.before} to {change.after}"
    return f"{change.option} {change.before or 'default'} -> {change.after or 'default'}"


def _parts(step: StepData) -> Step:
    """Return name and options."""
    if isinstance(step, str):
        return step, {}
    ((name, options),) = step.items()
    return name, options or {}


def _changes(a: list[Step], b: list[Step]) -> Iterator[RecipeChange]:
    matcher = difflib.SequenceMatcher(None, [n for n, _ in a], [n for n, _ in b], autojunk=False)
    pairs = [(m.a + i, m.b + i) for m in matcher.get_matching_blocks() for i in range(m.size)]
    gone = [i for i in range(len(a)) if i not in dict(pairs)]
    for j, (name, options) in enumerate(b):
        if j in {new for _, new in pairs}:
            continue
        i = next((i for i in gone if a[i][0] == name), None)
        if i is None:
            yield RecipeChange("added", name, after=_text(options))
            continue
        gone.remove(i)
        pairs.append((i, j))
        yield RecipeChange("moved", name, before=_place(a, i), after=_place(b, j))
    for i in gone:
        yield RecipeChange("removed", a[i][0], before=_text(a[i][1]))
    for i, j in sorted(pairs):
        yield from _options(a[i][0], a[i][1], b[j][1])


def _place(steps: Sequence[Step], index: int) -> str:
    """Return after which pass a pass runs: `after insert-cache`, or `first`."""
    return f"after {steps[index - 1][0]}" if index else "first"


def _options(
    name: str, before: Mapping[str, Any], after: Mapping[str, Any]
) -> Iterator[RecipeChange]:
    """Yield options that differ, by their path; one that is not given is empty."""
    old, new = (dict(flatten(options)) for options in (before, after))
    for path in sorted({*old, *new}):
        values = [str(options.get(path, "")) for options in (old, new)]
        if values[0] != values[1]:
            yield RecipeChange("changed", name, path, *values)


def _text(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{path} {value}" for path, value in sorted(flatten(options)))
