"""Operations and operands as text without names of nodes and weights."""

from __future__ import annotations

from kvxform.diffing.outline import Outline, OutlineNode
from kvxform.diffing.outline_nodes import OUTPUT, Operand

_NOTHING = "nothing"


def node_text(node: OutlineNode, outline: Outline) -> str:
    """Return an operation as a line: `f32[B, S, 64] = aten.linear(rms_norm, weight f32[64, 8])`."""
    arguments = [operand_text(operand, outline) for operand in node.inputs]
    arguments += [f"{name}={text}" for name, text in node.attributes]
    call = f"{node.op}({', '.join(arguments)})"
    return f"{node.type} = {call}" if node.type and node.op != OUTPUT else call


def operand_text(operand: Operand | None, outline: Outline) -> str:
    """Return an operand in words: the operation that makes it, an input, or a weight."""
    if operand is None:
        return _NOTHING
    kind, value = operand
    if kind == "list":
        return f"[{', '.join(operand_text(item, outline) for item in value)}]"
    if kind == "weight":
        return f"weight {value}"
    if kind == "port":
        return outline.ports[value].name
    return short_op(outline.nodes[value].op)


def place_text(operand: Operand | None, outline: Outline, layer: int | None) -> str:
    """Return an operand in words, with its layer where that is another one than `layer`."""
    text = operand_text(operand, outline)
    if operand is None or operand[0] != "node":
        return text
    node = outline.nodes[operand[1]]
    of = f" of {node.module}" if node.module else ""
    if node.layer == layer:
        return f"{text}{of}"
    where = "outside of layers" if node.layer is None else f"in layer {node.layer}"
    return f"{text}{of} {where}"


def short_op(op: str) -> str:
    """Return `linear` for `aten.linear`, `add` for `aten.add.Tensor`."""
    parts = op.split(".")
    return parts[1] if len(parts) > 1 else op
