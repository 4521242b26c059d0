"""Plans, figures and folding of a diff."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from cached import cached_program
from programs import apply, gpt2_program, llama_program
from random_edits import renamed

from kvxform.diffing.align import align
from kvxform.diffing.fields import flatten
from kvxform.diffing.folding import fold_changes
from kvxform.diffing.metrics import CACHED_TOKENS, compare_metrics, flops_per_token
from kvxform.diffing.outline_fx import outline_program
from kvxform.diffing.plans import compare_plans
from kvxform.diffing.records import NodeChange, PlanChange, WeightChange
from kvxform.diffing.structure import compare_outlines
from kvxform.ir.plan import Layout
from kvxform.ir.program import Program
from kvxform.ir.stream_plan import Regions
from kvxform.passes.rotation.fuse_norms import FuseNorms
from kvxform.passes.rotation.rotate_qk import RotateQk

INT4 = {"codec": "int", "bits": 4}
INT4_TEXT = "int(axis=token, bits=4, clip=1.0, zero=int)"


def int4(**model: Any) -> Program:
    return cached_program({"key": INT4, "value": INT4}, **model)


def plans(a: Program, b: Program) -> list[tuple[int | None, str, str, str, str]]:
    changes = compare_plans(outline_program(a), outline_program(b))
    return [dataclasses.astuple(change) for change in changes]


def test_equal_plans_and_other_names_differ_in_nothing() -> None:
    program = int4()
    assert plans(program, program) == []
    assert plans(llama_program(), renamed(llama_program())) == []


def test_fields_of_a_stream_are_told_by_path() -> None:
    a, b = int4(layers=3), int4(layers=3)
    key = b.plan.site(1).key
    changed = dataclasses.replace(
        key, codec={**key.codec, "bits": 2}, regions=Regions(sink=4, recent=16)
    )
    b.plan = b.plan.replace_site(1, key=changed)
    assert plans(a, b) == [
        (1, "key", "codec.bits", "4", "2"),
        (1, "key", "regions.recent", "0", "16"),
        (1, "key", "regions.sink", "0", "4"),
    ]


def test_another_codec_basis_or_layout_is_one_change() -> None:
    a = cached_program(page_size=None)
    b, _ = apply(RotateQk(), int4())
    assert plans(a, b) == [
        (None, "", "layout", "contiguous", "paged(page_size=16)"),
        *(
            change
            for layer in range(2)
            for change in (
                (layer, "key", "basis", "identity", "hadamard(block=16)"),
                (layer, "key", "codec", "none(dtype=float64)", INT4_TEXT),
                (layer, "key", "regions.dtype", "float64", "float16"),
                (layer, "value", "codec", "none(dtype=float64)", INT4_TEXT),
                (layer, "value", "regions.dtype", "float64", "float16"),
            )
        ),
    ]


def test_a_model_without_rope_is_one_change_a_layer() -> None:
    changes = plans(llama_program(layers=1), llama_program(layers=1, rotary_dim=0))
    words = "attention_scaling=1.0, inv_freq=f64[8], rotary_dim=16"
    assert changes == [(0, "", "rope", words, "")]


def test_an_owner_is_told_as_a_layer() -> None:
    a, b = int4(layers=3), int4(layers=3)
    b.plan = b.plan.replace_site(2, owner=0)
    assert plans(a, b) == [(2, "", "owner", "layer 2", "layer 0")]


def test_geometry_and_layout_are_fields_too() -> None:
    a, b = int4(), int4()
    b.sites = (a.sites[0], dataclasses.replace(a.sites[1], window=7))
    b.plan = dataclasses.replace(b.plan, layout=Layout("paged", 32))
    b.info = dataclasses.replace(b.info, eos_token_ids=(1, 2), name="other")
    assert plans(a, b) == [
        (None, "", "layout.page_size", "16", "32"),
        (None, "", "model.eos_token_ids", "[]", "[1, 2]"),
        (1, "", "window", "", "7"),
    ]


def test_a_cache_that_only_one_side_has_is_one_change() -> None:
    plain = llama_program()
    plain.info = dataclasses.replace(plain.info, context_length=None)
    assert plans(plain, int4()) == [(None, "", "cache", "none", "paged")]
    assert plans(int4(), plain) == [(None, "", "cache", "paged", "none")]


def test_layers_are_compared_with_their_partners() -> None:
    a, b = int4(layers=3), int4(layers=2)
    for program, bits in ((a, (8, 4, 2)), (b, (4, 2))):
        for layer, count in enumerate(bits):
            key = program.plan.site(layer).key
            codec = {**key.codec, "bits": count}
            program.plan = program.plan.replace_site(
                layer, key=dataclasses.replace(key, codec=codec)
            )
    left, right = outline_program(a), outline_program(b)
    assert len(compare_plans(left, right, ((0, None), (1, 0), (2, 1)))) == 0
    assert len(compare_plans(left, right, ((0, 0), (1, 1), (2, None)))) == 2


def test_long_constants_are_a_shape_and_a_digest() -> None:
    table = [[0.5] * 16, [0.25] * 16]
    fields = dict(flatten({"codec": {"book": table, "short": [1, 2]}}))
    assert fields["codec.book"] == "2 x 16 numbers"
    assert fields["codec.short"] == "[1, 2]"
    other = dict(flatten({"codec": {"book": [table[0], table[0]]}}))
    assert fields["codec.book.digest"] != other["codec.book.digest"]


def test_a_digest_that_one_side_lacks_is_no_change() -> None:
    outline = outline_program(int4())
    fields = tuple(sorted({**dict(outline.plan[0].fields), "key.codec.x.digest": "ab"}.items()))
    plan = (dataclasses.replace(outline.plan[0], fields=fields), *outline.plan[1:])
    full = dataclasses.replace(outline, plan=plan)
    assert compare_plans(full, outline) == compare_plans(outline, full) == ()
    changed = tuple((path, "cd" if path.endswith("digest") else value) for path, value in fields)
    other = dataclasses.replace(outline, plan=(dataclasses.replace(plan[0], fields=changed),))
    (change,) = compare_plans(full, other)[:1]
    assert (change.field, change.before, change.after) == ("codec.x.digest", "ab", "cd")


def test_flops_are_products_of_matrices_and_attention() -> None:
    program = llama_program(layers=1, heads=4, kv_heads=2, head_dim=16)
    width, vocab, inner = 32, 48, 64
    q, k, v, o = 64 * width, 32 * width, 32 * width, 64 * width
    mlp = 3 * width * inner
    attention = CACHED_TOKENS * 4 * (16 + 16)
    expected = 2 * (q + k + v + o + mlp + vocab * width + attention)
    assert flops_per_token(outline_program(program).nodes) == expected
    node = program.attention_node(0)
    node.kwargs = {**node.kwargs, "window": 10}
    less = expected - 2 * (CACHED_TOKENS - 10) * 4 * (16 + 16)
    assert flops_per_token(outline_program(program).nodes) == less


def test_flops_of_a_transposed_layout() -> None:
    outline = outline_program(gpt2_program())
    flops = flops_per_token(outline.nodes)
    products = [n for n in outline.nodes if n.op == "aten.addmm"]
    sizes = [n.inputs[2][1].removeprefix("f64[").removesuffix("]").split(", ") for n in products]
    assert flops > 2 * sum(int(rows) * int(columns) for rows, columns in sizes)


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_count_once(tied: bool) -> None:
    program = llama_program(tied=tied)
    metrics = outline_program(program).metrics
    assert metrics["parameters"] == sum(w.numel() for w in program.weights.values())
    assert metrics["parameter_bytes"] == 8 * metrics["parameters"]


def test_metrics_of_a_cache_are_those_of_its_plan() -> None:
    a, b = int4(), cached_program({"key": INT4, "value": {**INT4, "bits": 2}})
    found = {c.name: c for c in compare_metrics(outline_program(a), outline_program(b))}
    assert found["kv_bytes_per_token"].before == a.plan.bytes_per_token
    assert found["bits_per_value"].after == b.plan.bits_per_value
    assert not found["read_bytes"].is_equal
    assert found["parameters"].is_equal
    plain = {
        c.name: c for c in compare_metrics(outline_program(llama_program()), outline_program(b))
    }
    assert plain["kv_bytes_per_token"].before is None
    assert not plain["kv_bytes_per_token"].is_equal


def test_equal_changes_of_many_layers_are_one() -> None:
    a, b = llama_program(layers=5), llama_program(layers=5)
    for layer in (0, 1, 3, 4):
        node = b.attention_node(layer)
        node.kwargs = {**node.kwargs, "window": 9 if layer == 3 else 5}
    left, right = outline_program(a), outline_program(b)
    folded = fold_changes(compare_outlines(left, right, align(left, right)).nodes)
    assert [(f.layers, f.change.what) for f in folded] == [
        ((0, 1, 4), "window default -> 5"),
        ((3,), "window default -> 9"),
    ]


def test_the_first_layer_folds_with_the_others() -> None:
    base = cached_program(layers=3)
    rotated, _ = apply(FuseNorms(), base)
    left, right = outline_program(base), outline_program(rotated)
    folded = fold_changes(compare_outlines(left, right, align(left, right)).nodes)
    assert [(f.layers, f.change.kind, f.change.what) for f in folded] == [
        ((0, 1, 2), "rewired", "weight f64[32] -> nothing"),
        ((0, 1, 2), "rewired", "weight f64[32] -> nothing"),
        ((), "rewired", "weight f64[32] -> nothing"),
    ]


def test_folding_knows_relative_layers_and_worst_weights() -> None:
    owners = [
        PlanChange(layer, "", "owner", f"layer {layer}", f"layer {layer - 1}")
        for layer in (1, 3, 5)
    ]
    (owner,) = fold_changes(owners)
    assert owner.layers == (1, 3, 5)
    weights = [WeightChange(layer, "q", "values", 0.1 * layer) for layer in (1, 3, 2)]
    (weight,) = fold_changes(weights)
    assert weight.change.layer == 3
    assert weight.layers == (1, 2, 3)
    outside = NodeChange("added", None, "aten.neg", "neg added")
    inside = dataclasses.replace(outside, layer=0)
    assert [f.layers for f in fold_changes([outside, inside, outside])] == [(), (0,)]
    assert [f.count for f in fold_changes([outside, inside, outside])] == [2, 1]


def test_dtype_of_the_model_is_a_field() -> None:
    changes = plans(llama_program(), llama_program(dtype=torch.float32))
    assert (None, "", "model.dtype", "float64", "float32") in changes
