"""The attention of each layer as a graph between residual streams.

A block goes from the residual stream that a layer reads to what its output projection adds to it.
Cut at both ends, all blocks of a program run at once on residual streams that somebody else made:
those of the source, so that the error of one layer is no error of the next.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

import kvxform.ir.ops as kvx
from kvxform.ir.linear import ADDMM, LINEAR, PRODUCTS, RESHAPES
from kvxform.ir.program import AttentionSite, Program

LINEARS = (LINEAR, ADDMM, *PRODUCTS)
NORMS = (kvx.RMS_NORM, torch.ops.aten.layer_norm.default)
PREFIX = "residual_"  # of the inputs that stand for residual streams


@dataclass(frozen=True)
class Block:
    """One attention between residual streams.

    Attributes:
        layer: Layer of its site.
        module: Path of the source module.
        start: Name of the node that is the residual stream before the norm.
        end: Name of the node that is the output of the attention.
    """

    layer: int
    module: str
    start: str
    end: str


def find_blocks(program: Program, source: Program | None = None) -> dict[str, Block]:
    """Return the blocks by module; modules with several sites and odd ones are left out.

    Args:
        program: Where to look.
        source: What it was made from. Where a pass has put something between a projection and the
            attention, the site no longer names the projection; the site of the source does.
    """
    known = {site.module: site for site in source.sites} if source else {}
    found: dict[str, list[Block]] = {}
    for site in program.sites:
        block = _find_block(program, site, known.get(site.module, site))
        if block is not None:
            found.setdefault(site.module, []).append(block)
    return {module: blocks[0] for module, blocks in found.items() if len(blocks) == 1}


def tapped_graph(program: Program, names: Sequence[str]) -> fx.Graph:
    """Return the graph that computes the nodes called `names`, as a tuple, and nothing else."""
    graph = copy.deepcopy(program.graph)
    return _with_outputs(graph, names)


def cut_graph(program: Program, blocks: Sequence[Block], ends: Sequence[str]) -> fx.Graph:
    """Return the graph from residual streams, new inputs in the order of `blocks`, to `ends`.

    Keys and values that a block reads from another layer are computed from the stream of that
    layer, if it is among the blocks.
    """
    graph = copy.deepcopy(program.graph)
    nodes = {node.name: node for node in graph.nodes}
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for index, block in enumerate(blocks):
        with graph.inserting_after(last):
            last = graph.placeholder(f"{PREFIX}{index}")
        last.meta = dict(nodes[block.start].meta)
        nodes[block.start].replace_all_uses_with(last)
    return _with_outputs(graph, ends)


def weights_behind(graph: fx.Graph) -> list[set[str]]:
    """Return the weights that each output of `graph` depends on, past cached ops."""
    output = next(node for node in graph.nodes if node.op == "output")
    ends = output.args[0]
    assert isinstance(ends, tuple), "made by `_with_outputs`"
    found = []
    for end in ends:
        assert isinstance(end, fx.Node), "outputs are nodes"
        behind = _behind([end])
        found.append({str(node.target) for node in behind if node.op == "get_attr"})
    return found


def _find_block(program: Program, site: AttentionSite, known: AttentionSite) -> Block | None:
    reads = {p.weight for p in (site.q, known.q) if p is not None}
    writes = {p.weight for p in (site.o, known.o) if p is not None}
    attention = program.attention_node(site.layer)
    query = attention.args[0]
    assert isinstance(query, fx.Node), "operands of attention are nodes"
    made = _search([query], reads, lambda node: node.all_input_nodes)
    end = _search(list(attention.users), writes, lambda node: list(node.users))
    if made is None or end is None:
        return None
    start = _residual(made)
    return None if start is None else Block(site.layer, site.module, start.name, end.name)


def _search(
    first: list[fx.Node], weights: set[str], following: Callable[[fx.Node], list[fx.Node]]
) -> fx.Node | None:
    """Return the nearest linear layer with one of `weights`."""
    waiting, seen = list(first), set(first)
    while waiting:
        node = waiting.pop(0)
        if node.target in LINEARS:
            read = {n.target for n in node.all_input_nodes if n.op == "get_attr"}
            if read & weights:
                return node
        new = [n for n in following(node) if n not in seen]
        waiting += new
        seen.update(new)
    return None


def _residual(linear: fx.Node) -> fx.Node | None:
    """Return what the norm before a linear layer reads, or what the layer reads without one."""
    operands = [n for n in linear.all_input_nodes if n.op != "get_attr"]
    if len(operands) != 1:
        return None
    node = operands[0]
    while node.target in RESHAPES:
        node = node.all_input_nodes[0]
    source = node.args[0] if node.target in NORMS else node
    return source if isinstance(source, fx.Node) else None


def _with_outputs(graph: fx.Graph, names: Sequence[str]) -> fx.Graph:
    """Let `graph` return the nodes called `names`, and drop what they do not need."""
    nodes = {node.name: node for node in graph.nodes}
    ends = [nodes[name] for name in names]
    output = next(node for node in graph.nodes if node.op == "output")
    output.args = (tuple(ends),)
    needed = _behind(ends)
    for node in reversed(list(graph.nodes)):
        if node.op not in ("placeholder", "output") and node not in needed:
            graph.erase_node(node)
    graph.lint()
    return graph


def _behind(ends: Iterable[fx.Node]) -> set[fx.Node]:
    """Return `ends` and all that they are computed from."""
    waiting = list(ends)
    seen = set(waiting)
    while waiting:
        new = [node for node in waiting.pop().all_input_nodes if node not in seen]
        waiting += new
        seen.update(new)
    return seen
