"""Which node of the graph an ONNX node was made from, as metadata on the ONNX node.

A graph node becomes several ONNX nodes, and each of them has the same entries. `kvxform.node` is a
key that holds across runs and versions: layer, operation, and how many such came before in that
layer. What layers share (masks, tables of cosines) comes from no single node and has no entries.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from torch import fx

from kvxform.ir.program import AttentionSite, Program
from kvxform.ir.targets import target_name

LAYER, MODULE, ORIGIN = "kvxform.layer", "kvxform.module", "kvxform.origin"
VIA, NODE = "kvxform.via", "kvxform.node"
_LAYER_PATH = re.compile(r"(?:.*\.)?\d+(?=\.|$)")  # a path up to its last number


def provenance_notes(program: Program) -> dict[fx.Node, dict[str, str]]:
    """Return the metadata entries for every call of the graph; empty fields are left out."""
    paths = _layer_paths(program.sites)
    counts: Counter[tuple[str, str]] = Counter()
    notes = {}
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        layer, op = _layer_of(node, paths), str(target_name(node.target))
        key = f"{layer or '-'}/{op}/{counts[layer, op]}"
        counts[layer, op] += 1
        entries = {
            NODE: key,
            LAYER: layer,
            MODULE: node.meta["module"],
            ORIGIN: node.meta["origin"],
            VIA: ", ".join(node.meta["via"]),
        }
        notes[node] = {name: text for name, text in entries.items() if text}
    return notes


def _layer_paths(sites: Sequence[AttentionSite]) -> dict[str, str]:
    """Return the layer index by the path of the layer, `model.layers.3`, as text."""
    found = {}
    for site in sites:
        path = _LAYER_PATH.match(site.module)
        found[path[0] if path else site.module] = str(site.layer)
    return found


def _layer_of(node: fx.Node, paths: dict[str, str]) -> str:
    """Return the layer of a node as text; of an attention node by its own word."""
    if "layer" in node.kwargs:
        return str(node.kwargs["layer"])
    path = str(node.meta["module"])
    while path and path not in paths:
        path = path.rpartition(".")[0]
    return paths.get(path, "")
