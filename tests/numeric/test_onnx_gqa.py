"""L3 packages: one GroupQueryAttention a layer, with the bytes and logits of the eager lowering."""

from __future__ import annotations

import dataclasses
from collections import Counter

import onnx
import pytest
import torch
from cached import cached_program, defined_logits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from programs import apply, token_ids

from kvxform.codegen.onnx import export_onnx
from kvxform.codegen.onnx.forms import OnnxOptions
from kvxform.errors import CodegenError
from kvxform.passes.base.fuse_projections import FuseProjections
from kvxform.passes.quantize.quantize_kv import QuantizeKv
from kvxform.passes.rotation.rotate_qk import RotateQk
from kvxform.runtime.model import OptimizedModel
from kvxform.runtime.onnx_session import OnnxSession

CONTEXT, HEADS, HEAD_DIM = 64, 2, 16
TOLERANCE = 2e-5


def static_int(bits, axis, seed=0):
    generator = torch.Generator().manual_seed(seed)
    count = 1 if axis == "tensor" else HEADS * HEAD_DIM
    step = 0.02 if bits == 8 else 0.3
    scale = step * (1 + torch.rand(count, generator=generator))
    return {"codec": "static-int", "bits": bits, "axis": axis, "scale": tuple(scale.tolist())}


def make_program(codec=None, **model):
    quantize = {"key": codec, "value": codec} if codec else None
    program = cached_program(quantize, dtype=torch.float32, **model)
    program.info = dataclasses.replace(program.info, context_length=CONTEXT)
    return program


def run_nodes(graph, branch):
    """Yield the nodes that run if every `If` takes a branch."""
    for node in graph.node:
        chosen = [a.g for a in node.attribute if a.name == branch]
        yield from (n for g in chosen for n in run_nodes(g, branch)) if chosen else (node,)


class Package:
    """An exported program with its graph."""

    def __init__(self, program, folder, **options):
        self.program = program
        self.folder = export_onnx(program, folder, OnnxOptions(level="L3", **options))
        graph = onnx.load(self.folder / "model.onnx", load_external_data=False).graph
        self.nodes = list(run_nodes(graph, "then_branch"))
        self.ops = Counter(node.op_type for node in self.nodes)
        self.prompt_ops = Counter(node.op_type for node in run_nodes(graph, "else_branch"))

    def attributes(self):
        node = next(n for n in self.nodes if n.op_type == "GroupQueryAttention")
        return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}, node.input

    def check(self, lengths=(9, 6), steps=3, tolerance=TOLERANCE):
        """Compare ragged prompts and decode steps with the eager lowering; return the sessions."""
        session = OnnxSession(self.folder, threads=1)
        model = OptimizedModel(self.program)
        eager = model.new_session(max_batch_size=len(lengths), max_seq_len=CONTEXT)
        ids = token_ids(self.program, len(lengths), max(lengths))
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        pairs = [(session.prefill(ids, mask), eager.prefill(ids, mask))]
        for step in range(steps):
            tokens = torch.arange(len(lengths)) + step
            pairs.append((session.decode(tokens), eager.decode(tokens)))
        for found, wanted in pairs:
            torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)
        return session, eager


@pytest.mark.parametrize(
    ("bits", "axis"), [(8, "tensor"), (8, "channel"), (4, "tensor"), (4, "channel")]
)
def test_bytes_are_those_of_the_eager_cache(tmp_path, bits, axis):
    package = Package(make_program(static_int(bits, axis)), tmp_path / "p")
    assert package.ops["GroupQueryAttention"] == 2
    attributes, _ = package.attributes()
    granularity = b"PER_TENSOR" if axis == "tensor" else b"PER_CHANNEL"
    assert attributes["kv_cache_bit_width"] == bits
    assert (attributes["k_quant_type"], attributes["v_quant_type"]) == (granularity,) * 2
    session, eager = package.check()
    planes, lengths = session.cache_planes(), session.sequence_lengths()
    for layer in range(2):
        stored = eager.stored_planes(layer)
        for row, length in enumerate(lengths):
            for stream in ("key", "value"):
                found = planes[f"past_key_values.{layer}.{stream}_codes"][row, :, :length]
                assert torch.equal(found, stored[row][stream]["codes"])


def test_prompts_over_codes_have_a_branch_for_floats(tmp_path):
    """Where the operator has codes, and every operation is there; else it stands alone."""
    coded = static_int(4, "channel")
    package = Package(make_program(coded), tmp_path / "p")
    graph = onnx.load(package.folder / "model.onnx", load_external_data=False).graph
    assert Counter(n.op_type for n in graph.node)["If"] == 2
    assert package.prompt_ops["TensorScatter"] == 4
    (floats, *_) = [n for n in run_nodes(graph, "else_branch") if "Group" in n.op_type]
    assert not {a.name for a in floats.attribute} & {"kv_cache_bit_width", "do_rotary"}
    older = OnnxOptions(level="L3", opset=23)
    half = cached_program({"key": coded, "value": coded}, dtype=torch.float16)
    for name, program, options in (
        ("exact", make_program(), OnnxOptions(level="L3")),
        ("older", make_program(coded), older),
        ("half", half, OnnxOptions(level="L3")),
        ("cuda", half, OnnxOptions(level="L3", provider="cuda")),
    ):
        folder = export_onnx(program, tmp_path / name, options)
        nodes = onnx.load(folder / "model.onnx", load_external_data=False).graph.node
        assert "If" not in {n.op_type for n in nodes}, name


def test_logits_are_those_by_definition(tmp_path):
    program = make_program(static_int(4, "channel"))
    session = OnnxSession(Package(program, tmp_path / "p").folder, threads=1)
    ids = token_ids(program, 1, 11)
    found = session.prefill(ids[:, :7], all_logits=True)[0]
    rest = [session.decode(ids[:, t])[0] for t in range(7, 11)]
    wanted = defined_logits(program, ids[0])
    torch.testing.assert_close(torch.cat([found, torch.stack(rest)]), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "model",
    [
        {"attention": {"window": 4}},
        {"attention": {"softcap": 5.0}},
        {"attention": {"sink_logits": torch.tensor([0.5, -1.0, 2.0, 0.0])}},
        {"interleaved": True},
        {"rotary_dim": 0},
        {"rotary_dim": 8},
        {"tied": True},
        {"kv_heads": 4, "bias": True},
    ],
    ids=lambda model: next(iter(model)),
)
def test_options_of_attention(tmp_path, model):
    package = Package(make_program(**model), tmp_path / "p")
    attributes, inputs = package.attributes()
    options = model.get("attention", {})
    assert attributes.get("local_window_size") == options.get("window")
    assert attributes.get("softcap") == options.get("softcap")
    assert bool(len(inputs) > 11 and inputs[11]) == ("sink_logits" in options)
    turns = model.get("rotary_dim", HEAD_DIM) == HEAD_DIM
    assert attributes.get("do_rotary", 0) == turns
    assert package.ops["RotaryEmbedding"] == (4 if model.get("rotary_dim") == 8 else 0)
    package.check(tolerance=1e-4 if model.get("tied") else TOLERANCE)


def test_one_product_for_queries_keys_and_values(tmp_path):
    program, _ = apply(FuseProjections(), make_program(static_int(8, "tensor"), bias=True))
    package = Package(program, tmp_path / "p")
    _, inputs = package.attributes()
    assert inputs[1:3] == ["", ""]
    assert package.ops["MatMul"] == 2 * 4 + 1  # qkv, o, gate and up, down; the head
    assert not package.ops["Transpose"]
    package.check()


@pytest.mark.parametrize(("axis", "center"), [("tensor", False), ("channel", True)])
def test_what_follows_rope_is_done_to_rows(tmp_path, axis, center):
    """A rotation, and means that are taken away, stay outside; no heads are moved for them."""
    program, _ = apply(RotateQk(), make_program())
    codec = static_int(4, axis)
    if center:
        codec |= {"center": True, "offset": tuple(0.1 * (i % 5) for i in range(32))}
    program, _ = apply(QuantizeKv(key=codec, value=codec), program)
    package = Package(program, tmp_path / "p")
    attributes, _ = package.attributes()
    assert "do_rotary" not in attributes
    assert attributes["k_quant_type"] == f"PER_{axis.upper()}".encode()
    assert package.ops["MatMul"] == 2 * 9 + 1  # seven weights and two rotations a layer; the head
    assert package.ops["RotaryEmbedding"] == 4
    assert package.ops["Transpose"] == 0
    assert package.ops["Add"] == (2 if center else 0)
    package.check()


def test_without_a_limit_of_the_context_there_is_no_table(tmp_path):
    program = cached_program(dtype=torch.float32)
    package = Package(program, tmp_path / "p")
    assert package.ops["RotaryEmbedding"] == 4
    package.check()


def test_sums_and_norms_are_one_node(tmp_path):
    """The first norm has no sum before it; every Add of two rows has a norm after it."""
    package = Package(make_program(), tmp_path / "p")
    assert package.ops["SkipSimplifiedLayerNormalization"] == 4
    assert package.ops["RMSNormalization"] == 1
    assert not package.ops["Add"]


@pytest.mark.parametrize("level", ["L1", "L3"])
def test_last_logits_are_worked_out_alone(tmp_path, level):
    program = make_program()
    folder = export_onnx(program, tmp_path / "p", OnnxOptions(level=level, logits="last"))
    package = Package.__new__(Package)
    package.program, package.folder = program, folder
    session, _ = package.check()
    ids = token_ids(program, 2, 4, seed=1)
    more = session.prefill(ids)
    assert more.shape == (2, program.info.vocab_size)
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    ops = [node.op_type for node in graph.node]
    assert ops.index("GatherND") < len(ops) - 1 - ops[::-1].index("MatMul")
    assert graph.output[0].type.tensor_type.shape.dim[1].dim_value == 1


@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    more=st.lists(st.integers(1, 5), min_size=3, max_size=3),
    chunk=st.none() | st.integers(1, 5),
)
def test_ragged_prompts_that_go_on(shared_package, lengths, more, chunk):
    session, eager = shared_package.check(lengths, steps=1)
    counts = torch.tensor(more[: len(lengths)])
    ids = token_ids(shared_package.program, len(lengths), int(counts.max()), seed=3)
    mask = (torch.arange(ids.shape[1]) < counts[:, None]).long()
    found = session.prefill(ids, mask, chunk_size=chunk)
    torch.testing.assert_close(found, eager.prefill(ids, mask), rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def shared_package(tmp_path_factory):
    return Package(make_program(static_int(8, "channel")), tmp_path_factory.mktemp("gqa") / "p")


def test_streams_of_two_widths_are_refused(tmp_path):
    program = cached_program(
        {"key": static_int(8, "tensor"), "value": static_int(4, "tensor")}, dtype=torch.float32
    )
    with pytest.raises(CodegenError, match=r"KVX403.*one dtype"):
        export_onnx(program, tmp_path / "p", OnnxOptions(level="L3"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("codec", [None, (8, "tensor"), (8, "channel"), (4, "tensor")])
def test_every_form_with_long_prompts(tmp_path, dtype, codec):
    """Prompts of more tokens than one run takes."""
    program = make_program(static_int(*codec) if codec else None)
    if dtype is torch.float16:
        quantize = {"key": static_int(*codec), "value": static_int(*codec)} if codec else None
        program = cached_program(quantize, dtype=dtype)
    program.info = dataclasses.replace(program.info, context_length=1024)
    package = Package(program, tmp_path / "p", logits="last")
    session = OnnxSession(package.folder, threads=1)
    eager = OptimizedModel(program).new_session(max_batch_size=2, max_seq_len=1024)
    ids = token_ids(program, 2, 300)
    found, wanted = session.prefill(ids), eager.prefill(ids)
    atol = 1e-4 if dtype is torch.float32 else 5e-2
    torch.testing.assert_close(found.float(), wanted.float(), rtol=0, atol=atol)
