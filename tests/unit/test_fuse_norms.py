"""fuse-norms: the fold by its equation, what blocks it, and biases that appear."""

from __future__ import annotations

import pytest
import torch
from programs import apply, aten, fired, gpt2_program, llama_program, reasons, run, token_ids

import kvxform.ir.ops as kvx
from kvxform.pass_base import NoMatch
from kvxform.passes.rotation.fuse_norms import LAYER_NORM, FuseNorms


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_gain_scales_the_columns_of_the_next_layers(offset):
    program = llama_program(weight_offset=offset)
    fused, found = apply(FuseNorms(), program)
    assert fired(found) == 5
    gain = program.weights["layers.0.norm1.weight"] + offset
    for name in "qkv":
        key = f"layers.0.attn.{name}.weight"
        torch.testing.assert_close(fused.weights[key], program.weights[key] * gain)
    assert fused.weights["layers.0.attn.o.weight"] is program.weights["layers.0.attn.o.weight"]
    assert not [name for name in fused.weights if "norm" in name], "gains are gone"
    assert all(node.args[1] is None for node in fused.calls(kvx.RMS_NORM))


def test_layer_norm_bias_moves_through_the_matrix():
    program = gpt2_program(tied=False)
    fused, found = apply(FuseNorms(), program)
    assert fired(found) == 5
    weight, bias = (program.weights[f"h.0.attn.c_attn.{name}"] for name in ("weight", "bias"))
    gain, shift = (program.weights[f"h.0.ln_1.{name}"] for name in ("weight", "bias"))
    torch.testing.assert_close(fused.weights["h.0.attn.c_attn.weight"], weight * gain[:, None])
    torch.testing.assert_close(fused.weights["h.0.attn.c_attn.bias"], bias + shift @ weight)
    assert all(node.args[2:4] == (None, None) for node in fused.calls(LAYER_NORM))


def test_a_layer_without_bias_gets_one():
    program = gpt2_program(tied=False)
    fused, _ = apply(FuseNorms(), program)
    head, shift = program.weights["head.weight"], program.weights["ln_f.bias"]
    torch.testing.assert_close(fused.weights["head.fused_bias"], head @ shift)
    (linear,) = fused.calls(aten.linear.default)
    assert linear.args[2].target == "head.fused_bias"


def test_a_site_learns_of_the_bias_that_its_projection_got():
    program = llama_program(layers=1)
    norm = next(program.calls(kvx.RMS_NORM))
    with program.graph.inserting_before(norm):
        gain, bias = (program.graph.create_node("get_attr", n) for n in ("gain", "bias"))
        for node in (gain, bias):
            node.meta = dict(norm.args[1].meta)
        layer_norm = program.graph.call_function(LAYER_NORM, (norm.args[0], [32], gain, bias, 1e-5))
        layer_norm.meta = dict(norm.meta)
    program.weights |= {name: torch.randn(32, dtype=torch.float64) for name in ("gain", "bias")}
    norm.replace_all_uses_with(layer_norm)
    program.graph.erase_node(norm)
    fused, found = apply(FuseNorms(), program)
    assert fired(found) == 3
    site = fused.sites[0]
    assert [p.bias for p in (site.q, site.k, site.v, site.o)] == [
        *(f"layers.0.attn.{name}.fused_bias" for name in "qkv"),
        None,
    ]
    ids = token_ids(program)
    torch.testing.assert_close(run(fused, ids), run(program, ids), rtol=0, atol=1e-12)


def test_a_head_tied_to_the_embedding_keeps_its_norm():
    program = llama_program(tied=True)
    fused, found = apply(FuseNorms(), program)
    assert fired(found) == 4
    assert reasons(found) == ["weight embed.weight is read in 2 places"]
    assert fused.weights["embed.weight"] is program.weights["embed.weight"]
    assert "norm.weight" in fused.weights


def test_two_names_of_one_tensor_count_as_tied():
    program = llama_program()
    program.weights["head.weight"] = program.weights["embed.weight"]
    _, found = apply(FuseNorms(), program)
    assert reasons(found) == ["weight head.weight is read in 2 places"]


def test_a_norm_that_something_else_reads_is_left_alone():
    program = llama_program(layers=1)
    norm = list(program.calls(kvx.RMS_NORM))[-1]
    (head,) = norm.users
    with program.graph.inserting_before(head):
        scaled = program.graph.call_function(aten.mul.Tensor, (norm, 2.0), name="scaled")
        scaled.meta = dict(norm.meta)
    head.replace_input_with(norm, scaled)
    _, found = apply(FuseNorms(), program)
    assert found[-1] == NoMatch("scaled reads the norm and is no linear layer", node=norm.name)
    assert fired(found) == 2


def test_a_computed_gain_is_left_alone():
    program = llama_program(layers=1)
    norm = next(program.calls(kvx.RMS_NORM))
    with program.graph.inserting_before(norm):
        gain = program.graph.call_function(aten.exp.default, (norm.args[1],))
        gain.meta = dict(norm.args[1].meta)
    norm.args = (norm.args[0], gain, *norm.args[2:])
    _, found = apply(FuseNorms(), program)
    assert reasons(found) == ["gain or bias of the norm is computed"]


@pytest.mark.parametrize("make", [llama_program, gpt2_program])
def test_a_tied_head_may_have_a_weight_of_its_own(make):
    program = make(tied=True)
    ids = token_ids(program)
    fused, found = apply(FuseNorms(untie=True), program)
    assert fired(found) == 5
    for norm in fused.calls(kvx.RMS_NORM, LAYER_NORM):
        assert norm.args[1 if norm.target is kvx.RMS_NORM else 2] is None
    (untied,) = (name for name in fused.weights if name.endswith("untied"))
    embedding = fused.weights[untied.removesuffix("untied") + "weight"]
    assert torch.equal(embedding, program.weights[untied.removesuffix("untied") + "weight"])
    assert not torch.equal(embedding, fused.weights[untied])
    torch.testing.assert_close(run(fused, ids), run(program, ids), rtol=0, atol=1e-12)


def test_without_untie_the_hint_names_the_option():
    _, found = apply(FuseNorms(), llama_program(tied=True))
    (miss,) = (match for match in found if isinstance(match, NoMatch))
    assert miss.reason == "weight embed.weight is read in 2 places"
    assert "untie: true" in miss.hint


def test_a_weight_that_two_linear_layers_share_is_not_untied():
    program = llama_program(layers=1)
    for node in program.graph.nodes:
        if node.target == "layers.0.mlp.up.weight":
            node.target = "layers.0.mlp.gate.weight"
    _, found = apply(FuseNorms(untie=True), program)
    assert "weight layers.0.mlp.gate.weight is read in 2 places" in reasons(found)
