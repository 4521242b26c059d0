"""Layers that read the keys and values of another layer.

Raising traces every operand back to where its heads are made, and writes the way from there anew.
So two attentions that share K and V have two equal copies of it. Equal calls are merged; whoever
then reads the same two nodes shares a cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable
from typing import Any

from torch import fx

import kvxform.ir.ops as kvx
from kvxform.ir.program import AttentionSite


def merge_equal_calls(graph: fx.Graph) -> int:
    """Let equal calls with equal arguments be one, in place; return how many were removed.

    Every op of a captured graph is a function of its arguments, so the values stay the same.
    """
    first: dict[Hashable, fx.Node] = {}
    removed = 0
    for node in list(graph.nodes):
        if node.op not in ("call_function", "get_attr"):
            continue
        key = _key(node)
        known = None if key is None else first.setdefault(key, node)
        if known is not None and known is not node:
            node.replace_all_uses_with(known)
            graph.erase_node(node)
            removed += 1
    return removed


def _key(node: fx.Node) -> Hashable | None:
    """Return what equal calls have in common, or None if arguments cannot be compared."""
    key = (node.op, node.target, _frozen(node.args), _frozen(node.kwargs))
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _frozen(value: Any) -> Hashable:
    if isinstance(value, list | tuple):
        return (type(value).__name__, *(_frozen(item) for item in value))
    if isinstance(value, dict):
        return tuple(sorted((name, _frozen(item)) for name, item in value.items()))
    if isinstance(value, bool | int | float):
        return (type(value).__name__, repr(value))  # 1, 1.0 and True differ, and so do 0.0 and -0.0
    frozen: Hashable = value
    return frozen


def mark_owners(graph: fx.Graph, sites: Iterable[AttentionSite]) -> tuple[AttentionSite, ...]:
    """Return the sites; those that read K and V of an earlier one name it as their owner."""
    nodes = {n.kwargs["layer"]: n for n in graph.nodes if n.target is kvx.ATTENTION}
    owners: dict[tuple[Any, Any], int] = {}
    marked = []
    for site in sites:
        key, value = nodes[site.layer].args[1:3]
        owner = owners.setdefault((key, value), site.layer)
        shared = None if owner == site.layer else owner
        marked.append(dataclasses.replace(site, shared_with=shared))
    return tuple(marked)
