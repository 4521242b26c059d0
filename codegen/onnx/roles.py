"""What calls inside of an attention module are for: queries, keys, values, or the way out.

An attention module makes many small nodes of the same kinds. Their names say whose they are:
`/model/layers.3/self_attn/k/rope` and not `/model/layers.3/self_attn/rope_2`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from torch import fx

from kvxform.ir.program import Program

STREAMS = "qkv"


def scope_paths(program: Program) -> dict[fx.Node, str]:
    """Return the path after which the ONNX nodes of a call are named: its module, and its role."""
    roles = _roles(program)
    return {
        node: ".".join(part for part in (node.meta["module"], roles.get(node, "")) if part)
        for node in program.graph.nodes
        if node.op == "call_function"
    }


def _roles(program: Program) -> dict[fx.Node, str]:
    """Return `q`, `k`, `v`, several of them, or `o`, for calls of attention modules."""
    found: dict[fx.Node, set[str]] = defaultdict(set)
    outputs: dict[fx.Node, str] = {}
    for site in program.sites:
        attention, append = program.attention_node(site.layer), program.append_node(site.layer)
        module = str(attention.meta["module"])
        starts = [attention.args[0], *(append.args[:2] if append is not None else ())]
        for role, start in zip(STREAMS, starts, strict=False):
            for node in _sources(start, module):
                found[node].add(role)
        outputs |= dict.fromkeys(_readers(attention, module), "o")
    joined = {node: "".join(r for r in STREAMS if r in roles) for node, roles in found.items()}
    return outputs | joined


def _sources(start: object, module: str) -> Iterator[fx.Node]:
    """Yield the calls of `module` itself that `start` is made by, parts of the module passed by."""
    pending, seen = [start], set[object]()
    while pending:
        node = pending.pop()
        if not isinstance(node, fx.Node) or node.op != "call_function" or node in seen:
            continue
        seen.add(node)
        place = str(node.meta["module"])
        if place == module:
            yield node
        if place == module or place.startswith(f"{module}."):
            pending += node.all_input_nodes


def _readers(attention: fx.Node, module: str) -> Iterator[fx.Node]:
    """Yield the calls of `module` itself that follow after the attention."""
    pending = list(attention.users)
    while pending:
        node = pending.pop()
        if node.op == "call_function" and node.meta["module"] == module:
            yield node
            pending += node.users
