"""Layers named by text, as recipes write them: `0-1,-1` is the first two and the last one.

A number below zero counts from the end. The text is checked without a model; which layers it means
depends on the model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from kvxform.errors import PassError, RecipeError

_RUN = re.compile(r"(-?\d+)(?:-(-?\d+))?")


def check_layers(text: str, where: str) -> None:
    """Raise RecipeError KVX107 unless `text` names layers."""
    _runs(text, where)


def named_layers(text: str, layers: Sequence[int], where: str) -> tuple[int, ...]:
    """Return those of `layers` that `text` names, in order.

    Args:
        text: Runs of layers, for instance `0-1,-2--1`.
        layers: Layers of the model, sorted; a number below zero is an index from their end.
        where: Pass that asks, for the error text.

    Raises:
        RecipeError: KVX107 if `text` names no layers at all.
        PassError: KVX205 if it names one that the model does not have.
    """
    found: set[int] = set()
    for first, last in _runs(text, where):
        low, high = (_resolve(n, layers, where) for n in (first, last))
        if low > high:
            raise _refuse_text(text, where)
        found.update(layer for layer in layers if low <= layer <= high)
    return tuple(sorted(found))


def _runs(text: str, where: str) -> list[tuple[int, int]]:
    runs = []
    for part in text.split(","):
        found = _RUN.fullmatch(part.strip())
        if found is None:
            raise _refuse_text(text, where)
        first, last = found.groups()
        runs.append((int(first), int(first if last is None else last)))
    return runs


def _refuse_text(text: str, where: str) -> RecipeError:
    rule = "layers must be numbers or runs of them, such as 0-1,-1"
    return RecipeError("KVX107", rule, where=where, got=repr(text))


def _resolve(number: int, layers: Sequence[int], where: str) -> int:
    if number < 0 and -number <= len(layers):
        return layers[number]
    if number in layers:
        return number
    rule = "layers must be those of the model"
    raise PassError("KVX205", rule, where=where, got=number, hint=_hint(layers))


def _hint(layers: Sequence[int]) -> str:
    return f"it has {layers[0]} to {layers[-1]}" if layers else "it has none"
