"""Parts of programs: what they compute, that they are valid, and where they can be cut."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from programs import gpt2_program, llama_program

import kvxform.ir.ops as kvx
from kvxform.bisecting.cutting import (
    cut_program,
    inputs_of,
    operations,
    record,
    width_of,
)
from kvxform.bisecting.flow import Flow
from kvxform.ir.artifact import load_program, save_program
from kvxform.ir.program import default_positions
from kvxform.ir.verify import verify_program
from kvxform.runtime.model import OptimizedModel
from kvxform.verify.probe import make_probe


def names(nodes):
    return [node.name for node in nodes]


def node_of(program, name):
    return next(node for node in program.graph.nodes if node.name == name)


def linears(program):
    return [node.name for node in program.calls(torch.ops.aten.linear.default)]


def test_the_nearest_cuts_around_a_projection_of_values_and_the_output_projection():
    program = llama_program(layers=2)
    flow = Flow(program)
    _, _, v, o = linears(program)[7:11]  # q, k, v, o of layer 1
    anchors = [node_of(program, v), node_of(program, o)]
    ends = flow.ends(anchors)
    assert ends[0].name == o  # values reach the logits through it alone
    norm = next(n for n in flow.entries(anchors, ends[0]))
    assert norm.target is kvx.RMS_NORM
    assert norm.name == node_of(program, v).args[0].name


def test_the_residual_stream_is_the_entry_where_the_end_is_behind_the_sum():
    program = llama_program(layers=2)
    flow = Flow(program)
    attention = program.attention_node(1)
    total = next(n for n in flow.ends([attention]) if n.target is torch.ops.aten.add.Tensor)
    entry = flow.entries([attention], total)[0]
    assert entry.target is torch.ops.aten.add.Tensor
    assert entry.meta["module"] == "layers.0.mlp"


@pytest.mark.parametrize("make", [llama_program, gpt2_program])
def test_a_part_computes_what_the_whole_computes(make):
    program = make(layers=2)
    flow = Flow(program)
    attention = program.attention_node(1)
    probe = make_probe(program.info.vocab_size, (9,))
    whole = record(program, names(n for n in flow.nodes if width_of(n)), probe)
    for end in [n for n in flow.ends([attention]) if width_of(n)][:6]:
        entry = next(n for n in flow.entries([attention], end) if width_of(n))
        part = cut_program(program, {entry.name: whole[entry.name]}, end.name)
        verify_program(part)
        ids = torch.arange(9)[None]  # row i of a table is token i of the probe
        got = part.to_module()(ids, default_positions(ids))[0]
        torch.testing.assert_close(got, whole[end.name], rtol=1e-12, atol=1e-12)
        assert inputs_of(part) == [entry.name]
        assert [site.layer for site in part.sites] == [1]


def test_cutting_changes_nothing_of_the_whole():
    program = llama_program(layers=2)
    before, weights = str(program.graph), dict(program.weights)
    flow = Flow(program)
    end = flow.ends([program.attention_node(0)])[0]
    entry = flow.entries([program.attention_node(0)], end)[0]
    rows = record(program, [entry.name], make_probe(program.info.vocab_size, (5,)))
    cut_program(program, rows, end.name)
    assert str(program.graph) == before
    assert program.weights.keys() == weights.keys()
    assert all(program.weights[name] is weight for name, weight in weights.items())


def test_heads_are_cut_too_and_a_part_is_saved_and_run_like_any_program(tmp_path):
    program = llama_program(layers=2)
    attention = program.attention_node(1)
    operands = names(attention.args[:3])
    assert node_of(program, operands[0]).meta["type"].shape == ("B", 4, "S", 16)
    rows = record(program, operands, make_probe(program.info.vocab_size, (9,)))
    part = cut_program(program, rows, attention.name)
    assert names(operations(part))[0] == attention.name
    assert part.site(1).q is None  # it is outside
    assert part.site(1).rope is None
    save_program(part, tmp_path)
    again = load_program(tmp_path)
    again.info = dataclasses.replace(again.info, context_length=None)
    ids = torch.arange(9)[None]
    got = OptimizedModel(again)(ids)[0]
    expected = record(program, [attention.name], make_probe(program.info.vocab_size, (9,)))
    torch.testing.assert_close(got, expected[attention.name], rtol=1e-12, atol=1e-12)


def test_values_without_tokens_of_their_own_are_no_places_to_cut():
    program = llama_program(layers=1)
    assert width_of(node_of(program, "input_ids")) is None
    sizes = program.calls(torch.ops.aten.sym_size.int)
    assert all(width_of(node) is None for node in sizes)
