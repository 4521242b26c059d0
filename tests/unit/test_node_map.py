"""Every call of a graph has the ONNX nodes that do its work."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch
from cached import cached_program
from torch import fx

from kvxform.codegen.onnx.builder import Builder
from kvxform.codegen.onnx.capability import check_program
from kvxform.codegen.onnx.export import emit_model
from kvxform.codegen.onnx.forms import OnnxOptions
from kvxform.codegen.onnx.node_map import ALSO, calls_of, node_map, note_absorbed, operation_of
from kvxform.codegen.onnx.provenance import NODE, provenance_notes

INT4 = {"codec": "int", "bits": 4}
KV4 = {"key": INT4, "value": INT4, "regions": {"sink": 4, "recent": 8}}
FORMS = {
    "exact": (None, {}),
    "primitives": (None, {"opset": 18}),
    "buffers": (None, {"opset": 24}),
    "codes": (KV4, {}),
    "contrib": (None, {"level": "L3", "logits": "last"}),
    "functions": (KV4, {"level": "L5"}),
    "packed weights": (None, {"weights": "int4"}),
}


@pytest.mark.parametrize("case", FORMS)
def test_every_call_has_nodes(case):
    plan, options = FORMS[case]
    program = cached_program(plan, None, dtype=torch.float32)
    form, fallback = check_program(program, OnnxOptions(**options))
    graph = emit_model(program, fallback, form).graph
    keys = [notes[NODE] for notes in provenance_notes(program).values()]
    found = node_map(graph)
    assert sorted(found) == sorted(keys)
    assert all(found.values())
    names = {node.name for node in graph}
    assert {name for group in found.values() for name in group} <= names


def test_an_attention_that_appends_does_the_work_of_the_append():
    program = cached_program(None, None, dtype=torch.float32, layers=2)
    form, fallback = check_program(program)
    graph = emit_model(program, fallback, form).graph
    found = node_map(graph)
    assert found["1/kvx.cache_append/0"] == ("/layers.1/attn/attention",)
    attention = next(n for n in graph if n.name == "/layers.1/attn/attention")
    assert calls_of(attention) == ("1/kvx.cached_attention/0", "1/kvx.cache_append/0")
    operations = [operation_of(key) for key in calls_of(attention)]
    assert operations == ["kvx.cached_attention", "kvx.cache_append"]


def test_fused_operators_do_the_work_of_all_their_calls():
    program = cached_program(None, None, dtype=torch.float32, layers=1)
    form, fallback = check_program(program, OnnxOptions(level="L3"))
    found = node_map(emit_model(program, fallback, form).graph)
    (fused,) = found["0/aten.add.Tensor/0"]
    assert found["0/kvx.rms_norm/1"] == (fused,)
    assert "0/kvx.rope/0" in found
    attention = found["0/kvx.cached_attention/0"]
    assert set(found["0/kvx.cache_append/0"]) <= set(attention)


class Chain:
    """Three calls in a row, of which the test says what they were emitted as."""

    def __init__(self):
        graph = fx.Graph()
        x = graph.placeholder("x")
        self.calls = [x]
        for _ in range(3):
            self.calls.append(graph.call_function(torch.neg, (self.calls[-1],)))
        self.calls = self.calls[1:]
        self.notes = {call: {NODE: key} for call, key in zip(self.calls, "abc", strict=True)}
        self.builder = Builder()
        self.input = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT))
        self.values = {}

    def emit(self, place, x):
        call = self.calls[place]
        with self.builder.scope("m", self.notes[call]):
            self.values[call] = self.builder.op("Neg", x)
        return self.values[call]

    def also(self):
        note_absorbed(self.notes, self.values, self.builder.nodes)
        return [calls_of(node) for node in self.builder.nodes]


def test_calls_with_nodes_of_their_own_stay_apart():
    chain = Chain()
    chain.emit(2, chain.emit(1, chain.emit(0, chain.input)))
    assert chain.also() == [("a",), ("b",), ("c",)]
    assert ALSO not in chain.builder.nodes[0].metadata_props


def test_a_call_that_changes_nothing_goes_with_what_makes_its_value():
    chain = Chain()
    chain.values[chain.calls[1]] = chain.emit(0, chain.input)
    chain.emit(2, chain.values[chain.calls[1]])
    assert chain.also() == [("a", "b"), ("c",)]


def test_a_call_whose_value_is_gone_goes_with_its_readers():
    chain = Chain()
    first, second = chain.emit(0, chain.input), chain.emit(1, chain.input)
    chain.emit(2, chain.input)  # does the work of all three
    chain.builder.prune([chain.values[chain.calls[2]]])
    assert first.producer() not in chain.builder.nodes
    assert second.producer() not in chain.builder.nodes
    assert chain.also() == [("c", "a", "b")]


def test_the_last_call_goes_with_its_operands_if_nothing_reads_it():
    chain = Chain()
    chain.emit(0, chain.input)
    assert chain.also() == [("a", "b", "c")]


def test_what_layers_share_is_of_no_call():
    chain = Chain()
    shared = chain.builder.op("Neg", chain.input)  # outside of any call
    chain.values[chain.calls[0]] = shared
    chain.emit(1, shared)
    chain.emit(2, chain.values[chain.calls[1]])
    assert chain.also() == [(), ("b", "a"), ("c",)]
