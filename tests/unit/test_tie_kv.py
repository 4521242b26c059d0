"""tie-kv: one tensor serves as keys and values; exact where their weights are equal."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from families import ALL
from programs import (
    apply,
    fired,
    gpt2_program,
    latent_program,
    llama_program,
    reasons,
    run,
    token_ids,
)
from still_layers import equal_keys_and_values

import kvxform
from kvxform.capture import capture
from kvxform.codegen.onnx import export_onnx
from kvxform.codegen.triton.capability import check_plan as check_triton
from kvxform.errors import CodegenError, PassError, RecipeError
from kvxform.ir.program import Program
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.passes.quantize.quantize_kv import QuantizeKv
from kvxform.passes.rotation.rotate_qk import RotateQk
from kvxform.passes.structure.cache_prerope import CachePrerope
from kvxform.passes.structure.tie_kv import TieKv
from kvxform.pipeline import plan_pipeline
from kvxform.recipe import load_recipe
from kvxform.runtime.model import OptimizedModel
from kvxform.runtime.onnx_session import OnnxSession
from kvxform.verify.prober import Prober

INT8 = {"codec": "int", "bits": 8}
FAMILIES = [  # biases with grouped heads, MHA with fused QKV; plain, MHA with partial RoPE
    "qwen2",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "llama", "phi")),
]


@functools.cache
def captured(family: str) -> Program:
    return capture(ALL[family].build(torch.float64)).program


def tied(program: Program) -> Program:
    rewritten, found = apply(TieKv(), program)
    assert fired(found) == len(program.sites)
    return rewritten


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_weights_give_the_source_at_half_the_bytes(family):
    source = equal_keys_and_values(captured(family))
    found = TieKv().match(source)
    assert {f.note for f in found} == {"keys and values have equal weights, nothing is lost"}
    plain, _ = apply(InsertCache(), source)
    program, _ = apply(InsertCache(), tied(source))
    assert program.touched == {}
    ids = token_ids(source, tokens=12)
    expected = run(source, ids)
    model = OptimizedModel(program)
    torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-9)
    session = model.new_session(max_batch_size=2, max_seq_len=16)
    session.prefill(ids[:, :7], chunk_size=3)
    for t in range(7, 12):
        torch.testing.assert_close(session.decode(ids[:, t]), expected[:, t], rtol=0, atol=1e-9)
    assert program.plan.bytes_per_token == plain.plan.bytes_per_token / 2
    assert session.cache_bytes() == plain.plan.bytes_at([12, 12], 16) / 2


def test_other_weights_are_averaged():
    source = llama_program(bias=True)
    program = tied(source)
    for i in range(2):
        for kind in ("weight", "bias"):
            k, v = (source.weights[f"layers.{i}.attn.{n}.{kind}"] for n in "kv")
            got = program.weights[f"layers.{i}.attn.k.{kind}"]
            torch.testing.assert_close(got, (k + v) / 2, rtol=0, atol=1e-15)
            assert f"layers.{i}.attn.v.{kind}" not in program.weights
    assert all("train before use" in f.note for f in TieKv().match(source))
    ids = token_ids(source)
    assert float((run(program, ids) - run(source, ids)).abs().max()) > 0.1


def test_fused_projections_keep_q():
    source = gpt2_program(layers=1)
    name = source.sites[0].k.weight
    before, after = source.weights[name], tied(source).weights[name]
    assert torch.equal(after[:, :32], before[:, :32])
    torch.testing.assert_close(after[:, 32:64], (before[:, 32:64] + before[:, 64:]) / 2)


def test_what_is_read_as_a_value_is_not_turned():
    program, _ = apply(InsertCache(), tied(llama_program()))
    for site in program.plan.sites:
        assert (site.payload, site.key.rope, list(site.streams)) == ("k", "pre", ["key"])
        assert program.append_node(site.layer).args[1] is None
    again = CachePrerope().match(program)
    assert set(reasons(again)) == {"keys are already cached before RoPE"}
    assert set(reasons(TieKv().match(program))) == {"values are already the keys"}


@pytest.mark.parametrize("codec", [None, pytest.param(INT8, marks=pytest.mark.slow)])
def test_the_state_is_right_after_every_step(codec):
    source = tied(llama_program(layers=1))
    source.info = dataclasses.replace(source.info, context_length=None)
    program, _ = apply(InsertCache(), source)
    if codec is not None:
        program, _ = apply(QuantizeKv(codec, None, regions={"sink": 2, "recent": 5}), program)
    checks = Prober(source, OptimizedModel, program.plan).check_full(program)
    assert len(checks) > 5


@pytest.mark.slow
def test_packages_run(tmp_path):
    source = equal_keys_and_values(llama_program(dtype=torch.float32))
    program, _ = apply(InsertCache(), tied(source))
    session = OnnxSession(export_onnx(program, tmp_path / "p"))
    ids = token_ids(source, tokens=10)
    expected = run(source, ids)
    session.prefill(ids[:, :6])
    for t in range(6, 10):
        got = torch.as_tensor(session.decode(ids[:, t]))
        torch.testing.assert_close(got, expected[:, t], rtol=0, atol=1e-4)


def test_kernels_refuse_it():
    program, _ = apply(InsertCache(), tied(llama_program(dtype=torch.float32)))
    with pytest.raises(CodegenError, match="payload must be"):
        check_triton(program.plan)


def test_norms_of_keys_are_a_near_miss():
    found = TieKv().match(captured("qwen3"))
    assert set(reasons(found)) == {"keys or values are not made by a plain linear layer alone"}


def test_what_cannot_be_tied_is_refused():
    latent = TieKv().match(latent_program())
    assert set(reasons(latent)) == {"keys and values are made from a latent"}
    program = llama_program()
    own, other = program.sites
    program.sites = (own, dataclasses.replace(other, v=None))
    assert reasons(TieKv().match(program)) == [
        "keys of all layers are tied to values or none",
        "keys or values are not made by a plain linear layer alone",
    ]
    with pytest.raises(PassError, match="stay in the basis of the model"):
        apply(RotateQk(), tied(gpt2_program()))


def test_an_illegal_order_is_refused_in_words():
    passes = ["rotate-v", "tie-kv", "insert-cache"]
    recipe = load_recipe({"version": 1, "name": "t", "passes": passes})
    with pytest.raises(RecipeError, match="keys cannot follow a basis of values"):
        plan_pipeline(llama_program(), recipe)


def test_a_recipe_goes_through_with_a_codec():
    passes = ["tie-kv", "insert-cache", "page-cache", {"quantize-kv": {"key": INT8, "value": None}}]
    model = kvxform.optimize(
        ALL["llama"].build(torch.float32), {"version": 1, "name": "t", "passes": passes}
    )
    assert model.program.touched
    assert [site.payload for site in model.plan.sites] == ["k", "k"]
