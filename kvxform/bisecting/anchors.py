"""The nodes that a pass changes: what has to be inside of a part on which it fails."""

from __future__ import annotations

import contextlib

from torch import fx

from kvxform.bisecting.stages import Broken
from kvxform.ir.program import Program
from kvxform.pass_base import Rewriter


def find_anchors(broken: Broken, wanted: frozenset[int], program: Program) -> list[fx.Node]:
    """Return the nodes of `program` that a pass changes at some of its matches.

    A pass keeps the names of the nodes that it leaves alone, so names say which are which here.

    Args:
        broken: The pass.
        wanted: Numbers of the matches.
        program: What `broken.before` was made from, or that itself.
    """
    before, after = broken.before, _rewritten(broken, wanted)
    left = {node.name: node for node in after.graph.nodes}
    names = {
        node.name
        for node in before.graph.nodes
        if node.op == "call_function" and _is_changed(node, before, left.get(node.name), after)
    }
    layers = _changed_layers(before, after)
    found = _pick(program, names, layers)
    if found:
        return found
    matches = [match for i, match in enumerate(broken.matches) if i in wanted]
    sites = {match.layer for match in matches if match.layer is not None}
    return _pick(program, {match.node for match in matches}, sites)


def touched_layers(broken: Broken, wanted: frozenset[int]) -> set[int]:
    """Return the layers whose site or plan a pass changes at some of its matches."""
    return _changed_layers(broken.before, _rewritten(broken, wanted))


def _rewritten(broken: Broken, wanted: frozenset[int]) -> Program:
    """Return what the pass leaves at some matches, be it valid or not."""
    clone = broken.before.clone()
    graph_pass = broken.planned.graph_pass
    rewriter = Rewriter(clone, broken.planned.name, graph_pass.numerics)
    with contextlib.suppress(Exception):  # how far it came is what is asked
        for index, match in enumerate(broken.matches):
            if index in wanted:
                graph_pass.rewrite(clone, match, rewriter)
    return clone


def _pick(program: Program, names: set[str], layers: set[int]) -> list[fx.Node]:
    """Return the calls with these names and the attention of these layers, in graph order."""
    attention = {program.attention_node(s.layer).name for s in program.sites if s.layer in layers}
    calls = (node for node in program.graph.nodes if node.op == "call_function")
    return [node for node in calls if node.name in names | attention]


def _is_changed(node: fx.Node, before: Program, left: fx.Node | None, after: Program) -> bool:
    if left is None or left.target is not node.target:
        return True
    return _described(node, before) != _described(left, after)


def _described(node: fx.Node, program: Program) -> tuple[object, ...]:
    """Return a call with names for its operands, and the very tensors of its weights."""
    operands = [
        id(program.weights[str(operand.target)]) if operand.op == "get_attr" else operand.name
        for operand in node.all_input_nodes
    ]
    return (*operands, *fx.node.map_arg((node.args, dict(node.kwargs)), lambda _: None))


def _changed_layers(before: Program, after: Program) -> set[int]:
    """Return the layers whose site or plan differs."""
    old = {site.layer: site for site in before.sites}
    found = {site.layer for site in after.sites if old.get(site.layer) != site}
    if before.plan is None or after.plan is None:
        return found
    plans = {site.layer: site for site in before.plan.sites}
    return found | {site.layer for site in after.plan.sites if plans.get(site.layer) != site}
