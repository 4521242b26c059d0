"""Figures of a whole model: what its cache costs, what it computes, how large it is.

A product of matrices `[m, k] @ [k, n]` counts as 2 m n k: one product and one addition each.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from kvxform.diffing.outline import Outline
from kvxform.diffing.outline_nodes import Operand, OutlineNode
from kvxform.diffing.records import MetricChange
from kvxform.ir.plan import CachePlan

CACHED_TOKENS = 8192  # length at which reads and attention are counted
NAMES = (
    "kv_bytes_per_token",
    "bits_per_value",
    "read_bytes",
    "flops_per_token",
    "parameters",
    "parameter_bytes",
)
_PRODUCTS = re.compile(r"(\d+|\w+)(\*(\d+|\w+))*")
_FACTORS = {  # place of the left factor among the operands
    "aten.linear": 0,
    "aten.mm": 0,
    "aten.bmm": 0,
    "aten.matmul": 0,
    "aten.addmm": 1,
    "aten.baddbmm": 1,
}


def measure(
    nodes: Sequence[OutlineNode], weights: Mapping[str, Tensor], plan: CachePlan | None
) -> dict[str, float | None]:
    """Return the figures of `records.MetricChange`; those of a cache are None without a plan.

    Bytes and products are those of one new token after 8192 cached ones. Every expert of a mixture
    counts as if it saw the token.

    Args:
        nodes: Operations of the whole graph.
        weights: Weights by name; those that nothing reads do not count.
        plan: What is cached, or None.
    """
    used = {name for node in nodes for name in node.weights}
    tensors = [weights[name] for name in sorted(used)]
    return {
        "kv_bytes_per_token": plan.bytes_per_token if plan else None,
        "bits_per_value": plan.bits_per_value if plan else None,
        "read_bytes": plan.read_bytes_per_step(1, CACHED_TOKENS) if plan else None,
        "flops_per_token": float(flops_per_token(nodes)),
        "parameters": float(sum(tensor.numel() for tensor in tensors)),
        "parameter_bytes": float(sum(tensor.nbytes for tensor in tensors)),
    }


def compare_metrics(a: Outline, b: Outline) -> tuple[MetricChange, ...]:
    """Return all figures of both sides, equal ones too."""
    names = dict.fromkeys((*NAMES, *sorted(a.metrics), *sorted(b.metrics)))
    return tuple(MetricChange(name, a.metrics.get(name), b.metrics.get(name)) for name in names)


def flops_per_token(nodes: Sequence[OutlineNode]) -> int:
    """Return products and additions of one new token after 8192 cached ones."""
    return sum(_flops(node, nodes) for node in nodes)


def _flops(node: OutlineNode, nodes: Sequence[OutlineNode]) -> int:
    def sizes(place: int) -> list[int]:
        return _sizes(_type(node.operands[place], nodes))

    count = math.prod(_sizes(node.type))
    if node.op in _FACTORS:
        return 2 * count * sizes(_FACTORS[node.op])[-1]
    attributes = dict(node.attributes)
    if node.op in ("kvx.attention", "kvx.cached_attention"):
        return _attention_flops(sizes(0), count, attributes)
    if node.op == "kvx.rotate":
        return 2 * count * sizes(1)[-1]
    if node.op == "kvx.hadamard":
        return count * int(math.log2(int(attributes["block"])))
    return 0


def _attention_flops(query: list[int], values: int, attributes: Mapping[str, str]) -> int:
    limits = (attributes.get(name, "None") for name in ("window", "chunk"))
    seen = min([CACHED_TOKENS, *(int(limit) for limit in limits if limit != "None")])
    return 2 * seen * (math.prod(query) + values)


def _type(operand: Operand, nodes: Sequence[OutlineNode]) -> str:
    kind, value = operand
    if kind == "node":
        return nodes[value].type
    return str(value) if kind == "weight" else ""


def _sizes(type_: str) -> list[int]:
    """Return the sizes of a type for one token of one sequence: symbols count as 1."""
    _, _, inner = type_.partition("[")
    return [_size(text) for text in inner.rstrip("])").split(", ") if text] or [1]


def _size(text: str) -> int:
    if not _PRODUCTS.fullmatch(text):
        return 1
    return math.prod(int(factor) for factor in text.split("*") if factor.isdigit())
