"""Alignment: layers, repeated parts, and what no hash can tell."""

from __future__ import annotations

import random

import pytest
import torch
from programs import Builder, gpt2_program, llama_program
from random_edits import renamed
from torch import fx

import kvxform.ir.ops as kvx
from kvxform.diffing.align import Alignment, align
from kvxform.diffing.outline import Outline
from kvxform.diffing.outline_fx import outline_program
from kvxform.diffing.structure import compare_outlines
from kvxform.ir.program import AttentionSite, Program

aten = torch.ops.aten


def outlines(a: Program, b: Program) -> tuple[Outline, Outline, Alignment]:
    left, right = outline_program(a), outline_program(b)
    return left, right, align(left, right)


def expert_program(experts: int = 4, layers: int = 2) -> Program:
    """Return layers in which equal experts read the same norm, each with its own weights."""
    b = Builder(torch.float64, 0)
    ids, positions = b.input("input_ids"), b.input("position_ids")
    x = b.call(aten.embedding.default, b.weight("embed", 48, 32), ids)
    sites = []
    for layer in range(layers):
        b.module = f"layers.{layer}"
        h = b.call(kvx.RMS_NORM, x, b.weight(f"{b.module}.norm1", 32), 1e-5)
        q, k, v = (b.heads(b.linear(h, f"{b.module}.{n}", 32), 2, 16) for n in "qkv")
        a = b.call(kvx.ATTENTION, q, k, v, positions, layer=layer, scale=0.25)
        x = b.call(aten.add.Tensor, x, b.linear(b.merge_heads(a, 32), f"{b.module}.o", 32))
        h = b.call(kvx.RMS_NORM, x, b.weight(f"{b.module}.norm2", 32), 1e-5)
        for expert in range(experts):
            b.module = f"layers.{layer}.experts.{expert}"
            up = b.call(aten.silu.default, b.linear(h, f"{b.module}.up", 64))
            x = b.call(aten.add.Tensor, x, b.linear(up, f"{b.module}.down", 32))
        sites.append(AttentionSite(layer, f"layers.{layer}", 2, 2, 16, 16, 0.25))
    b.module = "head"
    return b.finish(b.linear(x, "head", 48), sites, 48)


def parallel_experts(experts: int = 3) -> Program:
    """Return a layer whose experts are equal in every way, joined in one list."""
    b = Builder(torch.float64, 0)
    x = b.call(aten.embedding.default, b.weight("embed", 48, 32), b.input("input_ids"))
    made = []
    for expert in range(experts):
        up = b.call(aten.silu.default, b.linear(x, f"experts.{expert}.up", 64))
        made.append(b.linear(up, f"experts.{expert}.down", 32))
    stacked = b.call(aten.stack.default, made)
    total = b.call(aten.sum.dim_IntList, stacked, [0])
    return b.finish(b.linear(total, "head", 48), [], 48)


def shuffled(program: Program, seed: int) -> Program:
    """Return the same program with independent operations in another order."""
    clone, rng = program.clone(), random.Random(seed)
    nodes: list[fx.Node] = [n for n in clone.graph.nodes if n.op != "placeholder"]
    left = {n: {i for i in n.all_input_nodes if i.op != "placeholder"} for n in nodes}
    root = [n for n in clone.graph.nodes if n.op == "placeholder"][-1]
    while left:
        ready = [n for n in left if not left[n] and (n.op != "output" or len(left) == 1)]
        node = rng.choice(ready)
        root.append(node)
        root = node
        del left[node]
        for needs in left.values():
            needs.discard(node)
    clone.graph.lint()
    return clone


@pytest.mark.parametrize("build", [llama_program, gpt2_program, expert_program, parallel_experts])
def test_a_program_is_itself_in_any_order_and_by_any_name(build: type[Program]) -> None:
    program = build()
    for seed in range(3):
        a, b, found = outlines(program, renamed(shuffled(program, seed)))
        assert not found.only_a
        assert not found.only_b
        assert not compare_outlines(a, b, found).nodes
        for x, y in found.pairs:  # weights tell whether equal operations were mixed up
            assert [f"w.{name}" for name in a.nodes[x].weights] == list(b.nodes[y].weights)


def test_one_of_many_equal_experts_is_found() -> None:
    program = expert_program()
    changed = program.clone()
    target = "layers.1.experts.2.up.weight"
    up = next(n for n in changed.calls(aten.linear.default) if n.args[1].target == target)
    next(iter(up.users)).target = aten.gelu.default
    a, b, found = outlines(program, changed)
    (change,) = compare_outlines(a, b, found).nodes
    assert (change.layer, change.what) == (1, "aten.silu -> aten.gelu")
    assert change.module == "layers.1.experts.2"


def test_one_expert_less_is_one_expert_less() -> None:
    a, _, found = outlines(expert_program(4), expert_program(3))
    assert not found.only_b
    assert sorted(a.nodes[x].op for x in found.only_a) == sorted(
        2 * ["aten.linear", "aten.silu", "aten.linear", "aten.add.Tensor"]
    )
    assert {a.nodes[x].layer for x in found.only_a} == {0, 1}


@pytest.mark.parametrize("count", [2, 5])
def test_layers_are_aligned_by_place_when_nothing_tells_them_apart(count: int) -> None:
    a = outline_program(llama_program(layers=4))
    b = outline_program(renamed(llama_program(layers=count)))
    found = align(a, b)
    common = min(4, count)
    assert [pair for pair in found.layers if None not in pair] == [(k, k) for k in range(common)]


def test_equal_counts_are_not_shifted_by_names() -> None:
    program = llama_program(layers=3)
    moved = program.clone()
    for node in moved.graph.nodes:
        if "module" in node.meta:
            for layer in (2, 1, 0):
                old, new = f"layers.{layer}.", f"layers.{layer + 1}."
                node.meta["module"] = node.meta["module"].replace(old, new)
    _, _, found = outlines(program, moved)
    assert found.layers == ((0, 0), (1, 1), (2, 2))
    assert not found.only_a


def test_layers_of_another_kind_find_their_like() -> None:
    windows = [None, 5, None, 5]
    a = llama_program(layers=4)
    b = llama_program(layers=3)
    for program, kinds in ((a, windows), (b, windows[1:])):
        for layer, window in enumerate(kinds):
            node = program.attention_node(layer)
            node.kwargs = {**node.kwargs, "window": window, "softcap": window and 30.0}
    _, _, found = outlines(a, b)
    assert found.layers == ((0, None), (1, 0), (2, 1), (3, 2))


def test_unrelated_models_still_give_an_answer() -> None:
    a, b, found = outlines(llama_program(layers=2), gpt2_program())
    assert len(found.pairs) + len(found.only_a) == len(a.nodes)
    assert len(found.pairs) + len(found.only_b) == len(b.nodes)
    assert all(a.nodes[x].op == b.nodes[y].op for x, y in found.pairs)
    back = align(b, a)
    assert len(back.pairs) == len(found.pairs)
