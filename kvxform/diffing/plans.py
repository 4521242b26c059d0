"""What differs between two cache plans, and between the geometry of attention sites."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kvxform.diffing.align_layers import LayerPairs, align_layers
from kvxform.diffing.outline import LayerFields, Outline
from kvxform.diffing.records import PlanChange

_STREAMS = ("key", "value")
_BASES = ("k_basis", "v_basis")
_RELATIVE = frozenset({"owner", "shared_with"})  # layers, counted from the layer itself
_KINDS = ("codec", "kind")  # fields that say what kind of thing the others are options of
_OPTIONAL = ("rope", "latent", "residual")
_NOTHING = ""


def compare_plans(
    a: Outline, b: Outline, layers: LayerPairs | None = None
) -> tuple[PlanChange, ...]:
    """Return fields of the model, of sites and of the plan that differ, layer by layer.

    Args:
        a: The first side.
        b: The second side.
        layers: Layers that belong together, if that is known already.
    """
    changes = [PlanChange(None, "", *found) for found in _whole_changes(a, b)]
    sides = [(_by_layer(a.sites), _by_layer(b.sites))]
    if a.plan and b.plan:  # bases of the sites are those of the plan
        sides = [(_by_layer(a.sites, without=_BASES), _by_layer(b.sites, without=_BASES))]
        sides.append((_by_layer(a.plan), _by_layer(b.plan)))
    for left, right in align_layers(a, b) if layers is None else layers:
        if left is None or right is None:
            continue  # the whole layer is new or gone, as its operations tell
        for before, after in sides:
            changes += _layer_changes(before.get(left, {}), after.get(right, {}), left, right)
    return tuple(changes)


def _whole_changes(a: Outline, b: Outline) -> Iterator[tuple[str, str, str]]:
    before, after = dict(a.whole), dict(b.whole)
    if bool(a.plan) == bool(b.plan):
        yield from _differing(before, after)
        return
    for side in (before, after):
        side["cache"] = side.get("layout.kind", "none")
    for path, left, right in _differing(before, after):
        if not path.startswith("layout"):
            yield path, left, right


def _by_layer(
    entries: tuple[LayerFields, ...], without: tuple[str, ...] = ()
) -> dict[int, dict[str, Any]]:
    return {
        entry.layer: {k: v for k, v in entry.fields if k.partition(".")[0] not in without}
        for entry in entries
    }


def _layer_changes(
    a: Mapping[str, Any], b: Mapping[str, Any], left: int, right: int
) -> Iterator[PlanChange]:
    if not a or not b:
        if a or b:
            yield PlanChange(right, "", "cache", *("present" if side else "" for side in (a, b)))
        return
    for path, before, after in _differing(a, b):
        if path in _RELATIVE:
            before, after = _absolute(a.get(path), left), _absolute(b.get(path), right)
        stream, _, rest = path.partition(".")
        is_stream = stream in _STREAMS and bool(rest)
        name = (stream, rest) if is_stream else ("", path)
        yield PlanChange(right, *name, before, after)


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield path and both values of what differs; another codec, basis or layout as one change.

    Where one side has no digest of a constant, or its shape differs as well, digests say nothing.
    """
    parts = _other_parts(a, b)
    found = [(part, _describe(a, part), _describe(b, part)) for part in parts]
    for path in {*a, *b}:
        before, after = a.get(path), b.get(path)
        if before == after or any(path.startswith(f"{part}.") for part in parts):
            continue
        base = path.removesuffix(".digest")
        if base != path and (None in (before, after) or a.get(base) != b.get(base)):
            continue
        found.append((path, _text(before), _text(after)))
    yield from sorted(found)


def _other_parts(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Return paths of parts that are of another kind, or that one side has not."""
    found: list[str] = []
    for path in sorted({*a, *b}):
        part, _, name = path.rpartition(".")
        is_other = name in _KINDS and a.get(path) != b.get(path)
        is_new = part in _OPTIONAL and not (_has(a, part) and _has(b, part))
        if (is_other or is_new) and not any(f"{part}.".startswith(f"{p}.") for p in found):
            found.append(part)
    return found


def _has(fields: Mapping[str, Any], part: str) -> bool:
    return any(path.startswith(f"{part}.") for path in fields)


def _describe(fields: Mapping[str, Any], part: str) -> str:
    """Return a part in words: `int(axis=token, bits=4)`; what is off or zero is left out."""
    inner = {p.removeprefix(f"{part}."): v for p, v in fields.items() if p.startswith(f"{part}.")}
    kind = next((str(inner.pop(name)) for name in _KINDS if name in inner), "")
    options = [f"{n}={v}" for n, v in sorted(inner.items()) if v and not n.endswith(".digest")]
    return f"{kind}({', '.join(options)})" if kind and options else kind or ", ".join(options)


def _text(value: Any) -> str:
    return _NOTHING if value is None else str(value)


def _absolute(offset: int | None, layer: int) -> str:
    return _NOTHING if offset is None else f"layer {layer + offset}"
