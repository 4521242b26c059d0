"""What a reader must know of graphs, plans and weights that differ, one cause a layer."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kvxform.diffing.records import (
    MetricChange,
    NodeChange,
    PlanChange,
    Severity,
    StructureDiff,
    WeightChange,
)

ATTENTION = ("kvx.attention", "kvx.cached_attention")
STREAMS = {"key": "keys", "value": "values"}
_CHANGE = re.compile(r"(\w+) (\S+) -> (\S+)")
_ATTENTION_RULES = {
    "window": "window",
    "chunk": "window",
    "causal": "window",
    "scale": "attention-scale",
    "softcap": "attention-scale",
}
_DTYPES = ("f16", "bf16", "f32", "f64", "float16", "bfloat16", "float32", "float64")
_EXPLAINED = {"regions.dtype": "codec", "shared_with": "owner"}  # fields that follow from another
_FIGURES = {
    "kv_bytes_per_token": "bytes of cache a token",
    "bits_per_value": "true bits a cached value",
}


@dataclass(frozen=True)
class Cause:
    """One thing that differs in one layer; causes that are equal but for the layer are joined.

    Attributes:
        rule: See `records.Finding`.
        severity: Likewise.
        message: Likewise.
        layer: Its layer, or None for the whole model.
        origin: Source line, or empty.
    """

    rule: str
    severity: Severity
    message: str
    layer: int | None = None
    origin: str = ""


def structure_causes(structure: StructureDiff) -> Iterator[Cause]:
    """Yield causes that the graphs show."""
    for change in structure.nodes:
        yield dataclasses.replace(_node_cause(change), layer=change.layer, origin=change.origin)
    for port in structure.ports:
        if port.kind != "cache":  # planes follow from the plan
            yield Cause(
                "signature", "warning", _port(port.kind, port.name, port.before, port.after)
            )


def _node_cause(change: NodeChange) -> Cause:
    if change.kind in ("added", "removed"):
        words = " by" if change.kind == "added" else ", in A from"
        by = f"{words} {change.via[-1]}" if change.via else ""
        return Cause("operations", "warning", f"{change.op} {change.kind}{by}")
    if change.kind == "retyped":
        rule = "dtype" if _is_dtype(change.what) else "operations"
        return Cause(rule, "warning", f"{change.op}: {change.what}")
    if change.kind == "rewired":
        is_owner = change.op in ATTENTION and change.what.startswith("cache ")
        rule = "layer-owner" if is_owner else "operands"
        return Cause(rule, "warning", f"{change.op} reads something else: {change.what}")
    names = {name for name, _, _ in _CHANGE.findall(change.what)}
    if change.op in ATTENTION:
        rules = {_ATTENTION_RULES.get(name, "attention") for name in names} or {"attention"}
        return Cause(min(rules), "warning", f"attention: {change.what}")
    rule = "rope" if change.op == "kvx.rope" else "operations"
    return Cause(rule, "warning", f"{change.op}: {change.what}")


def plan_causes(changes: Iterable[PlanChange]) -> Iterator[Cause]:
    """Yield causes that the plans show, one for all fields of a stream with the same rule.

    Another codec explains the dtype of what it leaves exact, another owner whom a site shares with.
    """
    found = list(changes)
    known = {(c.layer, c.stream, _field(c)) for c in found}
    joined: dict[tuple[int | None, str, str], list[str]] = {}
    for change in found:
        place, field = (change.layer, change.stream), _field(change)
        if (*place, _EXPLAINED.get(field)) not in known:
            moved = f"{field} {change.before or 'none'} -> {change.after or 'none'}"
            joined.setdefault((*place, _plan_rule(field, change)), []).append(moved)
    for (layer, stream, rule), moves in joined.items():
        words = f"{STREAMS[stream]}: " if stream in STREAMS else ""
        yield Cause(rule, "warning", words + ", ".join(moves), layer)


def _field(change: PlanChange) -> str:
    return change.field.removeprefix(f"{change.stream}.")


def _plan_rule(field: str, change: PlanChange) -> str:
    if field in ("owner", "shared_with"):
        return "layer-owner"
    if field.endswith("dtype") or {change.before, change.after} <= set(_DTYPES):
        return "dtype"
    if field == "regions.sink":
        return "sink"
    if field.startswith("regions."):
        return "recent"
    if field.startswith(("codec", "tokens_per_group", "planes")):
        return "codec"
    if field == "window":
        return "window"
    return "layout" if field.startswith("layout") else "plan"


def weight_causes(changes: Iterable[WeightChange]) -> Iterator[Cause]:
    """Yield causes that the values of weights show."""
    for change in changes:
        detail = f": {change.detail}" if change.detail else ""
        if change.role == "inv_freq":
            message = f"other frequencies of RoPE{detail}"
            yield Cause("rope-frequencies", "warning", message, change.layer)
        elif change.cause.endswith("permuted"):
            message = f"{change.cause} in {change.role}{detail}"
            yield Cause("weight-permuted", "error", message, change.layer)
        elif change.cause == "dtype":
            yield Cause("dtype", "warning", f"weight {change.role}{detail}", change.layer)
        else:
            words = "other values" if change.cause == "values" else change.cause
            rule = f"weight-{change.cause}"
            yield Cause(rule, "warning", f"{words} in {change.role}{detail}", change.layer)


def metric_causes(changes: Iterable[MetricChange]) -> Iterator[Cause]:
    """Yield what the cache costs more or less."""
    for change in changes:
        is_known = change.before is not None and change.after is not None
        if change.name in _FIGURES and is_known and not change.is_equal:
            moved = f"{_FIGURES[change.name]} {change.before:g} -> {change.after:g}"
            yield Cause("cost", "warning", moved)


def _is_dtype(what: str) -> bool:
    """Whether two types differ in their dtypes: `f32[B, S, 64] -> f16[B, S, 64]`."""
    heads = [part.strip().split("[")[0] for part in what.split("->")]
    return len(set(heads)) > 1 and any(head.split()[-1] in _DTYPES for head in heads if head)


def _port(kind: str, name: str, before: str, after: str) -> str:
    if not before or not after:
        return f"{kind} {name} {'added' if after else 'removed'}"
    return f"{kind} {name}: {before} -> {after}"
