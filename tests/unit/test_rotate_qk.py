"""rotate-qk: where the rotations stand, what the cache holds, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import DenseCache, apply, fired, gpt2_program, llama_program, reasons, run, token_ids

import kvxform.ir.ops as kvx
from kvxform.codecs.basis import Basis
from kvxform.errors import PassError, RecipeError
from kvxform.ir.cache import make_handle
from kvxform.ir.program import default_positions
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.passes.rotation.rotate_qk import RotateQk


@pytest.mark.parametrize("make", [llama_program, gpt2_program])
@pytest.mark.parametrize("cache_first", [False, True])
@pytest.mark.parametrize("basis", [Basis("hadamard", 16), Basis("hadamard", 8, seed=3)])
def test_stored_keys_are_rotated_after_rope(make, cache_first, basis):
    program = make()
    ids = token_ids(program)
    plain, _ = apply(InsertCache(), program)
    rotate, insert = RotateQk(basis.block, basis.seed), InsertCache()
    rotated = program
    for graph_pass in (insert, rotate) if cache_first else (rotate, insert):
        rotated, found = apply(graph_pass, rotated)
        assert fired(found) == 2
    assert [site.key.basis for site in rotated.plan.sites] == [basis, basis]
    assert [site.value.basis for site in rotated.plan.sites] == [Basis(), Basis()]
    stored = []
    for each in (plain, rotated):
        cache = DenseCache()
        each.to_module()(ids, default_positions(ids), make_handle(cache))
        stored.append(cache.stored)
    for layer, (k, v) in stored[0].items():
        new_k, new_v = stored[1][layer]
        torch.testing.assert_close(new_k, k @ basis.matrix(16), rtol=0, atol=1e-11)
        assert float((new_k - k).abs().max()) > 0.01
        torch.testing.assert_close(new_v, v, rtol=0, atol=1e-11)


def test_one_rotation_on_the_query_and_one_on_the_new_key():
    program, _ = apply(InsertCache(), llama_program(layers=1))
    rotated, _ = apply(RotateQk(), program)
    on_q, on_k = rotated.attention_node(0).args[0], rotated.append_node(0).args[0]
    assert {on_q, on_k} == set(rotated.calls(kvx.HADAMARD))
    assert on_q.args[0].target is on_k.args[0].target is kvx.ROPE
    assert str(on_k.meta["type"]) == "f64[B, 2, S, 16]"


def test_signs_are_one_weight_for_all_layers():
    rotated, _ = apply(RotateQk(seed=5), llama_program())
    names = [name for name in rotated.weights if "signs" in name]
    assert names == ["rotate_qk.signs_16_5"]
    assert set(rotated.weights[names[0]].tolist()) == {-1.0, 1.0}
    assert len({n.kwargs["signs"].target for n in rotated.calls(kvx.HADAMARD)}) == 1


@settings(deadline=None, max_examples=12)
@given(
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    head_dim=st.sampled_from([4, 6, 12, 16]),
    seed=st.none() | st.integers(0, 9),
    tokens=st.integers(1, 9),
)
def test_logits_stay_for_all_head_counts_and_sizes(kv_heads, groups, head_dim, seed, tokens):
    program = llama_program(layers=1, heads=kv_heads * groups, kv_heads=kv_heads, head_dim=head_dim)
    ids = token_ids(program, tokens=tokens)
    rotated, found = apply(RotateQk(seed=seed), program)
    assert fired(found) == 1
    torch.testing.assert_close(run(rotated, ids), run(program, ids), rtol=0, atol=1e-12)


def test_rotations_do_not_stack():
    once, _ = apply(RotateQk(block=4), llama_program(layers=1))
    _, found = apply(RotateQk(block=4, seed=1), once)
    assert reasons(found) == ["keys are in basis hadamard(4), and rotations do not stack"]
    assert not found[0].done


def test_quantised_keys_are_refused_in_words():
    by_fact = {requirement.fact: requirement for requirement in RotateQk.requires}
    facts = llama_program().facts
    assert all(requirement.is_met(facts) for requirement in by_fact.values())
    assert not by_fact["k.codec"].is_met(facts.with_(k__codec="int"))
    assert not by_fact["k.rope"].is_met(facts.with_(k__rope="pre"))
    assert by_fact["k.codec"].because == (
        "key scales would be fitted before rotate-qk changes the basis of K"
    )


def test_a_block_that_does_not_divide_head_dim_is_refused_with_the_layer():
    with pytest.raises(PassError, match=r"KVX204 \[rotate-qk\].*got 64 at layers.0.attn"):
        RotateQk(block=64).match(llama_program())


def test_a_block_that_is_no_power_of_two_is_refused():
    with pytest.raises(RecipeError, match=r"KVX107 \[rotate-qk\] block must be a power of two"):
        RotateQk(block=6)
