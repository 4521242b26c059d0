"""insert-cache: any split of a prompt gives the stateless logits; what cannot be cached is said."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import apply, aten, fired, gpt2_program, llama_program, reasons, run, token_ids

import kvxform.ir.ops as kvx
from kvxform.codecs.basis import Basis
from kvxform.ir.program import RejectedSite
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.passes.rotation.rotate_v import RotateV


@settings(deadline=None, max_examples=15)
@given(
    steps=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    window=st.none() | st.integers(1, 4),
    softcap=st.none() | st.just(2.0),
    kv_heads=st.sampled_from([1, 2, 4]),
)
def test_any_split_of_a_prompt_gives_the_stateless_logits(steps, window, softcap, kv_heads):
    extra = {"window": window, "softcap": softcap}
    program = llama_program(layers=1, kv_heads=kv_heads, attention=extra)
    ids = token_ids(program, tokens=sum(steps))
    cached, found = apply(InsertCache(), program)
    assert fired(found) == 1
    assert cached.attention_node(0).kwargs["window"] == window
    torch.testing.assert_close(run(cached, ids, steps), run(program, ids), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("make", "rope"), [(llama_program, "post"), (gpt2_program, "none")])
def test_the_plan_describes_the_sites(make, rope):
    program, _ = apply(RotateV(), make())
    cached, _ = apply(InsertCache(), program)
    assert cached.plan.layout.kind == "contiguous"
    for site, plan in zip(cached.sites, cached.plan.sites, strict=True):
        assert (plan.layer, plan.owner) == (site.layer, site.layer)
        assert (plan.num_q_heads, plan.num_kv_heads) == (site.num_q_heads, site.num_kv_heads)
        assert (plan.key.rope, plan.value.rope) == (rope, "none")
        assert (plan.key.basis, plan.value.basis) == (Basis(), Basis("hadamard", 16))
        assert plan.key.codec == {"codec": "none", "dtype": "float64"}
    assert cached.plan.bits_per_value == 64


def test_the_graph_has_one_handle_and_no_stateless_attention():
    cached, _ = apply(InsertCache(), llama_program())
    names = [node.target for node in cached.graph.nodes if node.op == "placeholder"]
    assert names == ["input_ids", "position_ids", "cache"]
    assert not list(cached.calls(kvx.ATTENTION))
    assert [n.kwargs["layer"] for n in cached.calls(kvx.CACHE_APPEND)] == [0, 1]
    assert cached.facts["cache.layout"] == "contiguous"


def blocked(change):
    """Change the attention node of layer 1, and return what `match` finds."""
    program = llama_program()
    change(program, program.attention_node(1))
    return InsertCache().match(program)


def add_bias(program, node):
    node.kwargs = {**node.kwargs, "bias": program.placeholder("input_ids")}


def make_bidirectional(program, node):
    node.kwargs = {**node.kwargs, "causal": False}


def compute_positions(program, node):
    with program.graph.inserting_before(node):
        later = program.graph.call_function(aten.add.Tensor, (node.args[3], 1))
    node.args = (*node.args[:3], later)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (add_bias, "a bias on the scores cannot follow the cache"),
        (make_bidirectional, "attention that sees later tokens cannot be cached"),
        (compute_positions, "positions are not those given to the model"),
    ],
)
def test_one_attention_that_cannot_be_cached_blocks_all(change, reason):
    found = blocked(change)
    assert reasons(found) == ["all layers are cached or none", reason]
    assert [match.layer for match in found] == [0, 1]
    assert not any(match.done for match in found)


def test_an_attention_that_was_not_raised_blocks_all():
    program = dataclasses.replace(
        llama_program(layers=1), rejected=(RejectedSite("layers.9.attn", "its mask is unknown"),)
    )
    assert reasons(InsertCache().match(program)) == [
        "all layers are cached or none",
        "layers.9.attn was not raised: its mask is unknown",
    ]
