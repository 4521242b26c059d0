"""Weights of two programs, paired by their place in the graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from programs import apply, gpt2_program, llama_program, to_meta
from torch import Tensor

from kvxform.diffing.align import align
from kvxform.diffing.outline_fx import outline_program
from kvxform.diffing.records import WeightChange
from kvxform.diffing.weights import compare_weights
from kvxform.ir.program import Program
from kvxform.passes.rotation.fuse_norms import FuseNorms


def compare(a: Program, b: Program) -> tuple[WeightChange, ...]:
    outlines = outline_program(a), outline_program(b)
    return compare_weights(a, b, outlines, align(*outlines))


def changed(program: Program, name: str, change: Callable[[Tensor], Tensor]) -> Program:
    clone = program.clone()
    clone.weights[name] = change(clone.weights[name])
    return clone


def test_equal_weights_have_not_changed():
    assert compare(llama_program(), llama_program()) == ()


@pytest.mark.parametrize(
    ("name", "layer", "role"),
    [
        ("layers.1.attn.q.weight", 1, "q"),
        ("layers.2.attn.o.weight", 2, "o"),
        ("layers.0.mlp.down.weight", 0, "layers.*.mlp.down"),
        ("layers.2.norm2.weight", 2, "layers.*.norm2"),
        ("head.weight", None, "head"),
    ],
)
def test_a_weight_is_found_in_its_layer_with_its_role(name, layer, role):
    a = llama_program(layers=3)
    (change,) = compare(a, changed(a, name, lambda w: 1.25 * w))
    expected = WeightChange(layer, role, "scaled", change.relative, "by 1.25")
    assert change == expected
    assert change.relative == pytest.approx(0.25)


def test_other_names_are_no_change():
    a, b = llama_program(), llama_program()
    names = {name: f"w{i}" for i, name in enumerate(sorted(b.weights, reverse=True))}
    names["inv_freq"] = "inv_freq"  # the sites name it
    b.weights = {names[name]: weight for name, weight in b.weights.items()}
    for node in b.graph.nodes:
        if node.op == "get_attr":
            node.target = names[node.target]
    assert compare(a, b) == ()


def test_two_weights_that_have_changed_places_are_two_changes():
    a = llama_program()
    b = a.clone()
    k, v = (f"layers.1.attn.{name}.weight" for name in "kv")
    b.weights[k], b.weights[v] = b.weights[v], b.weights[k]
    assert [(c.layer, c.role, c.cause) for c in compare(a, b)] == [
        (1, "k", "values"),
        (1, "v", "values"),
    ]


def test_frequencies_that_all_layers_share_change_in_all_of_them():
    a = llama_program(layers=3)
    b = changed(a, "inv_freq", lambda w: 500.0 ** (-torch.arange(len(w), dtype=w.dtype) / len(w)))
    found = compare(a, b)
    assert [c.layer for c in found] == [0, 1, 2]
    assert {(c.role, c.detail) for c in found} == {("inv_freq", "theta 10000 -> 500")}
    other = compare(a, changed(a, "inv_freq", lambda w: w / 4))
    assert {(c.cause, c.detail) for c in other} == {("scaled", "by 0.25")}


def test_weights_of_a_fused_projection_and_biases():
    a = gpt2_program()
    found = compare(a, changed(a, "h.1.attn.c_attn.weight", lambda w: w.flip(0)))
    assert [(c.layer, c.role, c.cause) for c in found] == [(1, "qkv", "rows permuted")]
    found = compare(a, changed(a, "h.1.mlp.c_fc.bias", lambda w: -w))
    assert [(c.layer, c.role, c.cause) for c in found] == [(1, "h.*.mlp.c_fc.bias", "negated")]
    tied = compare(a, changed(a, "wte.weight", lambda w: 2 * w))
    assert [(c.layer, c.cause) for c in tied] == [(None, "scaled")]  # once, though used twice


def test_gains_folded_into_columns_are_seen_as_such():
    a = llama_program()
    fused, _ = apply(FuseNorms(), a)
    details = {c.role: c.detail for c in compare(a, fused) if c.layer == 1}
    assert details["q"] == details["k"] == "each column by its own factor"
    assert "o" not in details


def test_weights_without_values_are_not_compared():
    a = llama_program()
    assert compare(a, to_meta(changed(a, "head.weight", lambda w: 2 * w))) == ()
