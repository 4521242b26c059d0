"""Outlines: what is kept of a graph, as data and back, and hashes of layers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cached import cached_program
from programs import gpt2_program, latent_program, llama_program
from random_edits import renamed

import kvxform.ir.ops as kvx
from kvxform.diffing.hashing import digest
from kvxform.diffing.outline import Outline
from kvxform.diffing.outline_data import parse_ranges
from kvxform.diffing.outline_fx import outline_program
from kvxform.diffing.outline_nodes import OutlineNode, bare_origin
from kvxform.ir.program import Program
from kvxform.ir.text import format_ranges

INT4 = {"codec": "int", "bits": 4}
PROGRAMS = {
    "llama": lambda: llama_program(layers=3, bias=True, tied=True),
    "one layer": lambda: llama_program(layers=1),
    "shared": lambda: llama_program(layers=3, shared=True),
    "sinks": lambda: llama_program(attention={"sink_logits": torch.randn(4), "window": 5}),
    "gpt2": gpt2_program,
    "latent": latent_program,
    "cached": lambda: cached_program({"key": INT4, "value": INT4}),
}


def node_of(outline: Outline, op: str, layer: int | None = 0) -> OutlineNode:
    return next(n for n in outline.nodes if n.op == op and n.layer == layer)


def like_captured(program: Program) -> Program:
    """Give equal layers equal origins, as capture does."""
    for node in program.graph.nodes:
        if "origin" in node.meta:
            node.meta["origin"] = bare_origin(node.meta["origin"]) + " (model.py:1)"
    return program


@pytest.mark.parametrize("name", PROGRAMS)
def test_data_and_back_is_the_same_outline(name: str) -> None:
    outline = outline_program(PROGRAMS[name]())
    text = json.dumps(outline.to_data(), sort_keys=True)
    assert Outline.from_data(json.loads(text)) == outline


@pytest.mark.parametrize("name", PROGRAMS)
def test_operands_come_first_and_the_output_last(name: str) -> None:
    outline = outline_program(PROGRAMS[name]())
    assert [node.key for node in outline.nodes] == list(range(len(outline.nodes)))
    assert all(key < node.key for node in outline.nodes for key in node.sources)
    assert outline.nodes[-1].op == "output"
    assert outline.operations == len(outline.nodes) - 1


def test_equal_layers_are_stored_once() -> None:
    small, large = (
        outline_program(like_captured(llama_program(layers=layers))) for layers in (4, 30)
    )
    data = large.to_data()
    assert len(data["graph"]["patterns"]) == 2  # a layer, and what is outside of layers
    texts = [json.dumps(outline.to_data(), separators=(",", ":")) for outline in (small, large)]
    assert len(texts[1]) < len(texts[0]) + 100
    assert len(texts[1]) < 8000
    assert len(set(large.layer_hashes().values())) == 3  # the first layer reads the embedding


def test_sizes_are_text_and_defaults_are_left_out() -> None:
    program = llama_program()
    outline = outline_program(program)
    assert not [node.op for node in outline.nodes if "sym_size" in node.op]
    view = node_of(outline, "aten.view")
    assert dict(view.attributes) == {"size": "[B, S, 4, 16]"}
    assert [kind for kind, _ in view.inputs] == ["node"]
    attention = node_of(outline, "kvx.attention")
    assert dict(attention.attributes) == {"scale": "0.25"}  # neither layer nor causal=True
    assert attention.roles == ("q", "k", "v", "positions")
    explicit = program.clone()
    node = explicit.attention_node(0)
    node.kwargs = {**node.kwargs, "causal": True, "window": None}
    assert outline_program(explicit) == outline


def test_a_size_is_read_from_the_shape_that_it_is_taken_of() -> None:
    program = llama_program()
    size = next(program.calls(torch.ops.aten.sym_size.int))
    size.args = (size.args[0], 1 - size.args[1])  # its recorded type is stale now
    views = [dict(n.attributes).get("size", "") for n in outline_program(program).nodes]
    assert "[S, S, 4, 16]" in views or "[B, B, 4, 16]" in views


def test_weights_are_operands_with_type_and_place() -> None:
    linear = node_of(outline_program(llama_program(bias=True)), "aten.linear")
    assert linear.inputs[1:] == (("weight", "f64[64, 32]"), ("weight", "f64[64]"))
    assert linear.roles == ("input", "weight", "bias")
    assert linear.weights == ("layers.0.attn.q.weight", "layers.0.attn.q.bias")


def test_lists_stay_lists() -> None:
    cat = node_of(outline_program(latent_program()), "aten.cat")
    (kind, items), *_ = cat.inputs
    assert kind == "list"
    assert [kind for kind, _ in items] == ["node", "node"]
    assert cat.operands == items


def test_an_attention_that_names_another_layer_says_how_far() -> None:
    program = llama_program(layers=3)
    node = program.attention_node(2)
    node.kwargs = {**node.kwargs, "layer": 1}
    assert ("layer", "-1") in node_of(outline_program(program), "kvx.attention", 2).attributes


def test_hashes_see_operations_and_not_names() -> None:
    program = llama_program(layers=4)
    hashes = outline_program(program).layer_hashes()
    assert hashes == outline_program(renamed(program)).layer_hashes()
    changed = program.clone()
    node = changed.attention_node(2)
    node.kwargs = {**node.kwargs, "window": 5}
    after = outline_program(changed).layer_hashes()
    assert [layer for layer in hashes if hashes[layer] != after[layer]] == [2]


def test_hashes_see_which_value_of_another_layer_is_read() -> None:
    program = llama_program(layers=3)
    hashes = outline_program(program).layer_hashes()
    middle, end = list(program.calls(torch.ops.aten.add.Tensor))[2:4]  # both of layer 1
    norm = next(user for user in end.users if user.target is kvx.RMS_NORM)
    norm.replace_input_with(end, middle)
    after = outline_program(program).layer_hashes()
    assert hashes[2] != after[2]
    assert hashes[0] == after[0]


def test_hashes_do_not_see_the_order_of_independent_operations() -> None:
    program = llama_program(layers=2)
    hashes = outline_program(program).layer_hashes()
    q, k = list(program.calls(kvx.ROPE))[:2]
    k.append(q)  # k comes first now
    assert outline_program(program).layer_hashes() == hashes


def test_digests_of_constants_can_be_left_out() -> None:
    outline = outline_program(cached_program({"key": INT4, "value": INT4}))
    assert outline.without_digests() == outline
    fields = tuple(sorted({**dict(outline.plan[0].fields), "key.codec.x.digest": "ab"}.items()))
    with_digest = type(outline.plan[0])(0, fields)
    kept = Outline("program", "m", outline.nodes, plan=(with_digest,)).without_digests()
    assert kept.plan == outline.plan[:1]


def test_data_of_no_graph_is_refused() -> None:
    data = outline_program(llama_program(layers=1)).to_data()
    rows = data["graph"]["patterns"][1]
    rows[0]["inputs"][0] = str(len(rows) - 1)  # the first operation reads the last one
    with pytest.raises(ValueError, match="circle"):
        Outline.from_data(data)
    del rows[0]["op"]
    with pytest.raises(KeyError):
        Outline.from_data(data)


@pytest.mark.parametrize("numbers", [[], [3], [0, 1, 2], [0, 2, 3, 9]])
def test_ranges_and_back(numbers: list[int]) -> None:
    assert parse_ranges(format_ranges(numbers)) == numbers


@pytest.mark.slow
def test_another_process_gives_the_same_outline() -> None:
    code = (
        "import json;from cached import cached_program;"
        "from kvxform.diffing.hashing import digest;"
        "from kvxform.diffing.outline_fx import outline_program;"
        "c={'codec':'int','bits':4};"
        "print(digest(outline_program(cached_program({'key':c,'value':c})).to_data()))"
    )
    tests = str(Path(__file__).parents[1])
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": tests, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2"},
        check=True,
        capture_output=True,
        text=True,
    )
    program = cached_program({"key": INT4, "value": INT4})
    assert found.stdout.strip() == digest(outline_program(program).to_data())
