"""Programs against ONNX packages: equal where they are, and every tampering seen in its place."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from cached import cached_program
from onnx import numpy_helper

import kvxform
from kvxform.codegen.onnx import export_onnx
from kvxform.codegen.onnx.forms import OnnxOptions
from kvxform.diffing.records import DiffResult
from kvxform.diffing.render_text import render_text
from kvxform.errors import ArtifactError
from kvxform.ir.program import Program
from kvxform.ir.text import format_graph
from kvxform.runtime.onnx_program import Initialisers, package_program

INT4 = {"codec": "int", "bits": 4}
KV4 = {"key": INT4, "value": INT4}


def toy(options: dict[str, Any] | None = None, **model: Any) -> Program:
    fields: dict[str, Any] = {"dtype": torch.float32, "layers": 3, "page_size": None}
    return cached_program(options, **(fields | model))


def differ(a: Any, b: Any, **options: Any) -> DiffResult:
    return kvxform.diff(a, b, progress=False, **options)


def tampered(folder: Path, change: Callable[[onnx.GraphProto], None]) -> Path:
    """Return a copy of a package in which `change` has edited the graph."""
    copy = folder.with_name("tampered")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    change(model.graph)
    onnx.save(model, copy / "model.onnx")
    return copy


def node_of(graph: onnx.GraphProto, op: str, layer: int) -> onnx.NodeProto:
    found = [
        node
        for node in graph.node
        if node.op_type == op
        and {p.key: p.value for p in node.metadata_props}.get("kvxform.layer") == str(layer)
    ]
    assert found, "the planted change must fire"
    return found[0]


@pytest.fixture(scope="module")
def program() -> Program:
    return toy(KV4)


@pytest.fixture(scope="module")
def package(program, tmp_path_factory) -> Path:
    return export_onnx(program, tmp_path_factory.mktemp("onnx") / "package")


def test_a_program_and_its_package_are_the_same_in_graph_weights_and_numbers(program, package):
    result = differ(program, package)
    assert (result.exit_code, result.structure.nodes, result.weights) == (0, (), ())
    assert result.numeric.logits.relative < 1e-4
    errors = [(layer.key, layer.value) for layer in result.numeric.layers]
    assert len(errors) == 3
    assert all(max(pair) < 1e-2 for pair in errors), "codes may turn over at ties"
    assert result.numeric.schedules == ("prefill and decode, one sequence at a time",)


def test_the_other_way_round_and_two_packages_too(program, package):
    assert differ(package, program, numeric=False).exit_code == 0
    result = differ(package, package)
    assert (result.exit_code, result.numeric.logits.max_abs) == (0, 0.0)


@pytest.mark.parametrize("options", [{"level": "L0", "opset": 18}, {"opset": 24}])
def test_a_package_is_compared_with_an_export_of_its_form(options, tmp_path):
    before = toy(KV4)
    folder = export_onnx(before, tmp_path / "package", OnnxOptions(**options))
    assert differ(before, folder, numeric=False).exit_code == 0
    plain = export_onnx(before, tmp_path / "plain")
    assert differ(plain, folder, numeric=False).structure.nodes


@pytest.mark.parametrize("options", [{"tied": True}, {"weight_offset": 1.0}])
def test_a_package_knows_its_program(options, tmp_path):
    before = toy(KV4, **options)
    folder = export_onnx(before, tmp_path / "package")
    description = json.loads((folder / "kvxform.json").read_text("utf-8"))
    import onnx_ir as ir

    after = package_program(ir.load(folder / "model.onnx"), description)
    assert format_graph(after.graph) == format_graph(before.graph)
    assert (after.plan, after.passes) == (before.plan, before.passes)
    assert after.weights.keys() == before.weights.keys()
    for name, weight in before.weights.items():
        assert torch.equal(after.weights[name], weight), name
    assert isinstance(after.weights, Initialisers)
    loaded = after.weights.load()
    assert all(torch.equal(loaded[name], weight) for name, weight in before.weights.items())


def test_constants_that_were_folded_come_back(tmp_path):
    from programs import apply

    from kvxform.passes.rotation.rotate_qk import RotateQk

    before, _ = apply(RotateQk(seed=1), toy())
    signs = [name for name in before.weights if "signs" in name]
    assert signs, "the pass made signs"
    folder = export_onnx(before, tmp_path / "package")
    assert differ(before, folder, numeric=False).exit_code == 0
    other = export_onnx(toy(KV4), tmp_path / "other")
    assert differ(other, folder, numeric=False).exit_code == 1


def test_another_recipe_is_told_in_words_of_the_dialect(program, package, tmp_path):
    other = export_onnx(toy(), tmp_path / "exact")
    for a in (program, package):
        result = differ(a, other, numeric=False)
        assert result.exit_code == 1
        assert {change.layer for change in result.plan} >= {0, 1, 2}
        assert not [n for n in result.structure.nodes if n.op.startswith("onnx.")]


def rescale(graph: onnx.GraphProto) -> None:
    for attribute in node_of(graph, "RMSNormalization", 1).attribute:
        if attribute.name == "epsilon":
            attribute.f = 0.5


def rewire(graph: onnx.GraphProto) -> None:
    node = node_of(graph, "RotaryEmbedding", 1)
    node.input[1], node.input[2] = node.input[2], node.input[1]  # cosines and sines


def add_node(graph: onnx.GraphProto) -> None:
    node = node_of(graph, "Sigmoid", 1)
    extra = onnx.helper.make_node("Neg", [node.input[0]], ["extra"], "extra")
    graph.node.insert(list(graph.node).index(node), extra)
    node.input[0] = "extra"


def lose_round(graph: onnx.GraphProto) -> None:
    node_of(graph, "Round", 1).op_type = "Floor"


PLANTED = {rescale: "epsilon", rewire: "cos", add_node: "onnx.Neg", lose_round: "onnx.Floor"}


@pytest.mark.parametrize("change", PLANTED, ids=lambda change: change.__name__)
def test_what_was_changed_in_the_file_is_seen_in_its_layer(change, program, package):
    result = differ(program, tampered(package, change), numeric=False)
    assert result.exit_code == 1
    nodes = result.structure.nodes
    assert nodes
    assert {node.layer for node in nodes} == {1}
    text = " ".join(f"{node.op} {node.what} {node.before} {node.after}" for node in nodes)
    assert PLANTED[change] in text
    assert any(1 in finding.layers for finding in result.findings)


def test_a_plane_of_another_dtype_is_seen(program, package):
    def change(graph: onnx.GraphProto) -> None:
        (port,) = (x for x in graph.input if x.name == "past_key_values.1.key_scale")
        port.type.tensor_type.elem_type = onnx.TensorProto.FLOAT

    result = differ(program, tampered(package, change), numeric=False)
    (port,) = result.structure.ports
    assert (result.exit_code, port.kind) == (1, "input")
    assert "past key_scale" in port.name
    assert (port.before[:4], port.after[:4]) == ("f16[", "f32[")


def test_a_changed_file_is_seen_between_packages_of_other_recipes_too(package, tmp_path):
    other = export_onnx(toy(), tmp_path / "exact")
    result = differ(other, tampered(package, rescale), numeric=False)
    (found,) = (n for n in result.structure.nodes if n.op.startswith("onnx."))
    assert (found.layer, found.op) == (1, "onnx.RMSNormalization")
    assert found.calls == ("kvx.rms_norm",)
    assert "  for kvx.rms_norm" in render_text(result)


def test_a_changed_weight_is_seen_in_its_layer(program, package):
    name = "layers.1.attn.k.weight"
    assert name in program.weights

    def change(graph: onnx.GraphProto) -> None:
        (tensor,) = (t for t in graph.initializer if t.name == f"{name}.T")
        values = program.weights[name].numpy().T.copy()
        values[:, [0, 1]] = values[:, [1, 0]]
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))

    result = differ(program, tampered(package, change), numeric=False)
    assert {(w.layer, w.cause) for w in result.weights} == {(1, "rows permuted")}
    assert result.structure.nodes == ()


def test_names_in_the_file_are_no_change(program, package):
    def change(graph: onnx.GraphProto) -> None:
        kept = {x.name for x in (*graph.input, *graph.output, *graph.initializer)}
        for number, node in enumerate(graph.node):
            node.name = f"n{number}"
            for names in (node.input, node.output):
                for place, name in enumerate(names):
                    names[place] = name if not name or name in kept else f"v_{name}"

    result = differ(program, tampered(package, change))
    assert (result.exit_code, result.structure.nodes) == (0, ())
    assert result.structure.renamed == 0, "names of ONNX nodes are no provenance"


def test_a_file_of_another_exporter_is_compared_by_its_flow(program, package, tmp_path):
    """Without any metadata, layers are found from the flow of data."""
    model = onnx.load(package / "model.onnx")
    for node in model.graph.node:
        del node.metadata_props[:]
    bare = tmp_path / "bare.onnx"
    onnx.save(model, bare)
    assert differ(bare, bare).exit_code == 0
    norm = next(n for n in model.graph.node if n.op_type == "RMSNormalization")
    (epsilon,) = (a for a in norm.attribute if a.name == "epsilon")
    epsilon.f = 0.5
    onnx.save(model, tmp_path / "other.onnx")
    result = differ(bare, tmp_path / "other.onnx", numeric=False)
    (found,) = result.structure.nodes
    assert (found.op, found.layer) == ("onnx.RMSNormalization", 0)
    against = differ(program, bare, numeric=False)
    assert against.structure.nodes == ()


@pytest.mark.parametrize("key", ["program", "folded"])
def test_a_damaged_description_is_refused(key, package):
    copy = tampered(package, lambda _: None)
    path = copy / "kvxform.json"
    data = json.loads(path.read_text("utf-8"))
    del data[key]
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"KVX60[24]"):
        differ(package, copy, numeric=False)


def test_a_weight_of_another_shape_than_the_program_says_is_refused(package):
    def change(graph: onnx.GraphProto) -> None:
        (tensor,) = (t for t in graph.initializer if t.name == "layers.0.norm1.weight")
        tensor.CopyFrom(numpy_helper.from_array(np.ones(4, np.float32), tensor.name))

    with pytest.raises(ArtifactError, match=r"KVX602.*shape and dtype of its weight"):
        differ(package, tampered(package, change), numeric=False)


def test_a_program_that_has_no_cache_is_compared_as_if_it_had(package):
    from programs import llama_program

    plain = llama_program(dtype=torch.float32, layers=3)
    plain = dataclasses.replace(plain, info=dataclasses.replace(plain.info, context_length=None))
    result = differ(plain, package, numeric=False)
    assert result.exit_code == 1
    assert result.plan, "one side has a plan"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fibquant-3", "gear", "kivi4", "octopus-3", "zipcache"])
def test_what_a_recipe_made_and_its_package_are_the_same(recipe, tmp_path):
    from models import tiny_hf

    model = tiny_hf("llama", head_dim=64)
    made = kvxform.optimize(model, recipe, verify="none", progress=False)
    result = differ(made, made.export_onnx(tmp_path / "package"))
    assert (result.exit_code, result.structure.nodes, result.weights) == (0, (), ())
    assert result.numeric.logits.kl < 1e-4
