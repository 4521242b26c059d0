from __future__ import annotations

import contextlib
import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

import kvxform.ir.ops as kvx
from kvxform.errors import ArtifactError
from kvxform.ir.parse import parse_graph
from kvxform.ir.program import default_positions
from kvxform.ir.targets import PYTHON_FUNCTIONS, resolve_target, target_name
from kvxform.ir.text import format_graph, format_program
from kvxform.ir.types import SymType, TensorType, TupleType
from tests.programs import gpt2_program, llama_program, token_ids

aten = torch.ops.aten

WHOLE = format_graph(llama_program(layers=1).graph)
HEAD = '%0 = placeholder("input_ids")\n'

dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
int64 = st.integers(-(2**63), 2**63 - 1)  # what a schema of torch can hold
sizes = st.one_of(st.integers(0, 9), st.sampled_from(["B", "S", "B*S", "Max(1, S)"]))
tensor_types = st.builds(TensorType, dtypes, st.lists(sizes, max_size=4).map(tuple))
sym_types = st.builds(SymType, st.sampled_from(["B", "S", "B*S + 1"]))
types = st.one_of(
    tensor_types,
    sym_types,
    st.builds(TupleType, st.lists(tensor_types | sym_types, max_size=3).map(tuple)),
)
fields = st.one_of(
    st.text(max_size=12), st.sampled_from(["-", " a", '"q"', "a <- b", "<-", "a # b"])
)
metas = st.fixed_dictionaries(
    {
        "type": types,
        "module": fields,
        "origin": fields,
        "via": st.lists(fields, max_size=3).map(tuple),
    }
)
constants = st.one_of(
    st.none(),
    st.booleans(),
    int64,
    st.floats(),
    st.text(max_size=8),
    dtypes,
    st.sampled_from([torch.contiguous_format, torch.strided]),
    st.builds(slice, st.none() | int64, st.none() | int64),
)


@st.composite
def graphs(draw) -> fx.Graph:
    """Graphs that print, though most would not run: every op takes anything."""
    graph = fx.Graph()
    nodes = [graph.placeholder(name) for name in ("input_ids", "position_ids")]

    def argument():
        values = st.one_of(constants, st.sampled_from(nodes))
        lists = st.lists(values, max_size=3)
        return draw(st.one_of(values, lists, lists.map(tuple), st.lists(lists, max_size=2)))

    for _ in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(["weight", "cat", "add", "mul", "attention", "to_copy"]))
        if kind == "weight":
            nodes.append(graph.create_node("get_attr", draw(st.sampled_from(["a", "h.0.b_1"]))))
        elif kind == "cat":
            nodes.append(graph.call_function(aten.cat.default, (argument(), argument())))
        elif kind == "add":
            nodes.append(
                graph.call_function(
                    aten.add.Tensor, (argument(), argument()), {"alpha": argument()}
                )
            )
        elif kind == "mul":
            nodes.append(graph.call_function(PYTHON_FUNCTIONS["py.mul"], (argument(), argument())))
        elif kind == "attention":
            nodes.append(
                graph.call_function(
                    kvx.ATTENTION,
                    tuple(argument() for _ in range(4)),
                    {"window": argument(), "layer": argument(), "scale": argument()},
                )
            )
        else:
            nodes.append(
                graph.call_function(aten._to_copy.default, (argument(),), {"dtype": argument()})
            )
    for node in nodes:
        node.meta = draw(metas)
    graph.output(draw(st.sampled_from(nodes)))
    return graph


def plain(value):
    """Return `value` with nodes as names and NaN as text, so that graphs compare with ==."""
    if isinstance(value, float) and math.isnan(value):
        return "nan"
    if isinstance(value, fx.Node):
        return f"%{value.graph._number[value]}"
    if isinstance(value, slice):
        return ("slice", value.start, value.stop, value.step)
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return [kind, *(plain(item) for item in value)]
    return (type(value).__name__, value)


def content(graph: fx.Graph) -> list:
    graph._number = {node: number for number, node in enumerate(graph.nodes)}
    return [
        (
            node.op,
            node.target,
            plain(node.args),
            {name: plain(value) for name, value in node.kwargs.items()},
            node.meta,
        )
        for node in graph.nodes
    ]


@settings(max_examples=100, deadline=None)
@given(graphs())
def test_print_parse_print_is_the_identity(graph):
    text = format_graph(graph)
    parsed = parse_graph(text)
    assert format_graph(parsed) == text
    assert content(parsed) == content(graph)


@pytest.mark.parametrize("program", [llama_program(), gpt2_program(), llama_program(tied=True)])
def test_a_parsed_program_runs_and_gives_the_same_logits(program):
    text = format_program(program)
    ids = token_ids(program)
    expected = program.to_module()(ids, default_positions(ids))
    program.graph = parse_graph(text)
    assert format_program(program) == text
    assert torch.equal(program.to_module()(ids, default_positions(ids)), expected)


def test_parsed_values_have_the_type_they_were_printed_from():
    text = (
        HEAD + '%1 = aten.add.Tensor(%0, [1, 1.0, -inf, True, None, "%0", f16, (2,)])\nreturn %1\n'
    )
    values = list(parse_graph(text).nodes)[1].args[1]
    assert values == [1, 1.0, -math.inf, True, None, "%0", torch.float16, (2,)]
    assert [type(v) for v in values[:4]] == [int, float, float, bool]


@pytest.mark.parametrize(
    "call",
    [
        "os.system(%0)",
        "posix.system(%0)",
        "builtins.exec(%0)",
        "py.exec(%0)",
        "py.attrgetter(%0)",
        "aten.__class__(%0)",
        "aten.relu_(%0)",
        "aten.save(%0, %0)",
        'aten.from_file("x", True, 4)',
        "aten.relu.__class__(%0)",
        "aten.relu.op(%0)",
        "aten.no_such_op(%0)",
        "kvx.no_such_op(%0)",
        "kvx.__init__(%0)",
        "prim.device(%0)",
        "torch.load(%0)",
        "aten.relu.default.__call__(%0)",
    ],
)
def test_only_listed_functions_resolve(call):
    with pytest.raises(ArtifactError, match=r"KVX602 \[graph\] a graph may call only .* at line 2"):
        parse_graph(HEAD + f"%1 = {call}\nreturn %1\n")


def test_a_file_op_that_torch_has_does_not_resolve():
    assert "filename" in str(torch.ops.aten.from_file.default._schema)
    assert target_name(torch.ops.aten.from_file.default) is None
    assert resolve_target("aten.relu") is torch.ops.aten.relu.default


@pytest.mark.parametrize(
    "line",
    [
        """%1 = placeholder("x=__import__('os').system('touch pwned')")""",
        '%1 = placeholder("if")',
        """%1 = weight("a'), __import__('os').system('touch pwned'), ('")""",
        """%1 = weight('a')""",
        '%1 = weight("a.__class__")',
        '%1 = weight("a.class")',
        '%1 = weight("a\\n")',
        '%1 = weight("")',
        "%1 = weight(3)",
        '%1 = weight("a", "b")',
        '%1 = weight(name="a")',
    ],
)
def test_names_that_could_become_code_are_refused(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match="KVX602"):
        fx.GraphModule(torch.nn.Module(), parse_graph(HEAD + line + "\nreturn %0\n"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must end with a return line"),
        ("return %0\n", "defined before it is used"),
        (HEAD, "must end with a return line"),
        (HEAD + "return %0\nreturn %0\n", "nothing may follow"),
        (HEAD + "return %1\n", "defined before"),
        (HEAD + "%2 = aten.relu(%0)\nreturn %0\n", "must have the form %1"),
        (HEAD + "%1 = aten.relu(%1)\nreturn %1\n", "defined before"),
        (HEAD + "%1 = aten.relu(%0\nreturn %1\n", "must come next"),
        (HEAD + "%1 = aten.relu(%0) %0\nreturn %1\n", "nothing but a comment"),
        (HEAD + "%1 = aten.relu(%0, 3)\nreturn %1\n", "fewer than 2 positional"),
        (HEAD + "%1 = aten.relu()\nreturn %1\n", "needs the argument 'self'"),
        (HEAD + "%1 = aten.relu(%0, self=%0)\nreturn %1\n", "takes no argument 'self' here"),
        (HEAD + "%1 = aten.relu(%0, nope=%0)\nreturn %1\n", "takes no argument 'nope'"),
        (HEAD + "%1 = aten.relu(self=%0, %0)\nreturn %1\n", "positional arguments must come"),
        (HEAD + "%1 = aten.relu(self=%0, self=%0)\nreturn %1\n", "may be given once"),
        (HEAD + "%1 = py.mul(a=%0)\nreturn %1\n", "takes no keyword"),
        (HEAD + "%1 = aten.relu((%0))\nreturn %1\n", "must have a comma"),
        (HEAD + "%1 = aten.relu(%0,, %0)\nreturn %1\n", "a value must come next"),
        (HEAD + "%1 = aten.relu(what)\nreturn %1\n", "a constant or a dtype"),
        (HEAD + "%1 = aten.relu(slice(1))\nreturn %1\n", "a constant or a dtype"),
        (HEAD + "%1 = aten.relu(1 + 1)\nreturn %1\n", "must follow the grammar"),
        (HEAD + '%1 = aten.relu("\\x")\nreturn %1\n', "as in JSON"),
        (HEAD + f"%1 = aten.relu({'[' * 99})\nreturn %1\n", "may nest 16 deep"),
        (HEAD + f"%1 = aten.relu({'9' * 9999})\nreturn %1\n", "a value must come next"),
        (HEAD + "%1: f99[2] = aten.relu(%0)\nreturn %1\n", "a dtype and a shape"),
        (HEAD + "%1: f32[2,2] = aten.relu(%0)\nreturn %1\n", "as it is printed"),
    ],
)
def test_bad_text_is_refused_with_the_reason(text, words):
    with pytest.raises(ArtifactError, match="KVX602") as caught:
        parse_graph(text)
    assert words in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_text_is_a_graph_or_a_clear_error(data):
    text = WHOLE
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 20)))
    damaged = text[:start] + data.draw(st.text(max_size=6)) + text[end:]
    with contextlib.suppress(ArtifactError):
        parse_graph(damaged).lint()
