"""fuse-projections: the same logits from fewer products, sites that know their rows, refusals."""

from __future__ import annotations

import pytest
import torch
from programs import apply, aten, fired, gpt2_program, llama_program, reasons, run, token_ids

from kvxform.pass_base import NoMatch
from kvxform.passes.base.fuse_projections import FuseProjections
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.passes.rotation.fuse_norms import FuseNorms
from kvxform.passes.rotation.rotate_v import RotateV


@pytest.mark.parametrize("bias", [False, True])
def test_one_product_for_each_value(bias):
    program = llama_program(bias=bias)
    fused, found = apply(FuseProjections(), program)
    assert fired(found) == 4, "attention and MLP of two layers"
    before, after = (len(list(p.calls(aten.linear.default))) for p in (program, fused))
    assert before - after == 2 * (2 + 1)
    parts = [program.weights[f"layers.0.attn.{name}.weight"] for name in "qkv"]
    assert torch.equal(fused.weights["layers.0.attn.q_k_v.weight"], torch.cat(parts))
    assert not [name for name in fused.weights if name.endswith((".q.weight", ".k.bias"))]
    ids = token_ids(program)
    torch.testing.assert_close(run(fused, ids), run(program, ids), rtol=0, atol=1e-12)


def test_sites_know_their_rows_so_that_later_passes_still_work():
    program, _ = apply(InsertCache(), llama_program(bias=True))
    fused, _ = apply(FuseProjections(), program)
    rotated, found = apply(RotateV(), fused)
    assert fired(found) == 2
    expected, _ = apply(RotateV(), program)
    values = expected.weights["layers.0.attn.v.weight"]
    assert torch.equal(rotated.weights["layers.0.attn.q_k_v.weight"][-len(values) :], values)
    ids = token_ids(program)
    torch.testing.assert_close(run(rotated, ids, [4, 5]), run(program, ids), rtol=0, atol=1e-12)
    again, found = apply(FuseNorms(), rotated)
    assert fired(found) == 5
    torch.testing.assert_close(run(again, ids), run(program, ids), rtol=0, atol=1e-12)


def test_a_fused_projection_is_left_alone():
    once, _ = apply(FuseProjections(), llama_program())
    twice = FuseProjections().match(once)
    assert [match.done for match in twice if isinstance(match, NoMatch)] == [True] * 4
    assert fired(FuseProjections().match(gpt2_program())) == 0


def test_a_weight_that_is_read_elsewhere_stays():
    program = llama_program(layers=1)
    program.weights["layers.0.attn.k.weight"] = program.weights["layers.0.attn.v.weight"]
    _, found = apply(FuseProjections(), program)
    assert fired(found) == 1, "that of the MLP"
    assert reasons(found) == ["weight layers.0.attn.k.weight is read in 2 places"]


def test_layers_with_and_without_bias_stay_apart():
    program = llama_program(layers=1, bias=True)
    linear = next(n for n in program.calls(aten.linear.default) if "k.weight" in n.args[1].target)
    linear.args = linear.args[:2]
    found = FuseProjections().match(program)
    assert reasons(found) == ["some of the linear layers have a bias and some have none"]
