from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
from cached import cached_program
from torch import fx

import kvxform.ir.ops as kvx
from kvxform.codecs.base import PlaneSpec
from kvxform.codecs.basis import Basis
from kvxform.errors import PassError
from kvxform.ir.facts import Facts
from kvxform.ir.plan import CachePlan, Layout, SitePlan
from kvxform.ir.program import RejectedSite
from kvxform.ir.stream_plan import ReadForm, Regions, StreamPlan
from kvxform.ir.text import format_graph, format_program, format_ranges
from kvxform.ir.types import TensorType
from tests.programs import gpt2_program, llama_program

aten = torch.ops.aten


def one_call(target, *args, **kwargs) -> fx.Graph:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(target, (x, *args), kwargs))
    return graph


def call_line(graph: fx.Graph) -> str:
    return format_graph(graph).splitlines()[1]


def test_whole_programs_print_as_they_always_did(golden):
    golden("text/llama.txt", format_program(llama_program()))
    golden("text/gpt2.txt", format_program(gpt2_program()))


def test_the_header_folds_layers_and_shows_what_is_special(golden):
    program = llama_program(layers=4)
    exact = StreamPlan(
        {"codec": "none", "dtype": "float16"}, (PlaneSpec("value", "float16", 16),), 1, 16
    )
    key = StreamPlan(
        {"codec": "int", "bits": 4, "axis": "channel"},
        (PlaneSpec("codes", "uint8", 8),),
        32,
        16,
        "post",
        Basis("hadamard", 16, 3),
        Regions(4, 32, "block"),
        ReadForm("folded"),
    )
    sites = [SitePlan(n, n, 4, 2, key, exact) for n in range(4)]
    sites[3] = SitePlan(3, 2, 4, 2, key, exact)
    program.plan = CachePlan(tuple(sites), Layout("paged", 64))
    program.facts = Facts({"k.basis": "hadamard(16, seed=3)", "norms_fused": True})
    program.rejected = (RejectedSite("layers.9.attn", "the mask is bidirectional"),)
    program.passes = ("fuse-norms", "insert-cache")
    header = [line for line in format_program(program).splitlines() if line.startswith("#")]
    golden("text/header.txt", "\n".join(header) + "\n")


def test_a_line_has_type_op_arguments_and_provenance():
    graph = fx.Graph()
    q, cache, positions = (graph.placeholder(name) for name in ("q", "cache", "positions"))
    node = graph.call_function(
        kvx.CACHED_ATTENTION,
        (q, cache, positions),
        {"causal": True, "v_head_dim": 64, "scale": 0.125, "layer": 3},
    )
    node.meta = {
        "type": TensorType(torch.float32, ("B", 9, "S", 64)),
        "module": "layers.3.self_attn",
        "origin": "sdpa (modeling_llama.py:271)",
        "via": ("insert-cache", "simplify"),
    }
    graph.output(node)
    assert format_graph(graph).splitlines()[3:] == [
        "%3: f32[B, 9, S, 64] = kvx.cached_attention(%0, %1, %2, layer=3, scale=0.125, "
        "v_head_dim=64, causal=True)   # layers.3.self_attn  <- simplify <- insert-cache"
        " <- sdpa (modeling_llama.py:271)",
        "return %3",
    ]


def test_placeholders_come_first_whatever_their_place_in_the_graph():
    graph = fx.Graph()
    a = graph.placeholder("a")
    b = graph.call_function(aten.relu.default, (a,))
    c = graph.placeholder("c")
    graph.output(graph.call_function(aten.add.Tensor, (b, c)))
    assert format_graph(graph) == (
        '%0 = placeholder("a")\n%1 = placeholder("c")\n%2 = aten.relu(%0)\n'
        "%3 = aten.add.Tensor(%2, %1)\nreturn %3\n"
    )


def test_names_of_nodes_do_not_show():
    first, second = one_call(aten.relu.default), one_call(aten.relu.default)
    next(iter(second.find_nodes(op="call_function", target=aten.relu.default)))._rename("other")
    assert format_graph(first) == format_graph(second)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1, "1"),
        (1.0, "1.0"),
        (1e-05, "1e-05"),
        (float("inf"), "inf"),
        (float("-inf"), "-inf"),
        (float("nan"), "nan"),
        (True, "True"),
        (None, "None"),
        ('a "b"\n', r'"a \"b\"\n"'),
        (torch.bfloat16, "bf16"),
        (torch.contiguous_format, "contiguous_format"),
        (torch.strided, "strided"),
        ([1, [2]], "[1, [2]]"),
        ((1,), "(1,)"),
        ((), "()"),
        (slice(None, 3), "slice(None, 3, None)"),
    ],
)
def test_each_kind_of_argument_has_a_text_form(value, text):
    assert call_line(one_call(aten.add.Tensor, value)) == f"%1 = aten.add.Tensor(%0, {text})"


def test_devices_are_left_out():
    graph = one_call(aten._to_copy.default, device=torch.device("cpu"), dtype=torch.float16)
    assert call_line(graph) == "%1 = aten._to_copy(%0, dtype=f16)"


@pytest.mark.parametrize(
    "graph",
    [
        one_call(torch.relu),
        one_call(inspect.getmodule),
        one_call(aten.relu_.default),
        one_call(aten.add.Tensor, object()),
        one_call(aten.add.Tensor, torch.device("cpu")),
        one_call(aten.add.Tensor, torch.ones(1)),
    ],
)
def test_what_has_no_text_form_is_refused(graph):
    with pytest.raises(PassError, match="KVX215"):
        format_graph(graph)


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([], ""), ([3], "3"), ([0, 1, 2, 5, 7, 8], "0-2, 5, 7-8")],
)
def test_ranges_fold_runs(numbers, text):
    assert format_ranges(numbers) == text


def test_long_constants_of_a_codec_show_their_shape_and_inner_codecs_their_options():
    program = cached_program({"key": {"codec": "token-norm", "inner": {"codec": "int", "bits": 8}}})
    table = [[0.25] * 64] * 2
    stream = program.plan.sites[0].key
    changed = dataclasses.replace(stream, codec={**stream.codec, "table": table, "few": [4, 2]})
    program.plan = program.plan.replace_site(0, key=changed)
    (line,) = [text for text in format_program(program).splitlines() if "<2 x 64 numbers>" in text]
    assert "table=<2 x 64 numbers>" in line
    assert "few=[4, 2]" in line
    assert "inner=int(" in line
    assert "bits=8, clip=1.0" in line
