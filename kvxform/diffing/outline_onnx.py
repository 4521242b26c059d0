"""The outline of an ONNX graph: of a package of ours, of any other file, or of an export to be.

Operations have the provenance that the exporter left on them. A file of another exporter has none:
its layers are told from the flow of data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import fx

from kvxform.codegen.onnx.builder import TRANSPOSED
from kvxform.codegen.onnx.capability import check_program
from kvxform.codegen.onnx.export import emit_model
from kvxform.codegen.onnx.forms import OnnxOptions
from kvxform.diffing.layering import assign_layers
from kvxform.diffing.metrics import measure
from kvxform.diffing.onnx_checks import check_graph
from kvxform.diffing.onnx_nodes import constants_of, outline_nodes, type_text
from kvxform.diffing.outline import Outline
from kvxform.diffing.outline_nodes import ATTENTION as KVX_ATTENTION
from kvxform.diffing.outline_nodes import OutlineNode, OutlinePort, in_order
from kvxform.errors import ArtifactError
from kvxform.ir.program import ModelInfo, Program
from kvxform.runtime.onnx_files import DESCRIPTION, MODEL, check_package
from kvxform.runtime.onnx_program import Initialisers, package_program

ATTENTION = ("onnx.Attention", "onnx.Softmax")  # any of them stands for an attention
_CACHE = {"past_key_values.": "past", "present.": "present"}


@dataclasses.dataclass(frozen=True)
class OnnxSide:
    """An ONNX graph that is compared.

    Attributes:
        outline: Its operations.
        weights: A program without a graph, that has its initialisers as weights.
        program: What it was exported from; None if no package says.
        recipe: Name of the recipe that made the program, or empty.
        steps: Passes of that recipe, or None.
        options: What gives a package of the same form; None if no package says.
    """

    outline: Outline
    weights: Program
    program: Program | None = None
    recipe: str = ""
    steps: list[Any] | None = None
    options: OnnxOptions | None = None


def outline_onnx(path: str | Path) -> Outline:
    """Return the outline of a package folder or an .onnx file; see `read_onnx`."""
    return read_onnx(path).outline


def read_onnx(path: str | Path) -> OnnxSide:
    """Read a package folder or an .onnx file. A file beside a `kvxform.json` is a package.

    Raises:
        ArtifactError: KVX601 missing, KVX602 damaged, KVX603 for a reference that leaves the
            folder, KVX604 for a package of another version.
    """
    place = Path(path)
    folder = place if place.is_dir() else place.parent
    is_package = place.is_dir() or (place.name == MODEL and (folder / DESCRIPTION).is_file())
    description = check_package(folder, is_edited=True) if is_package else None
    try:
        model = ir.load(folder / MODEL if is_package else place)
    except Exception as error:  # protobuf and onnx_ir have errors of many kinds
        got = next(iter(str(error).splitlines()), type(error).__name__)
        raise ArtifactError("KVX602", "an ONNX file must be readable", got=got) from error
    check_graph(model.graph)
    if description is None:
        return onnx_side(model, place.stem)
    program, recipe = package_program(model, description), description.get("recipe") or {}
    side, steps = onnx_side(model, program.info.name), recipe.get("passes")
    name = str(recipe.get("name", ""))
    options = _options_of(description["onnx"])
    return dataclasses.replace(side, program=program, recipe=name, steps=steps, options=options)


def _options_of(form: Mapping[str, Any]) -> OnnxOptions:
    """Return what to ask for to get a package of this form."""
    fields = ("level", "opset", "provider", "logits", "weights")
    return OnnxOptions(**{name: form[name] for name in fields if name in form})


def exported_side(program: Program, options: OnnxOptions | None = None) -> OnnxSide:
    """Return the graph that a program would be exported to.

    Args:
        program: What would be exported.
        options: What would be asked of the package.

    Raises:
        CodegenError: KVX401 if it cannot be exported, KVX403 not with these options.
    """
    form, fallback = check_program(program, options)
    model = emit_model(program, fallback, form)
    return onnx_side(model, program.info.name)


def onnx_side(model: ir.Model, name: str) -> OnnxSide:
    """Return a graph as a side of a diff; `name` is what its model is called."""
    graph = model.graph
    weights = Initialisers({v.name or "": tensor for v, tensor in constants_of(graph).items()})
    nodes = in_order(_with_layers([_plain_names(node) for node in outline_nodes(graph)]))
    figures = measure(nodes, dict(weights), None)
    outline = Outline(
        kind="onnx",
        model=name,
        nodes=nodes,
        ports=tuple(_ports(graph)),
        metrics={**figures, "flops_per_token": None},
    )
    return OnnxSide(outline, Program(fx.Graph(), weights, (), ModelInfo(name, "onnx", 0)))


def _plain_names(node: OutlineNode) -> OutlineNode:
    names = tuple(name.removesuffix(TRANSPOSED) for name in node.weights)
    return dataclasses.replace(node, weights=names)


def _with_layers(nodes: Sequence[OutlineNode]) -> Sequence[OutlineNode]:
    """Give operations layers from the flow of data, where no exporter has said any."""
    if any(node.layer is not None for node in nodes):
        return nodes
    attention = [node.key for node in nodes if node.op in ATTENTION]
    last = nodes[-1]  # only the logits count: caches leave the graph in the middle of layers
    flow = [
        dataclasses.replace(node, op=KVX_ATTENTION[0]) if node.op in ATTENTION else node
        for node in (*nodes[:-1], dataclasses.replace(last, inputs=last.inputs[:1]))
    ]
    layers = assign_layers(flow, attention, range(len(attention)))
    return [
        dataclasses.replace(node, layer=layer) for node, layer in zip(nodes, layers, strict=True)
    ]


def _ports(graph: ir.Graph) -> Iterator[OutlinePort]:
    """Yield inputs in the order in which operands count them, then outputs."""
    for value in graph.inputs:
        yield OutlinePort("input", _port_name(value.name or ""), type_text(value))
    for value in graph.outputs:
        yield OutlinePort("output", _port_name(value.name or ""), type_text(value))


def _port_name(name: str) -> str:
    """Return the name of an input or output for people: `past key_codes of layer 3`."""
    for prefix, word in _CACHE.items():
        layer, _, plane = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and layer.isdecimal():
            return f"{word} {plane} of layer {layer}"
    return name
