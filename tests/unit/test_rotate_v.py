"""rotate-v: what the cache holds is V R, and what blocks the fold."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import DenseCache, apply, fired, gpt2_program, llama_program, reasons, run, token_ids

from kvxform.codecs.basis import Basis
from kvxform.errors import PassError, RecipeError
from kvxform.ir.cache import make_handle
from kvxform.ir.program import default_positions
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.passes.rotation.rotate_v import RotateV


def cached(program, ids):
    """Return K and V per layer after one prefill."""
    program, _ = apply(InsertCache(), program)
    cache = DenseCache()
    program.to_module()(ids, default_positions(ids), make_handle(cache))
    return cache.stored


@pytest.mark.parametrize("make", [lambda: llama_program(bias=True), gpt2_program])
@pytest.mark.parametrize("basis", [Basis("hadamard", 16), Basis("hadamard", 4, seed=7)])
def test_stored_values_are_rotated_and_keys_are_not(make, basis):
    program = make()
    ids = token_ids(program)
    rotated, found = apply(RotateV(basis.block, basis.seed), program)
    assert fired(found) == 2
    assert [site.v_basis for site in rotated.sites] == [basis, basis]
    matrix = basis.matrix(16)
    before, after = cached(program, ids), cached(rotated, ids)
    for layer in before:
        (k, v), (new_k, new_v) = before[layer], after[layer]
        torch.testing.assert_close(new_v, v @ matrix, rtol=0, atol=1e-11)
        assert float((new_v - v).abs().max()) > 0.01
        torch.testing.assert_close(new_k, k, rtol=0, atol=1e-11)


@settings(deadline=None, max_examples=12)
@given(
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    head_dim=st.sampled_from([4, 6, 12, 16]),
    seed=st.none() | st.integers(0, 9),
    bias=st.booleans(),
)
def test_logits_stay_for_all_head_counts_and_sizes(kv_heads, groups, head_dim, seed, bias):
    program = llama_program(
        layers=1, heads=kv_heads * groups, kv_heads=kv_heads, head_dim=head_dim, bias=bias
    )
    ids = token_ids(program)
    rotated, found = apply(RotateV(seed=seed), program)
    assert fired(found) == 1
    torch.testing.assert_close(run(rotated, ids), run(program, ids), rtol=0, atol=1e-12)


def without(name):
    program = llama_program()
    program.sites = tuple(dataclasses.replace(site, **{name: None}) for site in program.sites)
    return program


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("o", "heads are not read by a plain linear layer"),  # a gated output, for instance
        ("v", "values are not made by a plain linear layer"),
    ],
)
def test_sites_without_plain_projections_are_left_alone(name, reason):
    _, found = apply(RotateV(), without(name))
    assert reasons(found) == [reason, reason]


def test_a_shared_weight_is_left_alone():
    program = llama_program()
    for node in program.graph.nodes:
        if node.target == "layers.1.attn.v.weight":
            node.target = "layers.0.attn.v.weight"
    site = program.sites[1]
    shared = dataclasses.replace(site, v=program.sites[0].v)
    program.sites = (program.sites[0], shared)
    del program.weights["layers.1.attn.v.weight"]
    _, found = apply(RotateV(), program)
    assert reasons(found) == ["weight layers.0.attn.v.weight is read in 2 places"] * 2


def test_keys_made_by_the_same_rows_block_the_fold():
    program = llama_program(layers=1)
    (site,) = program.sites
    program.sites = (dataclasses.replace(site, k=site.v),)
    _, found = apply(RotateV(), program)
    assert reasons(found) == ["keys and values are made by the same weights"]


def test_rotations_do_not_stack():
    once, _ = apply(RotateV(block=4), llama_program(layers=1))
    _, found = apply(RotateV(block=8), once)
    assert reasons(found) == ["values are in basis hadamard(4), and rotations do not stack"]
    assert not found[0].done


def test_odd_heads_have_no_rotation():
    program = llama_program(layers=1, head_dim=10)
    program.sites = (dataclasses.replace(program.sites[0], v_head_dim=5),)
    assert reasons(RotateV().match(program)) == ["no Hadamard block fits head_dim 5"]


def test_a_block_that_does_not_divide_head_dim_is_refused_with_the_layer():
    with pytest.raises(
        PassError, match=r"KVX204 \[rotate-v\].*head_dim 16; got 32 at layers.0.attn.*block: 16"
    ):
        RotateV(block=32).match(llama_program())


@pytest.mark.parametrize("block", [0, 1, 12, -4])
def test_a_block_that_is_no_power_of_two_is_refused(block):
    with pytest.raises(RecipeError, match=r"KVX107 \[rotate-v\] block must be a power of two"):
        RotateV(block=block)


def test_quantised_values_are_refused_by_a_requirement():
    (requirement,) = RotateV.requires
    program = llama_program()
    assert requirement.is_met(program.facts)
    assert not requirement.is_met(program.facts.with_(v__codec="int"))
