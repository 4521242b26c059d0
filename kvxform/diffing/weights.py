"""Weights of two programs, paired by their place in the graph, and what became of their values."""

from __future__ import annotations

from collections.abc import Iterator

from kvxform.diffing.align import Alignment
from kvxform.diffing.outline import Outline, OutlineNode
from kvxform.diffing.records import WeightChange
from kvxform.diffing.values import ValueChange, compare_values, theta_of
from kvxform.ir.folding import fold_name
from kvxform.ir.program import Program, projection_weights

FREQUENCIES = "inv_freq"


def compare_weights(
    a: Program, b: Program, outlines: tuple[Outline, Outline], alignment: Alignment
) -> tuple[WeightChange, ...]:
    """Return the weights whose values differ, in the order of the graph.

    Each pair of weights is looked up once and dropped again, so programs may keep their weights in
    files. Weights of nodes that have no partner are not compared.

    Args:
        a: The first program.
        b: The second one.
        outlines: Both as outlines.
        alignment: Which node of one is which node of the other.
    """
    roles, seen = _roles(a), dict[tuple[str, str], ValueChange | None]()
    found: dict[WeightChange, None] = {}
    for i, j in alignment.pairs:
        node, other = outlines[0].nodes[i], outlines[1].nodes[j]
        for names in _pairs(node, other):
            role = roles.get(names[0]) or fold_name(names[0].removesuffix(".weight"))
            if names not in seen:
                seen[names] = _compare(a, b, names, role)
            change = seen[names]
            if change is not None:
                record = WeightChange(
                    node.layer, role, change.cause, change.relative, change.detail
                )
                found[record] = None
    return tuple(found)


def _pairs(node: OutlineNode, other: OutlineNode) -> Iterator[tuple[str, str]]:
    """Yield the weights that stand in the same place of two operations."""
    theirs = _places(other)
    for place, name in _places(node).items():
        if place in theirs:
            yield name, theirs[place]


def _places(node: OutlineNode) -> dict[int, str]:
    kinds = [kind for kind, _ in node.operands]
    places = [place for place, kind in enumerate(kinds) if kind == "weight"]
    return dict(zip(places, node.weights, strict=True))


def _compare(a: Program, b: Program, names: tuple[str, str], role: str) -> ValueChange | None:
    x, y = a.weights[names[0]], b.weights[names[1]]
    if x.is_meta or y.is_meta:
        return None
    change = compare_values(x.cpu(), y.cpu())
    if change is None or role != FREQUENCIES or change.cause == "shape":
        return change
    bases = theta_of(x), theta_of(y)
    if None in bases:
        return change
    detail = f"theta {bases[0]:.6g} -> {bases[1]:.6g}"
    return ValueChange(change.cause, change.relative, detail)


def _roles(program: Program) -> dict[str, str]:
    """Return what the weights of each site are: `q`, `k`, `v`, `o`, `qkv`, `inv_freq`."""
    uses: dict[str, list[str]] = {}
    for site in program.sites:
        for role in "qkvo":
            for name in projection_weights(getattr(site, role)):
                uses.setdefault(name, []).append(role)
        if site.rope is not None:
            uses[site.rope.inv_freq] = [FREQUENCIES]
        if site.sink_logits is not None:
            uses[site.sink_logits] = ["sink_logits"]
        if site.alibi_slopes is not None:
            uses[site.alibi_slopes] = ["alibi_slopes"]
    return {name: "".join(dict.fromkeys(roles)) for name, roles in uses.items()}
