"""cache-latent: what is cached and what is multiplied, by the equations; what stays ordinary."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from programs import (
    LATENT,
    OWN,
    SHARED,
    VALUES,
    DenseCache,
    apply,
    fired,
    latent_program,
    llama_program,
    reasons,
    run,
    token_ids,
)

import kvxform.ir.ops as kvx
from kvxform.cli.plan import plan_data, plan_text
from kvxform.codecs.basis import Basis
from kvxform.codegen.eager.specialise import multiply_heads, specialise
from kvxform.errors import PassError, RecipeError
from kvxform.ir.cache import make_handle
from kvxform.ir.facts import Facts
from kvxform.ir.latent import CAT, find_latent
from kvxform.ir.plan import CachePlan
from kvxform.ir.program import default_positions
from kvxform.ir.stream_plan import KeyView
from kvxform.ir.text import format_program
from kvxform.ir.verify import verify_program
from kvxform.order import check_order, plan_passes
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.passes.base.simplify import Simplify
from kvxform.passes.memory.page_cache import PageCache
from kvxform.passes.quantize.quantize_kv import QuantizeKv
from kvxform.passes.rotation.fuse_norms import FuseNorms
from kvxform.passes.rotation.rotate_qk import RotateQk
from kvxform.passes.rotation.rotate_v import RotateV
from kvxform.passes.structure.cache_latent import CacheLatent
from kvxform.pipeline import plan_pipeline
from kvxform.recipe import PassStep, load_recipe

INT4 = {"codec": "int", "bits": 4}


def values_of(program, *nodes, ids):
    """Return the values of nodes on `ids`, by running the graph up to them."""
    clone = program.clone()
    names = [node.name for node in nodes]
    output = next(n for n in clone.graph.nodes if n.op == "output")
    by_name = {n.name: n for n in clone.graph.nodes}
    output.args = (tuple(by_name[name] for name in names),)
    return clone.to_module()(ids, default_positions(ids))


def stored(program, ids):
    """Return what each layer of a cached program appends for `ids`."""
    cache = DenseCache()
    program.to_module()(ids, default_positions(ids), make_handle(cache))
    return cache.stored


@pytest.mark.parametrize("shared_first", [False, True])
def test_the_cached_key_is_the_latent_beside_the_shared_part(shared_first):
    program = latent_program(shared_first=shared_first)
    ids = token_ids(program)
    rewritten, found = apply(CacheLatent(), program)
    assert fired(found) == 2
    cached, _ = apply(InsertCache(), rewritten)
    for layer, (key, value) in stored(cached, ids).items():
        k = program.attention_node(layer).args[1]
        norm = [n for n in program.graph.nodes if n.target is kvx.RMS_NORM][2 * layer + 1]
        keys, latent = values_of(program, k, norm, ids=ids)
        channels = slice(0, SHARED) if shared_first else slice(OWN, None)
        torch.testing.assert_close(key[:, 0, :, :LATENT], latent, rtol=0, atol=1e-12)
        torch.testing.assert_close(key[:, :, :, LATENT:], keys[:, :1, :, channels])
        assert value is key, "nothing is stored for values"


@pytest.mark.parametrize(
    "attention", [{}, {"window": 4}, {"softcap": 2.0}, {"chunk": 5}], ids=lambda a: "".join(a)
)
def test_logits_stay_with_every_option_of_the_scores(attention):
    program = latent_program(attention=attention)
    ids = token_ids(program, tokens=11)
    reference = run(program, ids)
    rewritten, _ = apply(CacheLatent(), program)
    cached, _ = apply(InsertCache(), rewritten)
    for each, steps in ((rewritten, None), (cached, [11]), (cached, [4, 1, 1, 3, 2])):
        torch.testing.assert_close(run(each, ids, steps), reference, rtol=0, atol=1e-12)


def test_up_projections_become_one_matrix_a_head():
    rewritten, _ = apply(CacheLatent(), latent_program(layers=1))
    site = rewritten.site(0)
    assert (site.num_kv_heads, site.head_dim, site.v_head_dim) == (1, LATENT + SHARED, LATENT)
    assert (site.payload, site.latent, site.k, site.v, site.o) == ("latent", *[None] * 4)
    up = latent_program(layers=1).weights["layers.0.attn.up.weight"]
    heads = up.view(4, OWN + VALUES, LATENT)
    name = "layers.0.attn.up"
    assert torch.equal(rewritten.weights[f"{name}.absorbed_k"], heads[:, :OWN])
    assert torch.equal(rewritten.weights[f"{name}.absorbed_v"], heads[:, OWN:].mT)
    assert f"{name}.weight" not in rewritten.weights, "nothing is expanded for every token"


def test_bytes_count_the_latent_once():
    program, _ = apply(CacheLatent(), latent_program())
    cached, _ = apply(InsertCache(), program)
    plan = cached.plan
    assert plan.sites[0].value == KeyView(LATENT)
    assert plan.values_per_token == 2 * (LATENT + SHARED)
    assert plan.bytes_per_token == 2 * (LATENT + SHARED) * 8
    ordinary, _ = apply(InsertCache(), latent_program())
    assert ordinary.plan.values_per_token == 2 * 4 * (OWN + SHARED + VALUES)
    assert plan.read_bytes_per_step(3, 100) == 300 * plan.bytes_per_token
    assert CachePlan.from_json(plan.to_json()) == plan
    assert "v the first 16 channels of k" in format_program(cached)


@pytest.mark.parametrize("cache_first", [False, True])
@pytest.mark.parametrize("seed", [None, 3])
def test_rotations_cost_nothing_on_the_output(cache_first, seed):
    program, _ = apply(CacheLatent(), latent_program())
    ids = token_ids(program)
    reference, plain = run(program, ids), apply(InsertCache(), program)[0]
    rotated = program
    rotate, insert = RotateQk(None, seed), InsertCache()
    for graph_pass in (insert, rotate) if cache_first else (rotate, insert):
        rotated, found = apply(graph_pass, rotated)
        assert fired(found) == 2
    basis = Basis("hadamard", 8, seed)
    assert [site.k_basis for site in rotated.sites] == [basis] * 2
    assert len(list(rotated.calls(kvx.HADAMARD))) == 4, "q and new k of two layers, no more"
    torch.testing.assert_close(run(rotated, ids, [4, 5]), reference, rtol=0, atol=1e-12)
    before, after = stored(plain, ids), stored(rotated, ids)
    for layer, (key, _) in before.items():
        want = key @ basis.matrix(LATENT + SHARED)
        torch.testing.assert_close(after[layer][0], want, rtol=0, atol=1e-12)


def test_a_block_may_not_reach_from_the_latent_into_the_shared_part():
    program, _ = apply(CacheLatent(), latent_program())
    with pytest.raises(PassError, match="KVX204") as refusal:
        RotateQk(block=16).match(program)
    assert "block: 8" in str(refusal.value)


def test_the_codec_of_keys_is_that_of_the_latent():
    program = latent_program()
    for graph_pass in (CacheLatent(), InsertCache(), PageCache(16)):
        program, _ = apply(graph_pass, program)
    for value in (None, {"codec": "int", "bits": 2}):
        quantised, found = apply(QuantizeKv(INT4, value), program)
        assert fired(found) == 2
        (site, _) = quantised.plan.sites
        assert list(site.streams) == ["key"]
        assert site.key.codec["bits"] == 4
        assert quantised.plan.bits_per_value == 4 + 32 / (LATENT + SHARED)
        folded, found = apply(Simplify(), quantised)
        assert folded.plan.sites[0].key.read.form == "folded"
    _, found = apply(QuantizeKv(None, INT4), program)
    assert set(reasons(found)) == {"values are part of the latent, which takes the codec of keys"}


def test_values_of_a_latent_are_not_rotated_on_their_own():
    program, _ = apply(CacheLatent(), latent_program())
    found = RotateV().match(program)
    assert {miss.reason for miss in found} == {"values are part of the latent, which keys rotate"}
    assert all(miss.done for miss in found)


def test_a_gain_stays_with_its_latent():
    program, _ = apply(CacheLatent(), latent_program())
    fused, found = apply(FuseNorms(), program)
    assert fired(found) == 2, "the norms before q and the latent"
    assert sum("reads the norm" in reason for reason in reasons(found)) == 2
    ids = token_ids(program)
    torch.testing.assert_close(run(fused, ids), run(program, ids), rtol=0, atol=1e-12)


def test_ordinary_attention_is_left_alone():
    program, found = apply(CacheLatent(), llama_program())
    assert set(reasons(found)) == {
        "keys and values of all heads are not made from one narrow vector"
    }
    assert all(site.payload == "kv" for site in program.sites)


def test_layers_that_share_keys_keep_them():
    program = latent_program()
    first, second = program.sites
    k, v = program.attention_node(0).args[1:3]
    node = program.attention_node(1)
    node.args = (node.args[0], k, v, node.args[3])
    program.sites = (first, dataclasses.replace(second, shared_with=0))
    found = CacheLatent().match(program)
    assert [miss.reason for miss in found] == ["layers share these keys and values"] * 2


def test_keys_in_another_form_are_refused_with_the_form():
    program = latent_program()
    k = program.attention_node(0).args[1]
    own, spread = k.args[0]
    k.args = ([spread, own], -1)
    assert "beside a part" in find_latent(program, program.site(0))
    (first, second) = CacheLatent().match(program)
    assert "beside a part that all of them share" in first.reason
    assert second.layer == 1


@pytest.mark.parametrize(
    ("before", "because"),
    [
        ("insert-cache", "would already be what is cached"),
        ("fuse-norms", "would be missing from the latent"),
        ("rotate-qk", "rotated as a whole"),
        ("rotate-v", "no place in a latent"),
    ],
)
def test_passes_that_have_to_come_later(before, because):
    steps = [PassStep(before), PassStep("cache-latent")]
    with pytest.raises(RecipeError, match="KVX214") as refusal:
        plan_passes(steps, Facts(), auto_order=False)
    assert because in str(refusal.value)
    assert f"move cache-latent above {before}" in str(refusal.value)
    ordered = plan_passes(steps, Facts(), auto_order=True)
    assert [planned.name for planned in ordered] == ["cache-latent", before]
    check_order(ordered, Facts())


def test_the_verifier_knows_what_a_latent_is():
    program, _ = apply(CacheLatent(), latent_program(layers=1))
    node = program.attention_node(0)
    value = node.args[2]
    value.args = (value.args[0], -1, 1, LATENT + 1)
    with pytest.raises(PassError, match="first channels of its keys"):
        verify_program(program)
    cached, _ = apply(InsertCache(), apply(CacheLatent(), latent_program(layers=1))[0])
    cached.plan = cached.plan.replace_site(0, payload="kv")
    with pytest.raises(PassError, match="if and only if they are not cached themselves"):
        verify_program(cached)


def test_plan_and_report_say_what_is_cached():
    program, report = plan_pipeline(latent_program(), load_recipe("kv4"))
    text = plan_text(plan_data(program, report, 8, 8192))
    assert "4 q heads / one latent of 16 + 8" in text
    assert "added per step: one hadamard(8) on q and on new k" in text
    assert "exact: cache-latent fuse-norms insert-cache page-cache rotate-qk simplify" in text
    layer = report.layers[0]
    assert layer.value_codec == "first 16 channels of the key"
    assert (layer.key_bytes, layer.value_bytes) == (16.0, 0)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_eager_lowering_multiplies_head_by_head(batch):
    x, stack = torch.randn(batch, 4, 5, 6).double(), torch.randn(4, 6, 7).double()
    want = torch.stack([x[:, head] @ stack[head] for head in range(4)], 1)
    torch.testing.assert_close(multiply_heads(x, stack), want)
    rewritten, _ = apply(CacheLatent(), latent_program())
    calls = [n.target for n in specialise(rewritten).graph.nodes if n.op == "call_function"]
    assert calls.count(multiply_heads) == 4
    assert torch.ops.aten.matmul.default not in calls


def test_parts_that_are_joined_are_not_cut_again():
    rewritten, _ = apply(CacheLatent(), latent_program(layers=1))
    query, key, _ = rewritten.attention_node(0).args[:3]
    assert query.target is key.target is CAT
    assert query.args[0][1].target is kvx.ROPE, "the rotary part of q, as it was joined before"
