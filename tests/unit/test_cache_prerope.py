"""cache-prerope: keys are stored before RoPE and turned when they are read, and nothing changes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from cached import cached_program
from families import ALL
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import (
    DenseCache,
    apply,
    fired,
    gpt2_program,
    latent_program,
    llama_program,
    reasons,
    run,
    token_ids,
)
from torch import Tensor

import kvxform.ir.ops as kvx
from kvxform.capture import capture
from kvxform.codecs.hadamard import hadamard_matrix
from kvxform.errors import CodegenError, PassError, VerifyError
from kvxform.ir.cache import make_handle
from kvxform.ir.program import Program, default_positions
from kvxform.ir.rotary import KeyRead
from kvxform.ir.stream_plan import ReadForm
from kvxform.ir.types import TensorType
from kvxform.ir.verify import verify_program
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.passes.base.simplify import Simplify
from kvxform.passes.quantize.quantize_kv import QuantizeKv
from kvxform.passes.rotation.rotate_qk import RotateQk
from kvxform.passes.structure.cache_latent import CacheLatent
from kvxform.passes.structure.cache_prerope import CachePrerope
from kvxform.runtime.model import OptimizedModel
from kvxform.verify.prober import Prober

Table = tuple[Tensor, Tensor]
make_table = KeyRead.table
INT4 = {"codec": "int", "bits": 4}


def prerope(program: Program) -> Program:
    cached, _ = apply(InsertCache(), program)
    before, found = apply(CachePrerope(), cached)
    assert fired(found) == len(program.sites)
    return before


def test_the_cache_holds_what_goes_into_rope():
    program = llama_program()
    ids, stored = token_ids(program), []
    for each in (apply(InsertCache(), program)[0], prerope(program)):
        cache = DenseCache()
        each.to_module()(ids, default_positions(ids), make_handle(cache))
        stored.append(cache.stored)
    frequencies = program.weights["inv_freq"]
    for layer, (k, v) in stored[0].items():
        before, same_v = stored[1][layer]
        turned = kvx.rope(before, default_positions(ids), frequencies, rotary_dim=16)
        torch.testing.assert_close(turned, k, rtol=0, atol=1e-12)
        assert float((before - k).abs().max()) > 0.01
        torch.testing.assert_close(same_v, v, rtol=0, atol=1e-12)


def test_keys_are_not_turned_on_their_way_in():
    program = prerope(llama_program())
    assert all(program.append_node(i).args[0].target is not kvx.ROPE for i in range(2))
    assert len(list(program.calls(kvx.ROPE))) == 2  # those of q
    assert [site.key.rope for site in program.plan.sites] == ["pre", "pre"]


@pytest.mark.parametrize("kind", ["half", "partial", "interleaved", "normed"])
def test_logits_stay_in_sessions(kind):
    program = variant(kind)
    ids = token_ids(program, tokens=24)
    expected = run(program, ids)
    assert relative(expected, run(llama_program(), ids)) > 1e-3 or kind == "half"
    check_session(OptimizedModel(prerope(program)), ids, expected)


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a share of the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max())


def check_session(model: OptimizedModel, ids: Tensor, expected: Tensor) -> None:
    assert relative(model(ids), expected) < 1e-8
    session = model.new_session(max_batch_size=2, max_seq_len=24)
    session.prefill(ids[:, :7], chunk_size=3)
    for t in range(7, 24):
        assert relative(session.decode(ids[:, t]), expected[:, t]) < 1e-8


def variant(kind: str) -> Program:
    """Return a toy model with RoPE of another kind, or with norms on q and k."""
    program = llama_program()
    changes = {"partial": {"rotary_dim": 8}, "interleaved": {"interleaved": True}}.get(kind, {})
    for node in program.calls(kvx.ROPE):
        node.kwargs = {**node.kwargs, **changes}
        if kind == "normed":
            x = node.args[0]
            with program.graph.inserting_before(node):
                norm = program.graph.call_function(kvx.RMS_NORM, (x, None, 1e-5))
            norm.meta = dict(x.meta)
            node.args = (norm, *node.args[1:])
    for site in program.sites:
        rope = dataclasses.replace(site.rope, **changes)
        program.sites = tuple(
            dataclasses.replace(s, rope=rope) if s is site else s for s in program.sites
        )
    if kind == "partial":
        program.weights["inv_freq"] = program.weights["inv_freq"][:4]
        for node in program.graph.nodes:
            if node.target == "inv_freq":
                node.meta["type"] = TensorType(torch.float64, (4,))
    verify_program(program)
    return program


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi", "cohere", "gptj"])
def test_logits_of_families_stay(family):
    """Plain, QK-norm, partial rotary, and interleaved pairs of whole and of partial heads."""
    model = ALL[family].build(torch.float64)
    program = prerope(capture(model).program)
    ids = torch.randint(0, program.info.vocab_size, (2, 24))
    with torch.no_grad():
        expected = model(ids).logits
    check_session(OptimizedModel(program), ids, expected)


@settings(deadline=None, max_examples=8)
@given(
    kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([4, 6, 16]),
    chunks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
)
def test_logits_stay_for_all_sizes_and_chunks(kv_heads, head_dim, chunks):
    program = llama_program(layers=1, heads=2 * kv_heads, kv_heads=kv_heads, head_dim=head_dim)
    ids = token_ids(program, tokens=sum(chunks))
    found = run(prerope(program), ids, chunks)
    torch.testing.assert_close(found, run(program, ids), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "regions",
    [
        {"sink": 2, "recent": 5},
        pytest.param(None, marks=pytest.mark.slow),
        pytest.param({"recent": 8, "flush": "block"}, marks=pytest.mark.slow),
    ],
)
def test_the_state_is_right_after_every_step(regions):
    """Ragged rows, chunks, reorders and page reuse, with codes and exact regions."""
    program = paged(regions)
    checks = Prober(llama_program(layers=1), OptimizedModel, program.plan).check_full(program)
    assert {"chunked prefill", "ragged batch", "batch reorder"} <= {c.schedule for c in checks}
    assert all(check.is_lossy == (regions is not None) for check in checks)


def test_keys_turned_by_other_positions_are_found(monkeypatch):
    def one_late(self: KeyRead, stored: Tensor, first: int, table: Table) -> Tensor:
        return apply_read(self, stored, 1, table) if stored.shape[-2] > 8 else stored

    program, apply_read = paged(None), KeyRead.apply
    prober = Prober(llama_program(layers=1), OptimizedModel, program.plan)
    monkeypatch.setattr(KeyRead, "table", lambda self, n, dtype: make_table(self, n + 1, dtype))
    monkeypatch.setattr(KeyRead, "apply", one_late)
    with pytest.raises(VerifyError, match="K and V handed"):
        prober.check_full(program)


def paged(regions: dict[str, Any] | None) -> Program:
    """Return a toy model that caches keys before RoPE, as codes if there are regions."""
    program, _ = apply(CachePrerope(), cached_program(layers=1))
    if regions is None:
        return program
    return apply(QuantizeKv(INT4, INT4, regions=regions), program)[0]


def test_heads_that_share_a_basis_are_unrotated_together():
    keys = torch.randn(2, 4, 5, 8, dtype=torch.float64)  # [B, Hk, T, D]
    basis = torch.stack([hadamard_matrix(16), torch.eye(16, dtype=torch.float64)])
    joined = keys.unflatten(1, (2, 2)).transpose(2, 3).flatten(-2)  # [B, Hk / 2, T, 2 D]
    stored = (joined @ basis.mT).unflatten(-1, (2, 8)).transpose(2, 3).flatten(1, 2)
    frequencies = torch.tensor([1.0, 0.1], dtype=torch.float64)
    read = KeyRead(frequencies, 4, basis=basis)
    positions = torch.arange(3, 8).expand(2, -1)
    expected = kvx.rope(keys, positions, frequencies, rotary_dim=4)
    found = read.apply(stored, 3, read.table(8, torch.float64))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_layers_without_rope_are_left_as_they_are():
    cached, _ = apply(InsertCache(), gpt2_program())
    same, found = apply(CachePrerope(), cached)
    assert fired(found) == 0
    assert reasons(found) == ["there is no RoPE"] * 2
    assert {site.key.rope for site in same.plan.sites} == {"none"}


def test_what_stands_between_rope_and_the_cache_is_a_near_miss():
    cached, _ = apply(InsertCache(), llama_program())
    rotated, _ = apply(RotateQk(), cached)
    found = CachePrerope().match(rotated)
    assert reasons(found) == ["keys are changed after RoPE"] * 2


def test_one_blocked_layer_blocks_all():
    cached, _ = apply(InsertCache(), llama_program())
    append = cached.append_node(1)
    with cached.graph.inserting_before(append):
        copy = cached.graph.call_function(torch.ops.aten.clone.default, (append.args[0],))
    copy.meta = dict(append.args[0].meta)
    append.args = (copy, *append.args[1:])
    found = CachePrerope().match(cached)
    assert reasons(found) == [
        "all layers cache keys before RoPE or none",
        "keys are changed after RoPE",
    ]


def test_latents_are_refused():
    latent, _ = apply(CacheLatent(), latent_program())
    cached, _ = apply(InsertCache(), latent)
    found = CachePrerope().match(cached)
    assert set(reasons(found)) == {"RoPE turns only a part of a latent"}


def test_scales_are_not_folded_before_rope():
    quantised, _ = apply(QuantizeKv(INT4, INT4), prerope(llama_program()))
    simple, _ = apply(Simplify(), quantised)
    for site in simple.plan.sites:
        assert (site.key.read.form, site.value.read.form) == ("element", "folded")
    key = dataclasses.replace(simple.plan.sites[0].key, read=ReadForm("folded"))
    simple.plan = simple.plan.replace_site(0, key=key)
    with pytest.raises(CodegenError, match="turned when it is read must be decoded"):
        OptimizedModel(simple)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"inv_freq": None}, "if and only if they are cached before RoPE"),
        ({"rotary_dim": 8}, "rotary_dim must be that of what is cached"),
        ({"interleaved": True}, "interleaved must be that of what is cached"),
    ],
)
def test_the_verifier_compares_attention_with_the_site(change, rule):
    program = prerope(llama_program())
    node = program.attention_node(1)
    node.kwargs = {**node.kwargs, **change}
    with pytest.raises(PassError, match=rule):
        verify_program(program)
