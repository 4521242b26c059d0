"""Random edits of small programs, each with the layer where a diff must see it.

The layer is read from the path of the module, which a diff never does: an independent reference.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import kvxform.ir.ops as kvx
from kvxform.ir.program import AttentionSite, Program
from kvxform.ir.types import TensorType

aten = torch.ops.aten
UNARY = (aten.silu.default, aten.gelu.default, aten.relu.default, aten.neg.default)
BINARY = (aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor)
NUMBERS: dict[Any, dict[str, Callable[[Any], Any]]] = {
    kvx.ATTENTION: {"scale": lambda x: 2 * x, "window": lambda x: (x or 8) - 1},
    kvx.CACHED_ATTENTION: {"scale": lambda x: 2 * x, "window": lambda x: (x or 8) - 1},
    kvx.ROPE: {"interleaved": lambda x: not x, "attention_scaling": lambda x: 2 * (x or 1.0)},
}


@dataclass(frozen=True)
class Edit:
    """A program with one thing changed.

    Attributes:
        program: The changed clone.
        kind: Which edit it was.
        layers: Layers where it may be reported.
        changes: What kinds of change may report it.
    """

    program: Program
    kind: str
    layers: frozenset[int | None]
    changes: frozenset[str]


def layer_of(node: fx.Node) -> int | None:
    """Return the number in the path of the module of a node."""
    found = re.search(r"\b(?:layers|h)\.(\d+)\b", node.meta["module"])
    return int(found[1]) if found else None


def random_edit(program: Program, seed: int) -> Edit:
    """Return a clone of `program` with one random edit; the same one for the same seed."""
    rng = random.Random(seed)
    while True:
        edit = rng.choice(EDITS)
        clone = program.clone()  # an edit that gives up may have changed its clone
        found = edit(clone, rng)
        if found is not None:
            changes, nodes = found
            layers = frozenset(map(layer_of, nodes))
            return Edit(clone, edit.__name__, layers, frozenset(changes))


Found = tuple[Sequence[str], Sequence[fx.Node]] | None


def change_number(program: Program, rng: random.Random) -> Found:
    """Give an attention, RoPE or norm another number."""
    nodes = [n for n in program.graph.nodes if n.target in (*NUMBERS, kvx.RMS_NORM)]
    if not nodes:
        return None
    node = rng.choice(nodes)
    if node.target is kvx.RMS_NORM:
        node.args = (*node.args[:2], node.args[2] * 10)
    else:
        name, change = rng.choice(sorted(NUMBERS[node.target].items(), key=lambda item: item[0]))
        node.kwargs = {**node.kwargs, name: change(node.kwargs.get(name))}
    return ["changed"], [node]


def change_op(program: Program, rng: random.Random) -> Found:
    """Put another operation in the place of one."""
    group = rng.choice((UNARY, BINARY))
    nodes = list(program.calls(*group))
    if not nodes:
        return None
    node = rng.choice(nodes)
    node.target = rng.choice([target for target in group if target is not node.target])
    return ["changed"], [node]


def insert(program: Program, rng: random.Random) -> Found:
    """Put a new operation on one edge, or between a value and all that read it."""
    reader, value = _random_edge(program, rng)
    is_one_edge = rng.random() < 0.5
    at = reader if is_one_edge else value
    with program.graph.inserting_before(reader if is_one_edge else value.next):
        node = program.graph.call_function(rng.choice(UNARY), (value,))
    node.meta = {**at.meta, "origin": "inserted", "via": ("test",)}
    if is_one_edge:
        reader.replace_input_with(value, node)
    else:
        value.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
    return ["added"], [reader, value]


def remove(program: Program, rng: random.Random) -> Found:
    """Take an operation out whose result has the type of its operand."""
    nodes = [n for n in _tensors(program) if _tensors_of(n) and _same_type(n, _tensors_of(n)[0])]
    node, count = rng.choice(nodes), len(list(program.calls(*kvx.ATTENTION_OPS)))
    node.replace_all_uses_with(_tensors_of(node)[0])
    program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    is_whole = len(list(program.calls(*kvx.ATTENTION_OPS))) == count
    return (["removed"], [node]) if is_whole else None


def rewire(program: Program, rng: random.Random) -> Found:
    """Let an operation read another value of the same type."""
    reader, value = _random_edge(program, rng)
    order = list(program.graph.nodes)
    earlier = order[: order.index(reader)]
    others = [n for n in earlier if n in _tensors(program) and _same_type(n, value)]
    others = [n for n in others if n is not value and n not in reader.all_input_nodes]
    if not others or len(value.users) < 2:  # else what made it would be dead
        return None
    reader.replace_input_with(value, rng.choice(others))
    return ["rewired"], [reader]


def swap(program: Program, rng: random.Random) -> Found:
    """Exchange keys and values of an attention."""
    nodes = list(program.calls(kvx.ATTENTION))
    if not nodes:
        return None
    node = rng.choice(nodes)
    q, k, v, *rest = node.args
    node.args = (q, v, k, *rest)
    return ["rewired"], [node]


def narrow(program: Program, rng: random.Random) -> Found:
    """Store a weight with less precision; what is computed from it follows."""
    nodes = [n for n in program.graph.nodes if n.op == "get_attr"]
    node = rng.choice(nodes)
    name = f"{node.target}_narrow"
    program.weights[name] = program.weights[node.target].to(torch.float32)
    node.target = name
    node.meta["type"] = dataclasses.replace(node.meta["type"], dtype=torch.float32)
    return ["retyped"], list(node.users)


EDITS = (change_number, change_op, insert, remove, rewire, swap, narrow)


def _random_edge(program: Program, rng: random.Random) -> tuple[fx.Node, fx.Node]:
    edges = [(n, value) for n in _tensors(program) for value in _tensors_of(n)]
    return rng.choice(edges)


def _tensors(program: Program) -> list[fx.Node]:
    """Return operations with one floating-point result."""
    calls = (n for n in program.graph.nodes if n.op == "call_function")
    return [n for n in calls if _is_floating(n)]


def _tensors_of(node: fx.Node) -> list[fx.Node]:
    inputs = node.all_input_nodes
    return [n for n in inputs if n.op == "call_function" and _is_floating(n)]


def _is_floating(node: fx.Node) -> bool:
    kind = node.meta.get("type")
    return isinstance(kind, TensorType) and kind.dtype.is_floating_point


def _same_type(a: fx.Node, b: fx.Node) -> bool:
    return bool(a.meta["type"] == b.meta["type"])


def renamed(program: Program) -> Program:
    """Return the same program with other names of nodes, weights, modules and source lines."""
    clone = program.clone()
    clone.weights = {f"w.{name}": weight for name, weight in clone.weights.items()}
    for number, node in enumerate(clone.graph.nodes):
        if node.op in ("get_attr", "call_function"):
            node.name = f"other_{number}"
            node.meta["module"] = f"shell.{node.meta['module']}".replace("layers", "blocks")
            node.meta["origin"] = node.meta["origin"].replace(":1)", f":{number + 7})")
        if node.op == "get_attr":
            node.target = f"w.{node.target}"
    clone.sites = tuple(_renamed_site(site) for site in clone.sites)
    return clone


def _renamed_site(site: AttentionSite) -> AttentionSite:
    changes: dict[str, Any] = {"module": f"shell.{site.module}"}
    if site.rope is not None:
        changes["rope"] = dataclasses.replace(site.rope, inv_freq=f"w.{site.rope.inv_freq}")
    for name in ("sink_logits", "alibi_slopes"):
        if getattr(site, name) is not None:
            changes[name] = f"w.{getattr(site, name)}"
    return dataclasses.replace(site, **changes)
