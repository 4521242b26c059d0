"""Where one value alone carries a model from layer to layer.

A node is a cut if every later value that depends on the tokens depends on them through it: the
residual stream between two layers. Sizes and what follows from positions alone do not count; later
nodes may read them from anywhere.
"""

from __future__ import annotations

import torch
from torch import fx

from kvxform.ir.program import Program
from kvxform.ir.types import SymType, TensorType

ADD = torch.ops.aten.add.Tensor


def layer_inputs(program: Program) -> dict[int, fx.Node]:
    """Return what goes into each layer, and what leaves the last one, before `insert-cache`.

    The entry of layer l is the last cut before its attention, and that of the number of layers the
    last cut that is a sum. Layers between which more than one value travels have no entry.
    """
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    places = [order[program.attention_node(site.layer)] for site in program.sites]
    found: dict[int, fx.Node] = {}
    for cut in cuts(program):
        passed = sum(place < order[cut] for place in places)
        if passed < len(places) or cut.target is ADD:
            found[passed] = cut
    return found


def cuts(program: Program) -> list[fx.Node]:
    """Return all cuts, in graph order."""
    made = token_values(program)
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    found: list[fx.Node] = []
    furthest = -1  # last reader of any value made so far
    for node in made:
        own = max((order[user] for user in node.users if _reads_values(user)), default=-1)
        if furthest <= order[node] and _is_stream(node):
            found.append(node)
        furthest = max(furthest, own)
    return found


def token_values(program: Program) -> dict[fx.Node, None]:
    """Return the nodes whose values depend on the tokens, in graph order."""
    made = {program.placeholder("input_ids"): None}
    for node in program.graph.nodes:
        is_value = node.op == "call_function" and _reads_values(node)
        if is_value and any(source in made for source in node.all_input_nodes):
            made[node] = None
    return made


def _reads_values(node: fx.Node) -> bool:
    """Whether a node reads more than sizes."""
    return node.op == "output" or not isinstance(node.meta["type"], SymType)


def _is_stream(node: fx.Node) -> bool:
    type_ = node.meta.get("type")
    return isinstance(type_, TensorType) and len(type_.shape) == 3
