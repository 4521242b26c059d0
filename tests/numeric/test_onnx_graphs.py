"""Graphs of every form pass the checker and strict shape inference, operators of ORT included."""

from __future__ import annotations

import dataclasses
import functools
import re

import onnx
import pytest
import torch
from cached import cached_program
from contrib_schemas import DOMAIN, register_contrib_schemas
from onnx import shape_inference

from kvxform.codegen.onnx import export_onnx
from kvxform.codegen.onnx.forms import OnnxOptions

INT4 = {"key": {"codec": "int", "bits": 4}, "value": {"codec": "int", "bits": 4}}
WITH_ENDS = {**INT4, "regions": {"sink": 2, "recent": 4}}


def static(bits: int) -> dict[str, object]:
    stream = {"codec": "static-int", "bits": bits, "scale": [0.1]}
    return {"key": stream, "value": stream}


FORMS = {
    "L0 opset 18": (None, OnnxOptions(level="L0", opset=18)),
    "L0 opset 18, codes": (INT4, OnnxOptions(level="L0", opset=18)),
    "L0 opset 18, regions": (WITH_ENDS, OnnxOptions(level="L0", opset=18)),
    "L1 opset 23": (None, OnnxOptions(level="L1", opset=23)),
    "L1 opset 24": (None, OnnxOptions(level="L1", opset=24)),
    "L1 opset 25": (None, OnnxOptions(level="L1", opset=25)),
    "L2 opset 23": (INT4, OnnxOptions(level="L2", opset=23)),
    "L2 opset 24": (INT4, OnnxOptions(level="L2", opset=24)),
    "L2 opset 24, regions": (WITH_ENDS, OnnxOptions(level="L2", opset=24)),
    "L3": (None, OnnxOptions(level="L3")),
    "L3, last": (None, OnnxOptions(level="L3", logits="last")),
    "L3, codes of 8 bits": (static(8), OnnxOptions(level="L3")),
    "L3, codes of 4 bits": (static(4), OnnxOptions(level="L3")),
    "L3, weights of 4 bits": (None, OnnxOptions(level="L3", weights="int4")),
    "L4": (None, OnnxOptions(level="L4", provider="cuda")),
    "L4, weights of 4 bits": (None, OnnxOptions(level="L4", provider="cuda", weights="int4")),
    "L5": (INT4, OnnxOptions(level="L5")),
    "L4, codes of 8 bits": (static(8), OnnxOptions(level="L4", provider="cuda")),
}


QUICK = {"L0 opset 18, codes", "L1 opset 24", "L3, weights of 4 bits", "L4, codes of 8 bits", "L5"}
BFLOAT16 = ("L1 opset 23", "L1 opset 24", "L2 opset 24", "L3", "L3, codes of 8 bits", "L4")
HALF = {f"{name}, bfloat16": FORMS[name] for name in BFLOAT16}


def cases(forms):
    """Return parameters; only a few forms are not slow."""
    return [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in forms]


def toy(plan, dtype):
    program = cached_program(plan, None, dtype=dtype)
    program.info = dataclasses.replace(program.info, context_length=64)
    return program


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """Return what exports a form, once, and gives the path of its graph."""
    folder = tmp_path_factory.mktemp("forms")

    @functools.cache
    def path_of(name):
        plan, options = (FORMS | HALF)[name]
        dtype = torch.float16 if options.provider == "cuda" else torch.float32
        if name in HALF:
            dtype, options = torch.bfloat16, dataclasses.replace(options, provider="cuda")
        return export_onnx(toy(plan, dtype), folder / name, options) / "model.onnx"

    return path_of


def load(path):
    return onnx.load(str(path), load_external_data=False)


def shape_of(value):
    return [d.dim_param or d.dim_value or "?" for d in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("name", cases(FORMS | HALF))
def test_the_checker_knows_every_node_and_every_shape_follows(name, export):
    contrib = register_contrib_schemas()
    path = export(name)
    onnx.checker.check_model(str(path), full_check=True)
    model = load(path)
    used = {n.op_type for n in model.graph.node if n.domain == DOMAIN}
    assert used <= contrib, "of every operator there is a schema"
    inferred = shape_inference.infer_shapes(
        model, check_type=True, strict_mode=True, data_prop=True
    ).graph
    shapes = {v.name: shape_of(v) for v in (*inferred.value_info, *inferred.output)}
    made = [output for node in inferred.node for output in node.output if output]
    assert made
    assert shapes.keys() >= set(made)


@pytest.mark.parametrize("change", ["attribute", "type", "inputs"])
def test_the_checker_sees_faults_of_operators_of_the_runtime(change, export):
    register_contrib_schemas()
    model = onnx.load(str(export("L3")))
    node = next(n for n in model.graph.node if n.op_type == "GroupQueryAttention")
    if change == "attribute":
        node.attribute.append(onnx.helper.make_attribute("window", 3))
    elif change == "inputs":
        del node.input[5:]
    else:
        node.input[5] = "input_ids"
    with pytest.raises((onnx.checker.ValidationError, shape_inference.InferenceError)):
        onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize("name", cases(FORMS))
def test_sizes_that_vary_have_names(name, export):
    graph = load(export(name)).graph
    for value in (*graph.input, *graph.output):
        for size in shape_of(value):
            assert isinstance(size, int) or re.fullmatch(r"[a-z_]+( \+ 1)?", size), value.name


@pytest.mark.parametrize("name", cases(FORMS))
def test_nodes_and_values_say_layer_and_role(name, export):
    graph = load(export(name)).graph
    names = [n.name for n in graph.node]
    assert len(set(names)) == len(names)
    outputs = {x.name for x in graph.output}
    for node in graph.node:
        notes = {p.key: p.value for p in node.metadata_props}
        if node.name.startswith("/layers."):
            assert notes["kvxform.layer"] == node.name.split("/")[1].removeprefix("layers.")
        for output in filter(None, node.output):
            assert output in outputs or output.rpartition("/")[0] == node.name.rpartition("/")[0]
            assert output in outputs or re.search(r"_output_\d$", output)


def test_small_nodes_of_attention_say_whose_they_are(export):
    names = {n.name for n in load(export("L1 opset 23")).graph.node}
    attention = "/layers.1/attn"
    assert {f"{attention}/{s}/Reshape" for s in "qkvo"} <= names
    assert {f"{attention}/q/rope", f"{attention}/k/rope"} <= names
    assert f"{attention}/v/rope" not in names


def test_nodes_of_the_cache_say_what_they_do(export):
    attention = "/layers.1/attn"
    roles = {
        n.name.removeprefix(f"{attention}/")
        for n in load(export("L0 opset 18, codes")).graph.node
        if n.name.startswith(attention)
    }
    assert all("/" in role for role in roles)  # none is of the module alone
    parts = {role.rpartition("/")[0] for role in roles}
    assert {"kv/encode", "v/decode", "attention"} <= parts
    assert {"k/append", "v/append", "attention/Softmax"} <= roles


def test_metadata_name_form_versions_and_runtime(export):
    model = load(export("L3, weights of 4 bits"))
    found = {p.key.removeprefix("kvxform."): p.value for p in model.metadata_props}
    assert found.pop("minimum_onnxruntime") >= "1.20"
    assert found == {
        "cache": "buffer",
        "ir_version": str(model.ir_version),
        "level": "L3",
        "logits": "all",
        "opset": str(model.opset_import[0].version),
        "padding": "right",
        "provider": "cpu",
        "recipe": "none",
        "weights": "int4",
    }
    assert (model.producer_name, bool(model.producer_version)) == ("kvxform", True)
