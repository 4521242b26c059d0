"""Weights of 4 bits: packed as ONNX Runtime packs them, multiplied as it multiplies them."""

from __future__ import annotations

import json

import onnx
import onnx_ir as ir
import pytest
import torch
from cached import cached_program
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import apply, gpt2_program, token_ids

from kvxform.codegen.onnx import export_onnx
from kvxform.codegen.onnx.forms import OnnxOptions, choose_form
from kvxform.codegen.onnx.nbits import Packing, pack, unpack
from kvxform.codegen.onnx.weights import WeightStore, unpacked_program
from kvxform.errors import ArtifactError, CodegenError, VerifyError
from kvxform.ir.types import TensorType
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.runtime.exporting import Verdict
from kvxform.runtime.model import OptimizedModel
from kvxform.runtime.onnx_program import package_program
from kvxform.runtime.onnx_session import OnnxSession

INT4 = OnnxOptions(weights="int4")
MATRIX = "layers.0.mlp.up.weight"

aten = torch.ops.aten


def toy(**model):
    return cached_program(None, None, dtype=torch.float32, **model)


def gpt2():
    return apply(InsertCache(), gpt2_program(dtype=torch.float32))[0]


def load(folder):
    return onnx.load(str(folder / "model.onnx"), load_external_data=False)


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 5),
    k=st.integers(1, 100),
    bits=st.sampled_from([4, 8]),
    is_turned=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_unpacked_values_are_within_half_a_step_of_their_block(n, k, bits, is_turned, dtype):
    torch.manual_seed(n * k)
    weight = torch.randn(k, n).to(dtype) if is_turned else torch.randn(n, k).to(dtype)
    packing = Packing(bits, is_turned)
    parts = pack(weight, packing)
    for name, part in zip(("codes", "scale", "zero"), parts, strict=True):
        assert list(part.shape) == packing.shape(name, weight)
    found = unpack(parts, packing, weight)
    assert (found.shape, found.dtype) == (weight.shape, dtype)
    rows = (weight.T if is_turned else weight).float()
    error = ((found.T if is_turned else found).float() - rows).abs()
    for first in range(0, k, 32):
        block = rows[:, first : first + 32]
        low, high = block.amin(1).clamp(max=0), block.amax(1).clamp(min=0)
        step = (high - low) / (2**bits - 1)
        rounding = 0.6 * torch.finfo(dtype).eps * 2**bits  # of the stored scale
        limit = step * (1 + rounding) + rows.abs().amax() * torch.finfo(dtype).eps
        assert (error[:, first : first + 32].amax(1) <= limit).all()


@pytest.mark.parametrize("options", [{"tied": True}, {"tied": False}])
def test_logits_are_those_of_the_unpacked_weights(options, tmp_path):
    program = toy(**options)
    session = OnnxSession(export_onnx(program, tmp_path / "out", INT4), threads=1)
    ids = token_ids(program, 2, 6)
    found = session.prefill(ids)
    exact = OptimizedModel(unpacked_program(program)).new_session(2).prefill(ids)
    source = OptimizedModel(program).new_session(2).prefill(ids)
    scale = exact.abs().max()
    assert (found - exact).abs().max() < 0.02 * scale  # activations have 8 bits
    assert (source - exact).abs().max() > 0.02 * scale  # the weights are not those of the source


def test_a_tied_table_is_there_once(tmp_path):
    graph = load(export_onnx(toy(tied=True), tmp_path / "out", INT4)).graph
    kinds = [n.op_type for n in graph.node]
    assert kinds.count("GatherBlockQuantized") == 1
    assert kinds.count("MatMulNBits") == 2 * 7 + 1
    assert not {"MatMul", "Gemm"} & set(kinds)
    stored = [t.name for t in graph.initializer if t.name.startswith("embed")]
    assert stored == [f"embed.weight.int8.{part}" for part in ("codes", "scale", "zero")]


def test_a_table_that_is_not_tied_stays_as_it_is(tmp_path):
    graph = load(export_onnx(toy(tied=False), tmp_path / "out", INT4)).graph
    names = {t.name for t in graph.initializer}
    assert "embed.weight" in names
    assert "head.weight.int4.codes" in names


def test_matrices_that_stand_the_other_way_round(tmp_path):
    program = gpt2()
    folder = export_onnx(program, tmp_path / "out", INT4)
    kinds = [n.op_type for n in load(folder).graph.node]
    assert "MatMulNBits" in kinds
    turned = [p for p in WeightStore.of(program, "int4").packed.values() if p.is_turned]
    assert turned
    ids = token_ids(program, 1, 5)
    found = OnnxSession(folder, threads=1).prefill(ids)
    exact = OptimizedModel(unpacked_program(program)).new_session(1).prefill(ids)
    assert (found - exact).abs().max() < 0.02 * exact.abs().max()


def test_a_package_knows_the_values_of_packed_weights(tmp_path):
    program = toy(tied=True)
    folder = export_onnx(program, tmp_path / "out", INT4)
    description = json.loads((folder / "kvxform.json").read_text("utf-8"))
    assert description["onnx"]["weights"] == "int4"
    found = package_program(ir.load(folder / "model.onnx"), description).weights
    for name, weight in unpacked_program(program).weights.items():
        assert torch.equal(found[name], weight), name


def test_parts_of_another_shape_are_refused(tmp_path):
    folder = export_onnx(toy(), tmp_path / "out", INT4)
    model = ir.load(folder / "model.onnx")
    name = "layers.0.mlp.up.weight.int4.scale"
    model.graph.initializers[name].const_value = ir.tensor(torch.ones(3, 1).numpy(), name=name)
    description = json.loads((folder / "kvxform.json").read_text("utf-8"))
    with pytest.raises(ArtifactError, match=r"^KVX602.*shapes of its packing"):
        package_program(model, description)


def test_equal_programs_give_equal_packed_files(tmp_path):
    for name in "ab":
        export_onnx(toy(), tmp_path / name, INT4)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_matrices_narrower_than_a_block_stay_as_they_are(tmp_path):
    program = toy(layers=1)
    name = "layers.0.mlp.up.weight"
    assert WeightStore.of(program, "int4").packing(name)
    program.weights[name] = torch.zeros(16, 32)
    assert WeightStore.of(program, "int4").packing(name) is None


def test_an_export_is_verified_against_the_unpacked_weights(tmp_path, monkeypatch):
    model = OptimizedModel(toy(layers=1))
    folder = model.export_onnx(tmp_path / "out", INT4)
    assert Verdict.of(folder).is_verified
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]

    def wrong(parts, packing, like):
        return unpack(parts, packing, like) * 1.01

    monkeypatch.setattr("kvxform.codegen.onnx.weights.unpack", wrong)
    with pytest.raises(VerifyError, match=r"^KVX503"):
        model.export_onnx(tmp_path / "other", INT4)


def test_an_older_runtime_is_refused():
    program = toy(layers=1)
    assert choose_form(program, INT4).runtime >= "1.25"
    with pytest.raises(CodegenError, match=r"^KVX403.*int4 weights need ONNX Runtime 1.25"):
        choose_form(program, OnnxOptions(level="L1", weights="int4", runtime="1.24"))
    with pytest.raises(CodegenError, match=r"^KVX403.*not a primitive"):
        choose_form(program, OnnxOptions(level="L0", weights="int4"))


def test_products_that_a_program_writes_out_itself(tmp_path):
    program = toy(layers=1)
    (node,) = (n for n in program.calls(aten.linear.default) if n.args[1].target == MATRIX)
    with program.graph.inserting_before(node):
        flipped = program.graph.call_function(aten.permute.default, (node.args[1], [1, 0]))
        product = program.graph.call_function(aten.matmul.default, (node.args[0], flipped))
    weight = node.args[1].meta["type"]
    flipped.meta = {**node.meta, "type": TensorType(weight.dtype, weight.shape[::-1])}
    product.meta = dict(node.meta)
    node.replace_all_uses_with(product)
    program.graph.erase_node(node)
    folder = export_onnx(program, tmp_path / "out", INT4)
    nodes = load(folder).graph.node
    assert [n.op_type for n in nodes].count("MatMulNBits") == 7 + 1
    ids = token_ids(program, 1, 5)
    found = OnnxSession(folder, threads=1).prefill(ids)
    exact = OptimizedModel(unpacked_program(program)).new_session(1).prefill(ids)
    assert (found - exact).abs().max() < 0.02 * exact.abs().max()
