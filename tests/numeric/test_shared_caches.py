"""Programs after share-kv-layers in every lowering, and with what comes after it in a recipe."""

from __future__ import annotations

import onnx
import pytest
import torch
from checkpoints import write_llama
from equal_layers import equal_toy
from lowered import both
from onnx_tools import open_export
from programs import apply, llama_program, token_ids

import kvxform
from kvxform.codegen.triton.capability import check_program
from kvxform.codegen.triton.describe import bytes_per_token
from kvxform.codegen.triton.sites import kernel_specs
from kvxform.pass_base import GraphPass
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.passes.base.simplify import Simplify
from kvxform.passes.memory.page_cache import PageCache
from kvxform.passes.quantize.quantize_kv import QuantizeKv
from kvxform.passes.rotation.fuse_norms import FuseNorms
from kvxform.passes.rotation.rotate_qk import RotateQk
from kvxform.passes.rotation.rotate_v import RotateV
from kvxform.passes.structure.cache_prerope import CachePrerope
from kvxform.passes.structure.share_kv_layers import ShareKvLayers
from kvxform.runtime.model import OptimizedModel

INT4 = {"codec": "int", "bits": 4}
KV4 = (InsertCache(), PageCache(16), RotateQk(), QuantizeKv(INT4, INT4), Simplify())
LAYERS, OWNERS = 5, 3


def rewritten(*passes: GraphPass, **options):
    program = llama_program(layers=LAYERS, dtype=torch.float32, **options)
    for graph_pass in passes:
        program, _ = apply(graph_pass, program)
    return program


def test_bytes_fall_by_the_planned_factor_in_a_session_and_in_onnx(tmp_path):
    sizes, inputs = [], []
    for name, passes in (("all", KV4), ("owners", (ShareKvLayers(), *KV4))):
        program = rewritten(*passes)
        ids = token_ids(program, tokens=16)
        session = OptimizedModel(program).new_session(2, 32)
        session.prefill(ids)
        package = open_export(program, tmp_path / name)
        package.prefill(ids)
        model = onnx.load(tmp_path / name / "model.onnx", load_external_data=False)
        inputs.append(sum(x.name.startswith("past_key_values") for x in model.graph.input))
        sizes.append((program.plan.bytes_per_token, session.cache_bytes(), package.cache_bytes()))
        torch.testing.assert_close(
            package.decode(ids[:, 0]), session.decode(ids[:, 0]), rtol=0, atol=1e-4
        )
    assert [b * LAYERS for b in sizes[1]] == [a * OWNERS for a in sizes[0]]
    assert inputs[1] * LAYERS == inputs[0] * OWNERS


def test_kernels_append_for_owners_alone():
    counts = []
    for passes in (KV4, (ShareKvLayers(), *KV4)):
        program = rewritten(*passes, head_dim=64)
        check_program(program)
        kernels = kernel_specs(program)
        appends = [k.append for k in kernels.values() if k.append is not None]
        counts.append(sum(bytes_per_token(spec) for spec in appends))
        assert counts[-1] == program.plan.bytes_per_token
        assert [k.owner for k in kernels.values()] == [s.owner for s in program.plan.sites]
    assert counts[1] * LAYERS == counts[0] * OWNERS


@pytest.mark.slow
def test_triton_gives_what_eager_gives():
    program = rewritten(ShareKvLayers(), *KV4, head_dim=64)
    kernels, eager = both(program)
    ids = token_ids(program, tokens=11)
    sessions = [model.new_session(2, 32) for model in (kernels, eager)]
    got, expected = (session.prefill(ids) for session in sessions)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-4)
    got, expected = (session.decode(ids[:, 0]) for session in sessions)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-4)
    assert sessions[0].cache_bytes() == sessions[1].cache_bytes()


@pytest.mark.parametrize(
    "passes",
    [
        (FuseNorms(), RotateV(), InsertCache(), RotateQk()),
        (InsertCache(), CachePrerope()),
        (RotateV(), InsertCache(), PageCache(16), RotateQk(seed=1)),
    ],
    ids=["rotations", "before RoPE", "pages"],
)
def test_what_comes_after_is_as_exact_as_ever(passes):
    program = equal_toy(layers=3)
    expected = OptimizedModel(apply(InsertCache(), program)[0])(token_ids(program))
    for graph_pass in (ShareKvLayers(), *passes):
        program, _ = apply(graph_pass, program)
    logits = OptimizedModel(program)(token_ids(program))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-8)


@pytest.mark.slow
def test_structure_rotation_and_codec_in_one_recipe(tmp_path):
    recipe = {
        "version": 1,
        "name": "t",
        "passes": [
            {"share-kv-layers": {"planner": "search", "threshold": -1.0, "share": 0.5}},
            "fuse-norms",
            "rotate-v",
            "insert-cache",
            {"page-cache": {"page_size": 16}},
            "rotate-qk",
            {"quantize-kv": {"key": INT4, "value": INT4}},
            "simplify",
        ],
        "calibration": {"tokens": 256, "window": 64},
    }
    model = write_llama(tmp_path / "model")
    with pytest.warns(UserWarning, match="what share-kv-layers changed should be trained"):
        optimized = kvxform.optimize(str(model), recipe)
    (record,) = (p for p in optimized.report.passes if p.name == "share-kv-layers")
    assert record.notes == (("layer 1 reads the cache of layer 0", 1),)
    assert [loss.stream for loss in record.losses] == ["key", "value"]
    assert all(loss.error > 0.1 for loss in record.losses)
    layers = [
        name.removeprefix("model.layers.").partition(".") for name in optimized.program.touched
    ]
    assert sorted((layer, name.partition(".")[2]) for layer, _, name in layers) == [
        ("0", "k_proj.weight"),
        ("0", "v_proj.weight"),
        ("1", "o_proj.weight"),
        ("1", "q_proj.weight"),
    ]
