"""Fold what is the same in many layers: `model.layers.*.mlp`, `layers 0-4, 6-10`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from kvxform.ir.text import format_ranges

_INDEX = re.compile(r"(?<![^.])\d+(?![^.])")  # a part of a path that is a number
_NUMBERED = re.compile(r"(?<=[A-Za-z_)][._])\d+\b")  # the same in a sentence, and `add_12`


def fold_name(name: str) -> str:
    """Return a path with its numbers as `*`: names of equal parts of layers become equal."""
    return _INDEX.sub("*", name)


def fold_sentence(text: str) -> str:
    """Return a sentence with the numbers in names as `*`."""
    return _NUMBERED.sub("*", text)


def fold_names(names: Sequence[str]) -> list[str]:
    """Return paths with runs of numbers folded, in the order of their first one.

    `model.layers.0.mlp` and `model.layers.1.mlp` become `model.layers.0-1.mlp`.
    """
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        groups.setdefault(fold_name(name), []).append(name)
    return [_join(template, group) for template, group in groups.items()]


def _join(template: str, names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    numbers = [list(map(int, _INDEX.findall(name))) for name in names]
    varying = [i for i, column in enumerate(zip(*numbers, strict=True)) if len(set(column)) > 1]
    if len(varying) != 1:
        return template
    ranges = format_ranges(sorted(row[varying[0]] for row in numbers))
    values = [ranges if i == varying[0] else str(n) for i, n in enumerate(numbers[0])]
    shown = iter(f"({v})" if "," in v else v for v in values)
    return _INDEX.sub(lambda _: next(shown), names[0])


def layer_words(layers: Iterable[int]) -> str:
    """Return `layer 3` or `layers 0-4, 6`."""
    found = sorted(layers)
    return f"layer{'s' if len(found) > 1 else ''} {format_ranges(found)}"
