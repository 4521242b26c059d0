"""Packages at level L5: what functions do, which layers share one, and what their calls say."""

from __future__ import annotations

import dataclasses

import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from cached import cached_program, defined_logits
from onnx_tools import open_export
from programs import token_ids

from kvxform.codegen.onnx.forms import OnnxOptions
from kvxform.codegen.onnx.node_map import node_map
from kvxform.codegen.onnx.outlining import Namer
from kvxform.diffing.outline_onnx import outline_onnx

TOKENS, TOLERANCE = 40, 1e-4
INT4 = {"codec": "int", "bits": 4}
KIVI = {
    "key": {"codec": "int", "bits": 2, "axis": "channel", "group": 8, "zero": "float"},
    "value": {"codec": "int", "bits": 4, "group": 8, "zero": "float"},
    "key_regions": {"recent": 16, "flush": "block"},
    "value_regions": {"sink": 3, "recent": 16, "flush": "sliding"},
}
PLANS = {
    "exact": None,
    "int4": {"key": INT4, "value": INT4},
    "int4_int2": {"key": INT4, "value": {"codec": "int", "bits": 2}},
    "kivi": KIVI,
}
NAMES = {
    "exact": "cached_attention_exact",
    "int4": "cached_attention_int4",
    "int4_int2": "cached_attention_int4_int2",
    "kivi": "cached_attention_int2_int4",
}


def program_of(plan, **model):
    return cached_program(plan, None, dtype=torch.float32, **model)


def open_l5(program, folder, opset=None):
    session = open_export(program, folder, OnnxOptions(level="L5", opset=opset))
    return session, ir.load(folder / "model.onnx")


def calls_of(model):
    return [node for node in model.graph if node.domain == "kvx"]


@pytest.fixture(scope="module")
def int4(tmp_path_factory):
    """Return the folder of a package and its model."""
    folder = tmp_path_factory.mktemp("int4") / "out"
    return folder, open_l5(program_of(PLANS["int4"]), folder)[1]


@pytest.mark.parametrize(
    ("case", "opset"),
    [
        ("int4_int2", 23),
        ("kivi", 18),
        *(pytest.param(case, 23, marks=pytest.mark.slow) for case in ("exact", "int4", "kivi")),
    ],
)
def test_packages_are_as_defined(case, opset, tmp_path):
    program = program_of(PLANS[case])
    session, model = open_l5(program, tmp_path / "out", opset)
    ids = token_ids(program, 2, TOKENS)
    expected = torch.stack([defined_logits(program, row) for row in ids])
    torch.testing.assert_close(
        session.prefill(ids[:, :-1]), expected[:, -2], rtol=0, atol=TOLERANCE
    )
    torch.testing.assert_close(session.decode(ids[:, -1]), expected[:, -1], rtol=0, atol=TOLERANCE)
    assert [name for _, name, _ in model.functions] == [NAMES[case]]  # one for both layers
    assert [node.op_type for node in calls_of(model)] == [NAMES[case]] * 2
    path = str(tmp_path / "out" / "model.onnx")
    onnx.checker.check_model(path, full_check=True)
    onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True)


def test_a_call_says_what_it_takes_and_gives(int4):
    _, model = int4
    (function,) = model.functions.values()
    planes = [f"{s}_{p}" for s in ("key", "value") for p in ("codes", "scale", "zero")]
    past = [f"past_{plane}" for plane in planes]
    assert [x.name for x in function.inputs] == ["query", "key", "value", *past, "mask"]
    assert [x.name for x in function.outputs] == ["output", *(f"present_{p}" for p in planes)]
    assert "int" in function.doc_string
    for layer, node in enumerate(calls_of(model)):
        ports = [str(x.name) for x in node.inputs if str(x.name).startswith("past")]
        assert ports == [f"past_key_values.{layer}.{plane}" for plane in planes]
        presents = [x.name for x in node.outputs[1:]]
        assert presents == [f"present.{layer}.{plane}" for plane in planes]
        assert node.name == f"/layers.{layer}/attn/{NAMES['int4']}"
        assert node.metadata_props["kvxform.layer"] == str(layer)
    names = [node.name for node in function]
    assert len(set(names)) == len(names)
    assert not [name for name in names if "layers" in name]


def test_a_call_does_the_work_of_append_and_attention(int4):
    _, model = int4
    found, calls = node_map(model.graph), calls_of(model)
    for layer, node in enumerate(calls):
        for op in ("cache_append", "cached_attention"):
            assert found[f"{layer}/kvx.{op}/0"] == (node.name,)


def test_layers_with_scales_of_their_own_share_a_function(tmp_path):
    codec = {"codec": "static-int", "bits": 8, "axis": "tensor"}
    program = program_of({"key": {**codec, "scale": [0.02]}, "value": {**codec, "scale": [0.05]}})
    key = program.plan.site(1).key
    other = dataclasses.replace(key, codec={**key.codec, "scale": [0.031]})
    program.plan = program.plan.replace_site(1, key=other)
    session, model = open_l5(program, tmp_path / "out")
    assert len(model.functions) == 1
    scales = [
        [round(float(x.const_value.numpy().max()), 3) for x in node.inputs if x.const_value]
        for node in calls_of(model)
    ]
    assert [set(own) for own in scales] == [{0.02}, {0.031}]  # that of values is in the body
    (function,) = model.functions.values()
    assert function.inputs[-1].name == "key_scale"
    ids = token_ids(program, 1, 12)
    expected = defined_logits(program, ids[0])
    torch.testing.assert_close(session.prefill(ids)[0], expected[-1], rtol=0, atol=1e-3)


def test_layers_that_are_stored_otherwise_have_functions_of_their_own(tmp_path):
    program = program_of(PLANS["int4"], layers=3)
    exact = program_of(None, layers=3).plan.site(1)
    program.plan = program.plan.replace_site(1, key=exact.key, value=exact.value)
    _, model = open_l5(program, tmp_path / "out")
    kinds = [node.op_type for node in calls_of(model)]
    assert kinds == [NAMES["int4"], NAMES["exact"], NAMES["int4"]]
    assert len(model.functions) == 2


def test_layers_that_read_another_cache_are_calls_too(tmp_path):
    program = program_of(PLANS["int4"], shared=True, layers=3)
    session, model = open_l5(program, tmp_path / "out")
    kinds = [node.op_type for node in calls_of(model)]
    assert kinds == ["cached_attention_int4", *["shared_attention_int4"] * 2]
    ids = token_ids(program, 1, 20)
    expected = defined_logits(program, ids[0])
    torch.testing.assert_close(session.prefill(ids)[0], expected[-1], rtol=0, atol=TOLERANCE)


def test_the_runtime_puts_bodies_in_the_place_of_calls(int4, tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    path = str(int4[0] / "model.onnx")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    domains = {node.domain for node in ir.load(tmp_path / "optimised.onnx").graph}
    assert "kvx" not in domains


def test_a_diff_reads_calls_as_operations(int4):
    nodes = outline_onnx(int4[0]).nodes
    calls = [node for node in nodes if NAMES["int4"] in node.op]
    assert [node.layer for node in calls] == [0, 1]
    assert calls[0].origin.startswith("attention")


def test_equal_programs_give_equal_bytes(int4, tmp_path):
    open_l5(program_of(PLANS["int4"]), tmp_path / "again")
    contents = [(folder / "model.onnx").read_bytes() for folder in (int4[0], tmp_path / "again")]
    assert contents[0] == contents[1]


def test_names_that_end_in_numbers_are_given_once():
    given = Namer()
    assert [given(name) for name in ("x", "x_2", "x", "x", "x_2")] == [
        "x",
        "x_2",
        "x_3",
        "x_4",
        "x_2_2",
    ]


def test_a_layer_that_runs_twice_has_calls_of_different_names(tmp_path):
    program = program_of(PLANS["int4"])
    for node in program.graph.nodes:
        if "module" in node.meta:
            node.meta["module"] = node.meta["module"].replace("layers.1", "layers.0")
    _, model = open_l5(program, tmp_path / "out")
    names = [node.name for node in calls_of(model)]
    assert len(set(names)) == 2
