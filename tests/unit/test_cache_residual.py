"""cache-residual, xcache: what K and V are made from is cached where it is narrower."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from families import ALL
from programs import apply, fired, gpt2_program, llama_program, reasons, run, token_ids

import kvxform
import kvxform.ir.ops as kvx
from kvxform.capture import capture
from kvxform.codegen.onnx.capability import check_program as check_onnx
from kvxform.codegen.triton.capability import check_plan as check_triton
from kvxform.errors import CodegenError, PassError
from kvxform.ir.artifact import load_program, save_program
from kvxform.ir.program import Program
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.passes.base.simplify import Simplify
from kvxform.passes.memory.page_cache import PageCache
from kvxform.passes.quantize.quantize_kv import QuantizeKv
from kvxform.passes.rotation.rotate_qk import RotateQk
from kvxform.passes.structure.cache_prerope import CachePrerope
from kvxform.passes.structure.cache_residual import CacheResidual
from kvxform.runtime.model import OptimizedModel
from kvxform.verify.prober import Prober

INT8 = {"codec": "int", "bits": 8}
MORE = ("phi", "gpt_neox", "gptj", "opt", "bloom")
FAMILIES = [  # all MHA: fused QKV with biases, no RoPE; RoPE on a part with biases; and more
    "gpt2",
    *(pytest.param(name, marks=pytest.mark.slow) for name in MORE),
]


@functools.cache
def captured(family: str) -> Program:
    return capture(ALL[family].build(torch.float64)).program


def cached(program: Program) -> Program:
    return apply(InsertCache(), program)[0]


def mha(**options: Any) -> Program:
    program = llama_program(kv_heads=4, bias=True, **options)
    program.info = dataclasses.replace(program.info, context_length=None)
    return program


def rebuilt(program: Program) -> Program:
    rewritten, found = apply(CacheResidual("xcache"), cached(program))
    assert fired(found) == len(program.sites)
    return rewritten


@pytest.mark.parametrize("family", FAMILIES)
def test_families_with_as_many_kv_heads_give_the_source(family):
    source = captured(family)
    program = rebuilt(source)
    ids = token_ids(source, tokens=14)
    expected = run(source, ids)
    model = OptimizedModel(program)
    torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-8)
    session = model.new_session(max_batch_size=2, max_seq_len=16)
    session.prefill(ids[:, :7], chunk_size=3)
    for t in range(7, 14):
        torch.testing.assert_close(session.decode(ids[:, t]), expected[:, t], rtol=0, atol=1e-8)
    whole, site = cached(source).plan, source.sites[0]
    width = program.sites[0].residual.width
    share = width / (site.num_kv_heads * (site.head_dim + site.v_head_dim))
    assert program.plan.bytes_per_token == share * whole.bytes_per_token
    assert session.cache_bytes() == program.plan.bytes_at([14, 14], 16)


def test_one_vector_is_appended_and_nothing_makes_k_and_v():
    program = rebuilt(mha(layers=1))
    append, attention = program.append_node(0), program.attention_node(0)
    assert append.args[0].meta["type"].shape == ("B", 1, "S", 32)
    assert append.args[1] is None
    assert len(list(program.calls(kvx.ROPE))) == 1  # that of q
    assert {"key_basis", "value_basis", "key_bias", "inv_freq"} <= set(attention.kwargs)
    assert not any(".attn.k." in name or ".attn.v." in name for name in program.weights)


@pytest.mark.parametrize(
    "regions", [None, pytest.param({"sink": 2, "recent": 5}, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("make", [mha, pytest.param(gpt2_program, marks=pytest.mark.slow)])
def test_the_state_is_right_after_every_step(make, regions):
    source = make(layers=1)
    program, _ = apply(PageCache(16), rebuilt(source))
    if regions is not None:
        program, _ = apply(QuantizeKv(INT8, None, regions=regions), program)
        program, _ = apply(Simplify(), program)
    checks = Prober(source, OptimizedModel, program.plan).check_full(program)
    assert all(check.is_lossy == (regions is not None) for check in checks)


def test_grouped_heads_are_refused_with_the_arithmetic():
    found = CacheResidual("xcache").match(cached(llama_program(kv_heads=1)))
    because = "what K and V are made from has 32 channels, they have 32 (1 heads of 16 + 16)"
    assert reasons(found) == [because] * 2
    narrow = CacheResidual("xcache").match(cached(llama_program(kv_heads=2)))
    assert fired(narrow) == 2  # a near miss: 32 of 64


def test_layers_choose_for_themselves():
    program = cached(mha())
    first, second = program.sites
    program.sites = (first, dataclasses.replace(second, k=None))
    mixed, found = apply(CacheResidual("xcache"), program)
    assert reasons(found) == ["keys or values are not made by a plain linear layer alone"]
    assert [site.payload for site in mixed.plan.sites] == ["residual", "kv"]
    ids = token_ids(program, tokens=9)
    expected = run(mha(), ids)
    torch.testing.assert_close(OptimizedModel(mixed)(ids), expected, rtol=0, atol=1e-9)


def test_other_bases_are_refused_before_and_after():
    turned, _ = apply(RotateQk(), cached(mha()))
    assert set(reasons(CacheResidual("xcache").match(turned))) == {
        "keys or values are in another basis"
    }
    with pytest.raises(PassError, match="must stay in the basis of the model"):
        apply(RotateQk(), rebuilt(mha()))
    before, _ = apply(CachePrerope(), cached(mha()))
    assert set(reasons(CacheResidual("xcache").match(before))) == {
        "keys are already cached before RoPE"
    }
    again = CacheResidual("xcache").match(rebuilt(mha()))
    assert set(reasons(again)) == {"what K and V are made from is already cached"}


def test_what_makes_heads_is_saved_and_checked(tmp_path):
    program = rebuilt(mha())
    save_program(program, tmp_path)
    loaded = load_program(tmp_path)
    assert loaded.sites == program.sites
    assert loaded.plan == program.plan
    node = program.attention_node(0)
    node.kwargs = {name: x for name, x in node.kwargs.items() if name != "key_bias"}
    with pytest.raises(PassError, match="key_bias must be that of what is cached"):
        kvxform.ir.verify.verify_program(program)


def test_other_lowerings_refuse_it():
    program = rebuilt(llama_program(kv_heads=4, dtype=torch.float32))
    with pytest.raises(CodegenError, match="payload must be"):
        check_onnx(program)
    with pytest.raises(CodegenError, match="payload must be"):
        check_triton(program.plan)


def test_a_recipe_goes_through_with_a_codec():
    passes = [
        "insert-cache",
        {"cache-residual": {"mode": "xcache"}},
        "page-cache",
        {"quantize-kv": {"key": INT8, "value": None}},
    ]
    model = kvxform.optimize(
        ALL["gpt2"].build(torch.float32), {"version": 1, "name": "t", "passes": passes}
    )
    assert [site.payload for site in model.plan.sites] == ["residual"] * 2
    assert model.report.final.kl < 0.01
