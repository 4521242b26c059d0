"""The outline of an ONNX graph: a package of ours, a bare file, or what a program would export to.

A program is compared with a package as the graph that it would be exported to. So the diff sees
every operation of the file, and no trust is put into what a package says of itself.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, fx

from kvxform.codecs.base import dtype_from_name
from kvxform.codegen.onnx.builder import TRANSPOSED
from kvxform.codegen.onnx.capability import check_program
from kvxform.codegen.onnx.export import emit_model
from kvxform.codegen.onnx.package import describe_package
from kvxform.diffing.fields import plan_fields, site_fields, whole_fields
from kvxform.diffing.metrics import measure
from kvxform.diffing.onnx_nodes import LARGEST_ATTRIBUTE, constants_of, outline_nodes, type_text
from kvxform.diffing.outline import Outline
from kvxform.diffing.outline_nodes import OutlineNode, OutlinePort, in_order
from kvxform.errors import ArtifactError, KvxformError
from kvxform.ir.plan import CachePlan
from kvxform.ir.program import AttentionSite, ModelInfo, Program
from kvxform.runtime.onnx_files import DESCRIPTION, MODEL, check_package

_PAST, _PRESENT = "past_key_values.", "present."
_SITES = TypeAdapter(tuple[AttentionSite, ...])
_INFO = TypeAdapter(ModelInfo)


@dataclass(frozen=True)
class OnnxSide:
    """An ONNX graph that is compared.

    Attributes:
        outline: Its operations.
        program: Sites, plan and weights without a graph. Weights have the names of the program that
            was exported; those of a bare file the names of its initialisers.
    """

    outline: Outline
    program: Program


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
    description = check_package(folder) if is_package else None
    try:
        model = ir.load(folder / MODEL if is_package else place)
    except Exception as error:  # protobuf and onnx_ir have errors of many kinds
        got = next(iter(str(error).splitlines()), type(error).__name__)
        raise ArtifactError("KVX602", "an ONNX file must be readable", got=got) from error
    return read_model(model, description, place.stem)


def export_side(program: Program) -> OnnxSide:
    """Return the graph that a program would be exported to.

    Raises:
        CodegenError: KVX401 if it cannot be exported.
    """
    model = emit_model(program, check_program(program))
    description = json.loads(json.dumps(describe_package(program)))
    return read_model(model, description, program.info.name)


def read_model(model: ir.Model, description: Mapping[str, Any] | None, name: str) -> OnnxSide:
    """Return a graph as a side of a diff.

    Args:
        model: The graph.
        description: The content of `kvxform.json`, or None for a graph that is not ours.
        name: Name of the model if there is no description.

    Raises:
        ArtifactError: KVX602 if the description is damaged.
    """
    graph = model.graph
    if description is None:
        program = Program(fx.Graph(), OnnxWeights(graph, {}), (), ModelInfo(name, "onnx", 0))
        names: dict[str, str] = {}
    else:
        program = _described(graph, description)
        names = {entry["stored"]: w for w, entry in reversed(description["weights"].items())}
    nodes = in_order([_with_names(node, names) for node in outline_nodes(graph, names)])
    plan = program.plan
    outline = Outline(
        kind="onnx",
        model=program.info.name,
        nodes=nodes,
        ports=tuple(_ports(graph)),
        sites=tuple(site_fields(site, program.weights) for site in program.sites),
        plan=tuple(plan_fields(site, program.weights) for site in plan.sites) if plan else (),
        whole=whole_fields(program),
        metrics=measure(nodes, program.weights, plan),
        passes=program.passes,
    )
    return OnnxSide(outline, program)


class OnnxWeights(dict[str, Tensor]):
    """Initialisers as weights: listed they have shapes alone, looked up they have values.

    Args:
        graph: The graph.
        table: Name of the initialiser by name of the weight; other initialisers keep their names.
    """

    def __init__(self, graph: ir.Graph, table: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__()
        tensors = {value.name or "": tensor for value, tensor in constants_of(graph).items()}
        self._tensors: dict[str, tuple[ir.TensorProtocol, bool]] = {}
        for name, entry in table.items():
            like = torch.empty(entry["shape"], dtype=dtype_from_name(entry["dtype"]), device="meta")
            super().__setitem__(name, like)
            if entry["stored"] in tensors:
                is_turned = entry["stored"].endswith(TRANSPOSED)
                self._tensors[name] = (tensors[entry["stored"]], is_turned)
        stored = {entry["stored"] for entry in table.values()}
        for name, tensor in tensors.items():
            if name not in stored and tensor.size > LARGEST_ATTRIBUTE:
                self._tensors[name] = (tensor, False)
                super().__setitem__(name, _like(tensor))

    def __getitem__(self, name: str) -> Tensor:
        """Return a weight with its values, or with its shape alone if no initialiser holds it."""
        if name not in self._tensors:
            return super().__getitem__(name)
        tensor, is_turned = self._tensors[name]
        values = torch.from_numpy(tensor.numpy().copy())
        return values.T.contiguous() if is_turned else values


def _like(tensor: ir.TensorProtocol) -> Tensor:
    dtype = torch.from_numpy(tensor.numpy()[:0].copy()).dtype
    return torch.empty(tuple(tensor.shape.numpy()), dtype=dtype, device="meta")


def _described(graph: ir.Graph, description: Mapping[str, Any]) -> Program:
    """Return sites, plan and weights of a package as a program without a graph."""
    try:
        plan = description["plan"]
        return Program(
            graph=fx.Graph(),
            weights=OnnxWeights(graph, description["weights"]),
            sites=_SITES.validate_python(description["sites"]),
            info=_INFO.validate_python(description["model"]),
            plan=None if plan is None else CachePlan.from_json(plan),
            passes=tuple(description["passes"]),
        )
    except (KeyError, TypeError, ValueError, ValidationError, KvxformError) as error:
        rule = "the description of an ONNX package must be whole"
        hint = "export the model again"
        raise ArtifactError("KVX602", rule, where=DESCRIPTION, hint=hint) from error


def _with_names(node: OutlineNode, names: Mapping[str, str]) -> OutlineNode:
    return dataclasses.replace(node, weights=tuple(names.get(w, w) for w in node.weights))


def _ports(graph: ir.Graph) -> Iterator[OutlinePort]:
    """Yield inputs in the order in which operands count them, then outputs."""
    for value in graph.inputs:
        name = value.name or ""
        if name.startswith(_PAST):
            layer, plane = _layer_of(name.removeprefix(_PAST))
            yield OutlinePort("cache", plane, type_text(value), layer)
        else:
            yield OutlinePort("input", name, type_text(value))
    for value in graph.outputs:
        name = value.name or ""
        if name.startswith(_PRESENT):
            layer, plane = _layer_of(name.removeprefix(_PRESENT))
            yield OutlinePort("output", f"present {plane}", type_text(value), layer)
        else:
            yield OutlinePort("output", name, type_text(value))


def _layer_of(name: str) -> tuple[int | None, str]:
    """Split `3.key_codes` into layer and plane."""
    layer, _, plane = name.partition(".")
    return (int(layer), plane) if layer.isdecimal() else (None, name)
