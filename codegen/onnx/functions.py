"""Level L5: append and attention of each layer as a call of an ONNX function in the domain `kvx`.

The bodies are the nodes of the lower levels, so stock ONNX Runtime runs them: it puts the body in
the place of the call. Layers whose nodes are alike share one function, so a graph reads as the
model does, and a runtime with a kernel of that name can put it in the place of all of them.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from torch import fx

import kvxform.ir.ops as kvx
from kvxform.codegen.onnx.builder import FUNCTIONS, Builder, scope_of
from kvxform.codegen.onnx.emission import Emission
from kvxform.codegen.onnx.node_map import note_calls
from kvxform.codegen.onnx.outlining import Group, Namer, find_group, make_body, shared_constants
from kvxform.codegen.onnx.ports import PAST, PRESENT
from kvxform.codegen.onnx.provenance import NODE
from kvxform.codegen.onnx.streams import PARTS
from kvxform.ir.plan import SitePlan
from kvxform.ir.stream_plan import StreamPlan

OPERANDS: dict[object, tuple[str, ...]] = {
    kvx.CACHE_APPEND: ("key", "value"),
    kvx.CACHED_ATTENTION: ("query",),
}
STREAMS = {part: stream for stream, part in PARTS.items()}
Calls = Mapping[fx.Node, Mapping[str, str]]


@dataclass(frozen=True)
class _Definition:
    """A function, and what its calls pass.

    Attributes:
        function: The function.
        order: Where each operand is among inputs and constants of a group.
    """

    function: ir.Function
    order: tuple[int, ...]

    def call(self, b: Builder, group: Group) -> ir.Node:
        """Return the node that stands for a group; its outputs are new values of the same names."""
        operands = [(*group.inputs, *group.constants)[i] for i in self.order]
        outputs = [ir.Value(name=x.name, type=x.type, shape=x.shape) for x in group.outputs]
        name = b.unique(f"{group.scope}/{self.function.name}")
        node = ir.Node(FUNCTIONS, self.function.name, operands, outputs=outputs, name=name)
        note_calls(node, group.nodes)
        return node


def fold_layers(
    e: Emission, calls: Calls, outputs: Sequence[ir.Value]
) -> tuple[list[ir.Value], list[ir.Function]]:
    """Make append and attention of each layer one call.

    Args:
        e: The emission; the nodes of its builder are replaced.
        calls: Metadata of every call of the program.
        outputs: Outputs of the graph.

    Returns:
        The outputs of the graph, some of them of calls, and the functions that are called.
    """
    groups = _groups(e, calls, outputs)
    names = _names(e, calls) | _constant_names(groups.values())
    definitions = _define(e, groups, names)
    made = {group: definitions[group.text].call(e.builder, group) for group in groups.values()}
    renamed = _replace(e.builder, made)
    return [renamed.get(x, x) for x in outputs], [x.function for x in definitions.values()]


def _groups(e: Emission, calls: Calls, outputs: Sequence[ir.Value]) -> dict[int, Group]:
    """Return append and attention of each layer."""
    layers = {
        notes[NODE]: int(call.kwargs["layer"])  # type: ignore[arg-type]
        for call, notes in calls.items()
        if call.target in OPERANDS
    }
    members: dict[int, list[ir.Node]] = defaultdict(list)
    readers: dict[ir.Value, list[ir.Node]] = defaultdict(list)
    for node in e.builder.nodes:
        layer = layers.get(node.metadata_props.get(NODE, ""))
        if layer is not None:
            members[layer].append(node)
        for value in node.inputs:
            if value is not None:
                readers[value].append(node)
    return {
        layer: find_group(_scope(e, layer), own, readers, outputs) for layer, own in members.items()
    }


def _scope(e: Emission, layer: int) -> str:
    """Return the scope of the nodes of an attention."""
    return scope_of(str(e.program.attention_node(layer).meta["module"]))


def _replace(builder: Builder, made: Mapping[Group, ir.Node]) -> dict[ir.Value, ir.Value]:
    """Put calls in the place of the last node of each group; return new outputs by old ones."""
    renamed = {
        old: new
        for group, call in made.items()
        for old, new in zip(group.outputs, call.outputs, strict=True)
    }
    ends = {group.nodes[-1]: call for group, call in made.items()}
    inside = {node for group in made for node in group.nodes}
    kept = [ends.get(node, node) for node in builder.nodes if node in ends or node not in inside]
    for node in kept:
        for index, value in enumerate(node.inputs):
            if value in renamed:
                node.replace_input_with(index, renamed[value])
    builder.nodes = kept
    return renamed


def _define(
    e: Emission, groups: Mapping[int, Group], names: Mapping[ir.Value, str]
) -> dict[str, _Definition]:
    """Return a function for every kind of group, by its text."""
    assert e.program.plan is not None, "checked"
    alike: dict[str, list[int]] = defaultdict(list)
    for layer, group in groups.items():
        alike[group.text].append(layer)
    opsets, given, found = e.builder.opset_imports(e.form.opset), Namer(), {}
    for text, layers in alike.items():
        site, group = e.program.plan.site(layers[0]), groups[layers[0]]
        inside = shared_constants([groups[layer] for layer in layers])
        order = _order(group, inside, names)
        body = make_body(group, order, names, opsets)
        function = ir.Function(FUNCTIONS, given(_function_name(site)), graph=body, attributes=[])
        function.doc_string = _describe(site)
        found[text] = _Definition(function, order)
    return found


def _order(group: Group, inside: Collection[int], names: Mapping[ir.Value, str]) -> tuple[int, ...]:
    """Return the operands of a function: new tokens, the cache, what layers share, constants."""
    count = len(group.inputs)
    free = [*range(count), *(count + i for i in range(len(group.constants)) if i not in inside)]
    first = [name for operands in reversed(OPERANDS.values()) for name in operands]

    def rank(index: int) -> int:
        name = names.get((*group.inputs, *group.constants)[index], "")
        return first.index(name) if name in first else len(first) + (not name.startswith("past_"))

    return tuple(sorted(free, key=rank))


def _names(e: Emission, calls: Calls) -> dict[ir.Value, str]:
    """Return names for the operands and results of functions."""
    found = {}
    for call in calls:
        operands = OPERANDS.get(call.target, ())
        for source, name in zip(call.args, operands, strict=False):
            value = e.values.get(source) if isinstance(source, fx.Node) else None
            if isinstance(value, ir.Value):
                found[value] = name
        if call.target is kvx.CACHED_ATTENTION:
            y = e.values[call]
            assert isinstance(y, ir.Value), "attention yields one tensor"
            found[y] = "output"
    for word, prefix, ports in (
        ("past", PAST, e.ports.past),
        ("present", PRESENT, e.ports.present),
    ):
        for value in ports.values():
            plane = re.sub(rf"^{prefix}\.\d+\.", "", str(value.name))
            found[value] = f"{word}_{plane}"
    return found


def _constant_names(groups: Iterable[Group]) -> dict[ir.Value, str]:
    """Return names for constants: what they are, and of which stream if one alone reads them."""
    readers: dict[ir.Value, set[str]] = defaultdict(set)
    for group in groups:
        for node in group.nodes:
            part = str(node.name).removeprefix(f"{group.scope}/").partition("/")[0]
            for value in node.inputs:
                if value is not None and value in group.constants:
                    readers[value].add(STREAMS.get(part, ""))
    return {
        value: "_".join([*filter(None, parts), str(value.name).partition("/")[0]])
        for value, parts in readers.items()
        if len(parts) == 1
    }


def _function_name(site: SitePlan) -> str:
    """Return a name that says how the cache is stored: `cached_attention_int4_int2`.

    Layers that read the cache of another one have `shared_attention`.
    """
    kind = "cached_attention" if site.owner == site.layer else "shared_attention"
    return "_".join([kind, *dict.fromkeys(_codec_word(stream) for stream in site.streams.values())])


def _codec_word(stream: StreamPlan) -> str:
    name, bits = str(stream.codec["codec"]), stream.codec.get("bits", "")
    if name == "none":
        return "exact"
    return re.sub(r"\W+", "_", name) + (str(bits) if isinstance(bits, int) else "")


def _describe(site: SitePlan) -> str:
    """Return what the function does, for readers of the graph."""
    parts = [
        f"{name}: {json.dumps(_short(stream.codec), sort_keys=True)}, sink {stream.regions.sink}, "
        f"recent {stream.regions.recent}"
        for name, stream in site.streams.items()
    ]
    own = site.owner == site.layer
    what = "Append new tokens to a cache and attend over it. " if own else "Attend over a cache. "
    return what + "; ".join(parts) + "."


def _short(codec: Mapping[str, object]) -> dict[str, object]:
    """Return the options of a codec, without fitted numbers and options that are not set."""
    return {k: v for k, v in codec.items() if isinstance(v, str | int | float | bool)}
