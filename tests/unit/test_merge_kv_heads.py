"""merge-kv-heads: exact where heads say the same, optimal where not, refused where illegal."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from equal_heads import calibrated, equal_heads
from families import ALL
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import (
    apply,
    fired,
    gpt2_program,
    latent_program,
    llama_program,
    reasons,
    run,
    to_meta,
    token_ids,
)
from torch import Tensor

import kvxform.ir.ops as kvx
from kvxform.capture import capture
from kvxform.errors import PassError
from kvxform.ir.program import Program
from kvxform.ir.types import TensorType
from kvxform.ir.watching import Watcher
from kvxform.pass_base import Match, Rewriter
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.passes.quantize.quantize_kv import QuantizeKv
from kvxform.passes.rotation.rotate_v import RotateV
from kvxform.passes.structure.cache_prerope import CachePrerope
from kvxform.passes.structure.merge_kv_heads import MergeKvHeads
from kvxform.runtime.model import OptimizedModel

WAYS: dict[str, dict[str, Any]] = {
    "mean": {"planner": "mean"},
    "mean, after RoPE": {"planner": "mean", "rope": "post"},
    "commuting": {"rope": "commuting"},
    "post": {"rope": "post"},
    "commuting, similar": {"rope": "commuting", "grouping": "similar"},
    "attention": {"rope": "commuting", "objective": "attention"},
}
MHA = {"heads": 4, "kv_heads": 4, "bias": True}


def losses(found):
    return [loss for match in found if isinstance(match, Match) for loss in match.losses]


def assert_same(program, merged, atol=1e-8):
    ids = token_ids(program)
    expected = run(program, ids)
    torch.testing.assert_close(run(merged, ids), expected, rtol=0, atol=atol)
    cached, _ = apply(InsertCache(), merged) if not merged.is_cached else (merged, [])
    torch.testing.assert_close(run(cached, ids, [4, 1, 4]), expected, rtol=0, atol=atol)


MODELS = {"llama": lambda: llama_program(**MHA), "gpt2": gpt2_program}
CASES = [*(("llama", way) for way in WAYS), ("gpt2", "mean"), ("gpt2", "commuting")]


@pytest.mark.parametrize(("model", "way"), CASES)
def test_equal_heads_are_merged_without_a_change(model, way):
    program = MODELS[model]()
    left = program.sites[0].num_kv_heads // 2
    program = calibrated(equal_heads(program, left))
    merged, found = apply(MergeKvHeads(heads=left, **WAYS[way]), program)
    assert fired(found) == 2
    assert [site.num_kv_heads for site in merged.sites] == [left, left]
    assert max(loss.error for loss in losses(found)) < 1e-6
    assert_same(program, merged)


@functools.cache
def equal_family(family: str) -> Program:
    """Return a family whose KV heads are equal in pairs, calibrated."""
    program = capture(ALL[family].build(torch.float64)).program
    if family == "persimmon":
        program = _with_projection_of_keys(program)
    return calibrated(equal_heads(program, program.sites[0].num_kv_heads // 2))


FAMILIES = ["gpt_neox", "opt", "bloom", "qwen2", "qwen3", "olmo2", "phi3", "cohere", "persimmon"]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_heads_of_a_family_are_merged_without_a_change(family, way):
    """All heads for themselves (MHA), norms of heads, biases, fused and interleaved rows, ALiBi."""
    program = equal_family(family)
    left = program.sites[0].num_kv_heads // 2
    merged, found = apply(MergeKvHeads(heads=left, **WAYS[way]), program)
    is_normed = family in ("qwen3", "olmo2", "persimmon")
    if is_normed and WAYS[way].get("rope") == "commuting":
        assert {reason.partition(" between")[0] for reason in reasons(found)} == {
            "a norm divides every head by its own length"
        }
        return
    assert fired(found) == 2
    assert_same(program, merged)


def _with_projection_of_keys(program: Program) -> Program:
    """Let fused rows before a norm be known to `equal_heads`: q, k and v of a head in turn."""
    sites = []
    for site in program.sites:
        assert site.v is not None
        k = dataclasses.replace(site.v, start=site.v.start - site.head_dim)
        sites.append(dataclasses.replace(site, k=k))
    return dataclasses.replace(program, sites=tuple(sites))


@pytest.fixture
def normed() -> Program:
    """Return a model with a norm of every head, three equal KV heads in each of two groups."""
    program = equal_heads(llama_program(heads=6, kv_heads=6, bias=True), 2)
    rewriter = Rewriter(program, "test")
    generator = torch.Generator().manual_seed(2)
    for rope in list(program.calls(kvx.ROPE)):
        heads = rope.args[0]
        name = f"{rope.meta['module']}.{rope.name}_gain"
        rewriter.set_weight(name, 1 + 0.3 * torch.randn(16, generator=generator).double())
        gain = rewriter.get_weight_node(name, rope, TensorType(torch.float64, (16,)))
        kind = heads.meta["type"]
        norm = rewriter.call_before(rope, kvx.RMS_NORM, (heads, gain, 1e-6), type_=kind)
        rewriter.set_args(rope, (norm, *rope.args[1:]))
    sites = tuple(dataclasses.replace(site, q=None, k=None) for site in program.sites)
    return calibrated(dataclasses.replace(program, sites=sites))


def test_no_mix_of_normed_heads_moves_into_their_weights(normed):
    (miss, _) = found_in(normed, heads=2, rope="commuting")
    assert miss.reason == (
        "a norm divides every head by its own length between W_k and RoPE, so no mix of heads can"
        " move into W_k"
    )
    assert miss.hint == "use rope: post"


@pytest.mark.parametrize("way", ["mean", "post"])
def test_a_norm_of_every_head_is_kept(normed, way):
    program = normed
    merged, found = apply(MergeKvHeads(heads=2, **WAYS[way]), program)
    assert fired(found) == 2
    assert_same(program, merged)
    normed_heads = [n.meta["type"].shape for n in merged.calls(kvx.RMS_NORM)]
    pooled = sum(shape == ("B", "S", 2, 16) for shape in normed_heads)
    assert pooled == (2 if way == "mean" else 0)
    assert {loss.stream for loss in losses(found)} == (
        {"value"} if way == "mean" else {"key", "value"}
    )


class Recorder(Watcher):
    """Keeps what attention gets, at full precision."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.to_module())
        self.streams: dict[tuple[int, str], Tensor] = {}

    def seen(self, layer: int, stream: str, x: Tensor) -> None:
        self.streams[layer, stream] = x[0]


def exactly_calibrated(program: Program) -> Program:
    """Return a program whose calibration holds all tokens of one window in float64."""
    program = calibrated(program, 1, 48)
    recorder = Recorder(program)
    recorder.show(program.calibration.token_ids[0])
    layers = {}
    for layer, own in program.calibration.layers.items():
        streams = {
            name: dataclasses.replace(getattr(own, name), samples=recorder.streams[layer, name])
            for name in ("k_pre", "k_post", "v")
            if getattr(own, name) is not None
        }
        layers[layer] = dataclasses.replace(own, **streams)
    exact = dataclasses.replace(program.calibration, layers=layers)
    return dataclasses.replace(program, calibration=exact)


@pytest.mark.parametrize("interleaved", [False, True])
def test_keys_that_are_complex_multiples_pair_by_pair_are_merged_without_a_change(interleaved):
    program = llama_program(heads=4, kv_heads=2, layers=1, head_dim=16, bias=True)
    for node in program.calls(kvx.ROPE):
        node.kwargs = {**node.kwargs, "interleaved": interleaved}
    (site,) = program.sites
    rope = dataclasses.replace(site.rope, interleaved=interleaved)
    program.sites = (dataclasses.replace(site, rope=rope),)
    half = torch.arange(8)
    first, second = (2 * half, 2 * half + 1) if interleaved else (half, half + 8)
    factors = torch.randn(8, dtype=torch.complex128, generator=torch.Generator().manual_seed(1))
    turn = torch.linalg.qr(torch.randn(16, 16).double()).Q
    for name in ("weight", "bias"):
        keys = program.weights[f"layers.0.attn.k.{name}"].clone()
        product = torch.complex(keys[:16][first], keys[:16][second])
        product = product * factors.view(8, *[1] * (keys.ndim - 1))
        keys[16:][first], keys[16:][second] = product.real, product.imag
        values = program.weights[f"layers.0.attn.v.{name}"].clone()
        values[16:] = turn @ values[:16]
        program.weights[f"layers.0.attn.k.{name}"] = keys
        program.weights[f"layers.0.attn.v.{name}"] = values
    program = exactly_calibrated(program)
    merged, found = apply(MergeKvHeads(heads=1, rope="commuting"), program)
    assert fired(found) == 1
    assert max(loss.error for loss in losses(found)) < 1e-12
    assert_same(program, merged)
    mean, _ = apply(MergeKvHeads(heads=1, planner="mean"), program)
    ids = token_ids(program)
    assert float((run(mean, ids) - run(program, ids)).abs().max()) > 1e-3


def without_rope(program: Program) -> Program:
    for node in list(program.calls(kvx.ROPE)):
        node.replace_all_uses_with(node.args[0])
    Rewriter(program, "test").finish()
    sites = tuple(dataclasses.replace(site, rope=None) for site in program.sites)
    return dataclasses.replace(program, sites=sites)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (9, 3)])
def test_one_head_of_full_rank_holds_all_heads_without_rope(heads, kv_heads):
    """32 channels of one head are all that a residual stream of 32 channels can say."""
    program = llama_program(heads=heads, kv_heads=kv_heads, head_dim=32)
    program = exactly_calibrated(without_rope(program))
    merged, found = apply(MergeKvHeads(heads=1), program)
    assert fired(found) == 2
    assert_same(program, merged)


def test_a_latent_of_full_rank_holds_all_heads_before_rope():
    program = llama_program(heads=4, kv_heads=4, head_dim=32)
    program = exactly_calibrated(program)
    cached, _ = apply(InsertCache(), program)
    cached, _ = apply(CachePrerope(), cached)
    merged, found = apply(MergeKvHeads(heads=1, rope="latent"), cached)
    assert fired(found) == 2
    assert max(loss.error for loss in losses(found)) < 1e-7  # second moments are summed up
    assert_same(program, merged)
    assert merged.plan.bytes_per_token == cached.plan.bytes_per_token / 4


@settings(deadline=None, max_examples=4)
@given(
    groups=st.integers(1, 2),
    together=st.integers(1, 3),
    queries=st.integers(1, 2),
    head_dim=st.sampled_from([4, 6, 12]),
    bias=st.booleans(),
    way=st.sampled_from(sorted(WAYS)),
)
def test_all_head_counts_and_sizes(groups, together, queries, head_dim, bias, way):
    heads = groups * together
    program = llama_program(
        layers=1, heads=heads * queries, kv_heads=heads, head_dim=head_dim, bias=bias
    )
    program = calibrated(equal_heads(program, groups), 1, 40)
    merged, found = apply(MergeKvHeads(heads=groups, **WAYS[way]), program)
    assert fired(found) == (together > 1)
    assert_same(program, merged)


@pytest.mark.parametrize(("heads", "kv_heads", "left"), [(9, 3, 1), (32, 32, 8)])
def test_queries_need_no_even_share(heads, kv_heads, left):
    program = llama_program(layers=1, heads=heads, kv_heads=kv_heads, head_dim=4)
    program = calibrated(equal_heads(program, left))
    merged, _ = apply(MergeKvHeads(heads=left), program)
    (site,) = merged.sites
    assert (site.num_q_heads, site.num_kv_heads) == (heads, left)
    assert_same(program, merged)


@pytest.mark.parametrize("way", ["mean", "post"])
def test_heads_that_are_alike_move_together_with_what_belongs_to_their_queries(way):
    numbers = torch.linspace(0.5, 2.0, 8)
    program = llama_program(heads=8, kv_heads=4, attention={"sink_logits": numbers})
    program = calibrated(equal_heads(program, 2, images=[0, 1, 0, 1]))
    options = {**WAYS[way], "grouping": "similar"}
    merged, found = apply(MergeKvHeads(heads=2, **options), program)
    assert [match.data["merge"].order for match in found] == [(0, 2, 1, 3)] * 2
    assert {loss.heads for loss in losses(found)} == {(0, 2), (1, 3)}
    assert_same(program, merged)
    straight, found = apply(MergeKvHeads(heads=2, **WAYS[way]), program)
    assert max(loss.error for loss in losses(found)) > 0.1, "neighbours are not alike here"
    assert float((run(straight, ids := token_ids(program)) - run(program, ids)).abs().max()) > 1e-3


def shared(program: Program) -> Program:
    """Let the second layer read keys and values of the first."""
    first, second = (program.attention_node(layer) for layer in (0, 1))
    second.args = (second.args[0], *first.args[1:3], *second.args[3:])
    Rewriter(program, "test").finish()
    own = dataclasses.replace(program.sites[1], k=program.sites[0].k, v=program.sites[0].v)
    program.sites = (program.sites[0], dataclasses.replace(own, shared_with=0))
    return program


@pytest.mark.parametrize("way", ["mean", "post", "commuting"])
def test_layers_that_read_another_cache_follow_its_owner(way):
    program = calibrated(equal_heads(shared(llama_program(**MHA)), 2))
    merged, found = apply(MergeKvHeads(heads=2, **WAYS[way]), program)
    assert fired(found) == 1
    assert reasons(found) == ["keys and values are those of layer 0"]
    assert found[1].done
    assert [site.num_kv_heads for site in merged.sites] == [2, 2]
    cached, _ = apply(InsertCache(), merged)
    ids = token_ids(program)
    expected = run(program, ids)
    torch.testing.assert_close(run(merged, ids), expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(OptimizedModel(cached)(ids), expected, rtol=0, atol=1e-8)
    assert {"layers.0.attn.o.weight", "layers.1.attn.o.weight"} <= set(merged.touched)


def test_losses_are_the_singular_values_left_out_and_never_above_those_of_means():
    program = calibrated(llama_program(heads=8, kv_heads=8, head_dim=8))
    found = {
        way: {(x.layer, x.stream, x.heads): x.error for x in losses(apply(p, program)[1])}
        for way, p in {
            "mean": MergeKvHeads(heads=2, planner="mean"),
            "svd": MergeKvHeads(heads=2, rope="commuting"),
            "post": MergeKvHeads(heads=2),
        }.items()
    }
    assert len(found["svd"]) == 2 * 2 * 2
    for (layer, stream, heads), error in found["post"].items():
        own = program.calibration.layers[layer]
        x = (own.k_post if stream == "key" else own.v).samples[list(heads)].double()
        values = torch.linalg.svdvals(torch.cat(list(x), 1))
        expected = (values[8:].square().sum() / values.square().sum()).sqrt()
        assert error == pytest.approx(float(expected), rel=1e-9)
        svd = found["svd"][layer, stream, heads]
        assert error <= svd + 1e-12
        assert svd <= found["mean"][layer, stream, heads] + 1e-12
        assert 0.01 < svd < 1


def test_layers_have_targets_of_their_own():
    program = calibrated(llama_program(heads=4, kv_heads=4, layers=3))
    merged, found = apply(MergeKvHeads(layers={"0": 2, "-1": 1}), program)
    assert [site.num_kv_heads for site in merged.sites] == [2, 4, 1]
    assert reasons(found) == ["the recipe names other layers"]
    cached, _ = apply(InsertCache(), merged)
    values = [site.values_per_token for site in cached.plan.sites]
    assert values == [2 * 2 * 16, 2 * 4 * 16, 2 * 1 * 16]
    assert all(miss.done for miss in MergeKvHeads(layers={"0": 2, "-1": 1}).match(merged))
    run(cached, token_ids(cached))


def test_a_ratio_is_rounded_down_to_a_divisor_and_says_so():
    program = calibrated(llama_program(heads=9, kv_heads=3))
    merged, found = apply(MergeKvHeads(ratio=0.5), program)
    assert [site.num_kv_heads for site in merged.sites] == [1, 1]
    assert {match.note for match in found} == {"0.5 of 3 KV heads is no divisor: 1 left"}
    _, again = apply(MergeKvHeads(ratio=0.5), merged)
    assert reasons(again) == ["heads have been merged already"] * 2
    assert all(miss.done for miss in again)


def test_a_dry_run_has_the_same_shapes():
    program = calibrated(llama_program(**MHA))
    for way in WAYS.values():
        graph_pass = MergeKvHeads(heads=2, **way)
        merged, found = apply(graph_pass, program)
        dry, dry_found = apply(graph_pass, to_meta(program))
        assert not losses(dry_found)
        assert len(losses(found)) == 8
        assert dry.sites == merged.sites
        shapes = {name: weight.shape for name, weight in merged.weights.items()}
        assert {name: weight.shape for name, weight in dry.weights.items()} == shapes


@pytest.mark.parametrize("rope", ["commuting", "post", "mean"])
def test_all_of_a_merged_attention_may_be_healed(rope):
    program = calibrated(llama_program(layers=1))
    way = {"planner": "mean"} if rope == "mean" else {"rope": rope}
    graph_pass = MergeKvHeads(heads=1, **way)
    clone = program.clone()
    rewriter = Rewriter(clone, "merge-kv-heads", graph_pass.numerics)
    (match,) = graph_pass.match(program)
    graph_pass.rewrite(clone, match, rewriter)
    rewriter.finish()
    names = {f"layers.0.attn.{name}.weight" for name in "qkvo"}
    if rope == "post":
        names |= {"merge_kv_heads.key_0", "merge_kv_heads.query_0"}
    assert clone.touched == dict.fromkeys(names, "merge-kv-heads")
    assert len(clone.weights["layers.0.attn.v.weight"]) == 16
    assert len(clone.weights["layers.0.attn.k.weight"]) == (32 if rope == "post" else 16)


def test_fused_projections_come_apart():
    program = calibrated(gpt2_program(layers=1))
    merged, _ = apply(MergeKvHeads(heads=1), program)
    rows = {name: len(merged.weights[f"h.0.attn.c_attn.{name}.weight"]) for name in "qkv"}
    assert rows == {"q": 32, "k": 16, "v": 16}
    assert "h.0.attn.c_attn.weight" not in merged.weights


def found_in(program, **options):
    return MergeKvHeads(**options).match(program)


def test_one_head_cannot_be_merged():
    program = llama_program(kv_heads=1)
    assert (
        reasons(found_in(program, ratio=0.5)) == ["one KV head cannot be merged with another"] * 2
    )
    found = found_in(program, heads=1)
    assert reasons(found) == ["there is one KV head already"] * 2
    assert all(miss.done for miss in found)


def test_more_heads_than_there_are_are_no_match():
    found = found_in(llama_program(), heads=8)
    assert reasons(found) == ["there are only 2 KV heads"] * 2
    assert not any(miss.done for miss in found)


def test_latents_have_no_heads_of_their_own():
    found = found_in(latent_program(), heads=1)
    assert reasons(found) == ["keys and values of all heads come from one latent"] * 2


def test_groups_of_unequal_size_are_refused_with_what_fits():
    with pytest.raises(
        PassError, match=r"KVX205 \[merge-kv-heads\].*equal size; got 4 at layers.0.*leave 1, 2, 3"
    ):
        found_in(llama_program(heads=6, kv_heads=6), heads=4)


def test_a_cache_of_all_heads_comes_too_early_and_a_latent_too_late():
    cached, _ = apply(InsertCache(), llama_program())
    (miss, _) = found_in(cached, heads=1)
    assert miss.reason == "there is a cache of all heads already"
    assert miss.hint == "move merge-kv-heads above insert-cache, or use rope: latent"
    (miss, _) = found_in(llama_program(), heads=1, rope="latent")
    assert miss.reason == "there is no cache whose reads could undo a latent"
    assert miss.hint == "put insert-cache and cache-prerope before it"


def test_weights_that_others_read_are_left_alone():
    program = llama_program()
    for node in program.graph.nodes:
        if node.target == "layers.1.attn.k.weight":
            node.target = "layers.0.attn.k.weight"
    del program.weights["layers.1.attn.k.weight"]
    second = dataclasses.replace(program.sites[1], k=program.sites[0].k)
    program.sites = (program.sites[0], second)
    wanted = ["weight layers.0.attn.k.weight is read in 2 places"] * 2
    assert reasons(found_in(program, heads=1, rope="commuting")) == wanted
    found = found_in(program, heads=1)
    assert fired(found) == 2, "keys mixed after RoPE leave W_k as it is"


def test_values_that_are_no_plain_layer_are_left_alone():
    program = llama_program(layers=1)
    program.sites = (dataclasses.replace(program.sites[0], v=None),)
    assert reasons(found_in(program, heads=1)) == ["values are not made by a plain linear layer"]


@pytest.mark.parametrize(
    ("before", "fact"),
    [
        ((RotateV(),), "v.basis"),
        ((InsertCache(), QuantizeKv({"codec": "int", "bits": 8}, None)), "k.codec"),
    ],
)
def test_rotations_and_codecs_come_later(before, fact):
    program = llama_program()
    for graph_pass in before:
        program, _ = apply(graph_pass, program)
    unmet = [r.fact for r in MergeKvHeads.requires if not r.is_met(program.facts)]
    assert unmet == [fact]
