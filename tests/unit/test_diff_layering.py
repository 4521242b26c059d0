"""Layers told from the flow of data; paths of modules are the reference, and are never read."""

from __future__ import annotations

import re

import pytest
import torch
from cached import cached_program
from programs import Builder, gpt2_program, latent_program, llama_program
from random_edits import layer_of, renamed

import kvxform.ir.ops as kvx
from kvxform.diffing.outline import Outline
from kvxform.diffing.outline_fx import outline_program
from kvxform.ir.program import AttentionSite, Program

aten = torch.ops.aten
PROGRAMS = {
    "llama": lambda: llama_program(layers=4),
    "one layer": lambda: llama_program(layers=1),
    "shared keys and values": lambda: llama_program(layers=4, shared=True),
    "gpt2": gpt2_program,
    "latent": latent_program,
    "cached": cached_program,
}
FAMILIES = ("mixtral", "gemma2", "gptj", "deepseek_v3", "olmo2", "falcon", "opt", "bloom")


def by_path(outline: Outline) -> list[int | None]:
    found = (re.search(r"\b(?:layers|h|blocks)\.(\d+)\b", n.module) for n in outline.nodes)
    return [int(match[1]) if match else None for match in found]


@pytest.mark.parametrize("name", PROGRAMS)
def test_layers_are_those_of_the_modules(name: str) -> None:
    outline = outline_program(PROGRAMS[name]())
    assert [node.layer for node in outline.nodes] == by_path(outline)
    assert None in by_path(outline)


@pytest.mark.parametrize("name", PROGRAMS)
def test_paths_of_modules_do_not_matter(name: str) -> None:
    program = PROGRAMS[name]()
    layers = [node.layer for node in outline_program(program).nodes]
    assert [node.layer for node in outline_program(renamed(program)).nodes] == layers
    for node in program.graph.nodes:
        if node.op == "call_function":
            node.meta["module"] = "same"
    assert [node.layer for node in outline_program(program).nodes] == layers


def two_blocks(*, parallel: bool, post_norm: bool, gate: bool = False) -> Program:
    """Return two layers of attention and MLP, arranged as some families do."""
    b = Builder(torch.float64, 0)
    ids, positions = b.input("input_ids"), b.input("position_ids")
    x = b.call(aten.embedding.default, b.weight("embed", 48, 32), ids)
    sites = []

    def norm(x: torch.fx.Node, name: str) -> torch.fx.Node:
        return b.call(kvx.RMS_NORM, x, b.weight(name, 32), 1e-5)

    for layer in range(2):
        b.module = f"layers.{layer}"
        h = x if post_norm else norm(x, f"{b.module}.norm1")
        q, k, v = (b.heads(b.linear(h, f"{b.module}.{n}", 32), 2, 16) for n in "qkv")
        a = b.call(kvx.ATTENTION, q, k, v, positions, layer=layer, scale=0.25)
        merged = b.merge_heads(a, 32)
        if gate:
            opened = b.call(aten.sigmoid.default, b.linear(h, f"{b.module}.gate", 32))
            merged = b.call(aten.mul.Tensor, merged, opened)
        attended = b.linear(merged, f"{b.module}.o", 32)
        if not parallel:
            x = b.call(aten.add.Tensor, x, attended)
            x = norm(x, f"{b.module}.norm2") if post_norm else x
            h = x if post_norm else norm(x, f"{b.module}.norm3")
        up = b.call(aten.relu.default, b.linear(h, f"{b.module}.up", 64))
        made = b.linear(up, f"{b.module}.down", 32)
        made = b.call(aten.add.Tensor, made, attended) if parallel else made
        x = b.call(aten.add.Tensor, x, made)
        x = norm(x, f"{b.module}.norm4") if post_norm else x
        sites.append(AttentionSite(layer, b.module, 2, 2, 16, 16, 0.25))
    b.module = "head"
    x = x if post_norm else norm(x, "norm")
    return b.finish(b.linear(x, "head", 48), sites, 48)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("parallel", [False, True])
def test_however_a_layer_is_arranged(parallel: bool, post_norm: bool, gate: bool) -> None:
    outline = outline_program(two_blocks(parallel=parallel, post_norm=post_norm, gate=gate))
    assert [node.layer for node in outline.nodes] == by_path(outline)


def test_a_constant_of_one_layer_belongs_to_it_and_one_of_many_does_not() -> None:
    program = llama_program(layers=3)
    sums = list(program.calls(aten.add.Tensor))
    for node, readers in ((sums[2], sums[2:3]), (sums[0], sums)):
        with program.graph.inserting_before(sums[0]):
            made = program.graph.call_function(aten.ones.default, ([32],))
        made.meta = {**node.meta, "module": ""}
        for reader in readers:
            with program.graph.inserting_before(reader):
                scaled = program.graph.call_function(aten.mul.Tensor, (reader.args[1], made))
            scaled.meta = dict(reader.meta)
            reader.args = (reader.args[0], scaled)
    ones = [n for n in outline_program(program).nodes if n.op == "aten.ones"]
    assert sorted((n.layer is None, n.layer) for n in ones) == [(False, 1), (True, None)]


def test_a_graph_without_attention_has_no_layers() -> None:
    b = Builder(torch.float64, 0)
    x = b.call(aten.embedding.default, b.weight("embed", 48, 32), b.input("input_ids"))
    outline = outline_program(b.finish(b.linear(x, "head", 48), [], 48))
    assert outline.layers == ()
    assert {node.layer for node in outline.nodes} == {None}


def test_a_bypass_keeps_later_layers_where_they_are() -> None:
    program = llama_program(layers=3)
    linears = {str(n.args[1].target): n for n in program.calls(aten.linear.default)}
    up = linears["layers.2.mlp.up.weight"]
    up.args = (linears["layers.1.mlp.up.weight"].args[0], *up.args[1:])  # a norm of layer 1
    nodes = outline_program(program).nodes
    up_layers = [n.layer for n in nodes if n.weights == ("layers.2.mlp.up.weight",)]
    assert up_layers == [2]
    assert layer_of(up) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_layers_of_captured_families(name: str) -> None:
    from families import ALL

    from kvxform.capture import capture

    program = capture(ALL[name].build(torch.float32)).program
    outline = outline_program(program)
    assert [node.layer for node in outline.nodes] == by_path(outline)
    assert Outline.from_data(outline.to_data()) == outline
