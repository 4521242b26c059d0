"""Structure of a diff: random edits are all seen, names are not, consequences are left out."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cached import cached_program
from programs import apply, gpt2_program, latent_program, llama_program
from random_edits import random_edit, renamed

import kvxform.ir.ops as kvx
from kvxform.diffing.align import align
from kvxform.diffing.outline import Outline
from kvxform.diffing.outline_fx import outline_program
from kvxform.diffing.records import NodeChange, StructureDiff
from kvxform.diffing.structure import compare_outlines
from kvxform.ir.program import Program
from kvxform.passes.rotation.rotate_qk import RotateQk

aten = torch.ops.aten
SEEDS = 200
BASES = {
    "llama": lambda: llama_program(layers=3),
    "gpt2": gpt2_program,
    "latent": latent_program,
    "cached": cached_program,
}


def compare(a: Outline, b: Outline) -> StructureDiff:
    return compare_outlines(a, b, align(a, b))


def diff(a: Program, b: Program) -> StructureDiff:
    return compare(outline_program(a), outline_program(b))


def one(found: StructureDiff) -> NodeChange:
    assert len(found.nodes) == 1, [change.what for change in found.nodes]
    return found.nodes[0]


@pytest.mark.parametrize("name", BASES)
def test_every_random_edit_is_seen_in_its_layer(name: str) -> None:
    base = BASES[name]()
    before = outline_program(base)
    kinds = set()
    for seed in range(SEEDS // len(BASES)):
        edit = random_edit(base, seed)
        found = compare(before, outline_program(edit.program))
        told = [(change.layer, change.kind, change.what) for change in found.nodes]
        assert {change.kind for change in found.nodes} & edit.changes, (seed, edit.kind, told)
        assert {change.layer for change in found.nodes} <= edit.layers, (seed, edit.kind, told)
        assert edit.kind in ("remove", "narrow") or len(told) == 1, (seed, edit.kind, told)
        kinds.add(edit.kind)
        if seed % 5 == 0:  # the other way round
            back = compare(outline_program(edit.program), before)
            assert {change.layer for change in back.nodes} <= edit.layers, (seed, edit.kind)
            assert len(back.nodes) == len(told)
    assert len(kinds) >= 5


@pytest.mark.parametrize("name", BASES)
def test_the_same_edit_is_seen_under_other_names(name: str) -> None:
    base = BASES[name]()
    before = outline_program(base)
    for seed in range(4):
        edit = random_edit(base, seed)
        plain = compare(before, outline_program(edit.program))
        other = compare(before, outline_program(renamed(edit.program)))
        assert [c.what for c in plain.nodes if c.kind != "rewired"] == [
            c.what for c in other.nodes if c.kind != "rewired"
        ]
        assert [(c.kind, c.layer, c.op) for c in plain.nodes] == [
            (c.kind, c.layer, c.op) for c in other.nodes
        ]


@pytest.mark.parametrize("name", BASES)
def test_a_program_is_the_same_as_itself_under_other_names(name: str) -> None:
    program = BASES[name]()
    same = diff(program, program)
    assert same == StructureDiff()
    other = diff(program, renamed(program))
    assert other == dataclasses.replace(same, renamed=other.renamed, moved=other.moved)
    assert other.renamed > 10
    assert other.moved > 10


def test_a_changed_number_is_told_with_both_values() -> None:
    base = llama_program(layers=3)
    changed = base.clone()
    node = changed.attention_node(1)
    node.kwargs = {**node.kwargs, "scale": 1.0, "window": 5}
    change = one(diff(base, changed))
    assert (change.kind, change.layer, change.op) == ("changed", 1, "kvx.attention")
    assert change.what == "scale 0.25 -> 1.0; window default -> 5"
    assert "scale=0.25" in change.before
    assert "window=5" in change.after
    assert "layers.1" not in change.before  # lines hold no names


def test_what_reads_an_inserted_operation_is_not_rewired() -> None:
    base = cached_program(layers=3)
    rotated, _ = apply(RotateQk(), base)
    found = diff(base, rotated)
    assert {(c.kind, c.op) for c in found.nodes} == {("added", "kvx.hadamard")}
    assert [c.layer for c in found.nodes] == [0, 0, 1, 1, 2, 2]
    assert {c.via for c in found.nodes} == {("rotate-qk",)}
    assert found.histogram[0].after == 6
    back = diff(rotated, base)
    assert {(c.kind, c.op) for c in back.nodes} == {("removed", "kvx.hadamard")}


def test_a_type_that_follows_from_another_is_not_reported() -> None:
    base = llama_program(layers=2)
    narrowed = base.clone()
    name = "layers.1.attn.k.weight"
    narrowed.weights[name] = narrowed.weights[name].half()
    change = one(diff(base, narrowed))
    assert (change.kind, change.layer) == ("retyped", 1)
    assert change.what == "weight f64[32, 32] -> f16[32, 32]"


def test_a_retyped_result_without_a_reason_is_reported() -> None:
    base = llama_program(layers=2)
    changed = base.clone()
    for node in changed.calls(kvx.ATTENTION):
        node.meta["type"] = type(node.meta["type"])(torch.float16, node.meta["type"].shape)
    found = diff(base, changed)
    assert {(c.kind, c.op) for c in found.nodes} >= {("retyped", "kvx.attention")}


def test_operands_of_a_sum_may_change_places() -> None:
    base = llama_program(layers=2)
    swapped = base.clone()
    sums = list(swapped.calls(aten.add.Tensor))
    for node in sums:
        node.args = (node.args[1], node.args[0])
    assert not diff(base, swapped).nodes
    sums[0].target = aten.sub.Tensor
    assert one(diff(base, swapped)).what.startswith("aten.add.Tensor -> aten.sub.Tensor")


def test_operands_of_a_difference_may_not() -> None:
    base = llama_program(layers=2)
    for node in base.calls(aten.add.Tensor):
        node.target = aten.sub.Tensor
    swapped = base.clone()
    node = next(swapped.calls(aten.sub.Tensor))
    node.args = (node.args[1], node.args[0])
    assert one(diff(base, swapped)).kind == "rewired"


def test_another_output_is_seen() -> None:
    base = llama_program(layers=2)
    changed = base.clone()
    norm = list(changed.calls(kvx.RMS_NORM))[-1]
    with changed.graph.inserting_before(norm.next):
        twice = changed.graph.call_function(aten.neg.default, (norm,))
    twice.meta = dict(norm.meta)
    output = next(n for n in changed.graph.nodes if n.op == "output")
    output.args = (twice,)
    changed.graph.eliminate_dead_code()
    found = diff(base, changed)
    assert ("removed", "aten.linear") in {(c.kind, c.op) for c in found.nodes}
    assert [(p.kind, p.before, p.after) for p in found.ports] == [
        ("output", "f64[B, S, 48]", "f64[B, S, 32]")
    ]


def test_planes_of_the_cache_are_part_of_the_signature() -> None:
    codes = {"codec": "int", "bits": 4}
    a = cached_program({"key": codes, "value": codes})
    b = cached_program({"key": {**codes, "bits": 2}, "value": codes})
    found = diff(a, b)
    assert [(p.name, p.before, p.after) for p in found.ports] == [
        (f"layer {layer} key.codes", "uint8[2, T, 8]", "uint8[2, T, 4]") for layer in (0, 1)
    ]
    assert not found.nodes


@pytest.mark.parametrize("missing", [0, 1, 3])
def test_a_missing_layer_is_told_as_a_layer(missing: int) -> None:
    whole = llama_program(layers=4)
    short = llama_program(layers=3)
    calls = (node for node in short.graph.nodes if node.op != "output")
    for node in calls:  # the names that the layers would have had
        for layer in reversed(range(missing, 3)):
            module = node.meta["module"].replace(f"layers.{layer}.", f"layers.{layer + 1}.")
            node.meta["module"] = module
    found = diff(whole, short)
    assert found.layers_removed == (missing,)
    assert {c.kind for c in found.nodes} == {"removed"}
    assert {c.layer for c in found.nodes} == {missing}
    back = diff(short, whole)
    assert back.layers_added == (missing,)
    assert {(c.kind, c.layer) for c in back.nodes} == {("added", missing)}
