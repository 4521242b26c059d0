"""One broken program for each rule of the verifier."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import fx

import kvxform.ir.ops as kvx
import kvxform.passes  # noqa: F401  (fills the registry)
from kvxform.codecs.base import PlaneSpec
from kvxform.codecs.basis import Basis
from kvxform.errors import PassError
from kvxform.ir.facts import Facts
from kvxform.ir.plan import Layout
from kvxform.ir.program import Program
from kvxform.ir.stream_plan import Regions
from kvxform.ir.types import SymType, TensorType
from kvxform.ir.verify import verify_program
from kvxform.pass_base import PASSES
from tests.programs import apply, gpt2_program, llama_program, to_meta

aten = torch.ops.aten
CODEC = {"codec": "int", "bits": 4, "axis": "channel", "group": 32}


def rewrite(program: Program, name: str, **options) -> Program:
    return apply(PASSES[name](**options), program)[0]


def cached() -> Program:
    return rewrite(llama_program(), "insert-cache")


def quantised() -> Program:
    program = rewrite(cached(), "page-cache", page_size=64)
    return rewrite(program, "quantize-kv", key=CODEC, value={"codec": "int", "bits": 4})


def refused(program: Program, words: str, at: str = "") -> None:
    with pytest.raises(PassError, match=r"KVX215 \[verifier\]") as caught:
        verify_program(program)
    assert words in caught.value.rule
    assert at in caught.value.at


def first(program: Program, target: object) -> fx.Node:
    return next(node for node in program.graph.nodes if node.target == target)


def retype(node: fx.Node, *shape: int | str, dtype: torch.dtype | None = None) -> None:
    present = node.meta["type"]
    node.meta["type"] = TensorType(dtype or present.dtype, shape or present.shape)


def set_site(program: Program, **changes) -> None:
    site = dataclasses.replace(program.sites[1], **changes)
    program.sites = (program.sites[0], site)


def set_projection(program: Program, name: str, **changes) -> None:
    projection = getattr(program.sites[1], name)
    set_site(program, **{name: dataclasses.replace(projection, **changes)})


def set_plan(program: Program, layer: int = 1, **changes) -> None:
    program.plan = program.plan.replace_site(layer, **changes)


def set_stream(program: Program, name: str, **changes) -> None:
    stream = dataclasses.replace(getattr(program.plan.site(1), name), **changes)
    set_plan(program, **{name: stream})


@pytest.mark.parametrize(
    "program",
    [
        llama_program(),
        llama_program(bias=True, tied=True, attention={"window": 4, "softcap": None}),
        gpt2_program(),
        cached(),
        rewrite(gpt2_program(), "insert-cache"),
        quantised(),
        rewrite(rewrite(cached(), "rotate-qk"), "rotate-v"),
    ],
)
def test_valid_programs_pass(program):
    if "window" in program.attention_node(0).kwargs:
        program.sites = tuple(dataclasses.replace(site, window=4) for site in program.sites)
    verify_program(program)
    verify_program(to_meta(program))


# Nodes


def test_values_must_be_defined_before_use():
    program = llama_program()
    first(program, aten.embedding.default).append(first(program, "input_ids"))
    refused(program, "well formed for torch.fx")


def test_meta_holds_four_keys():
    program = llama_program()
    first(program, aten.silu.default).meta["stack_trace"] = "/home/me/model.py"
    refused(program, "node.meta must hold type, module, origin, via", "layers.0.mlp")


def test_every_node_has_a_type():
    program = llama_program()
    first(program, aten.silu.default).meta["type"] = None
    refused(program, "every node must have a type")


def test_provenance_is_text():
    program = llama_program()
    first(program, aten.silu.default).meta["via"] = ["simplify"]
    refused(program, "module and origin must be texts")


def test_inputs_have_their_names():
    program = llama_program()
    first(program, "position_ids").target = "positions"
    refused(program, "the inputs must be input_ids, position_ids")


def test_inputs_have_their_types():
    program = llama_program()
    retype(first(program, "input_ids"), dtype=torch.int32)
    refused(program, "the type of input_ids must be i64[B, S]", "%0")


@pytest.mark.parametrize("target", [torch.relu, aten.relu_.default, aten.from_file.default])
def test_only_functional_ops_of_the_dialect_are_called(target):
    program = llama_program()
    first(program, aten.silu.default).target = target
    refused(program, "only functional aten ops and kvx ops", "silu_default (programs.py:1)")


def test_modules_are_not_called():
    program = llama_program()
    node = first(program, aten.silu.default)
    node.op, node.target = "call_module", "mlp.act"
    refused(program, "only functional aten ops and kvx ops")


def test_calls_fit_the_schema():
    program = llama_program()
    node = first(program, kvx.ROPE)
    node.kwargs = {"rotary_dims": 16}
    refused(program, "a call must fit the schema of its op", "layers.0.attn")


def test_arguments_have_a_text_form():
    program = llama_program()
    node = first(program, kvx.ROPE)
    node.kwargs = {**node.kwargs, "attention_scaling": torch.ones(())}
    refused(program, "an argument in a graph must have a text form", "layers.0.attn")


def test_weights_exist():
    program = llama_program()
    del program.weights["norm.weight"]
    refused(program, "a get_attr node must name a weight", "head")


@pytest.mark.parametrize("change", [lambda w: w.float(), lambda w: w[:-1]])
def test_weights_have_their_type(change):
    program = llama_program()
    program.weights["norm.weight"] = change(program.weights["norm.weight"])
    refused(program, "weight norm.weight must be f64[32]", "head")


def test_the_output_is_the_logits():
    program = llama_program()
    program.info = dataclasses.replace(program.info, vocab_size=49)
    refused(program, "the logits must be floating point [B, S, 49]", "head")
    program = llama_program()
    program.graph.output_node().args = ((program.graph.output_node().args[0],),)
    refused(program, "a graph must return the logits and nothing else")
    program = llama_program()
    program.graph.output_node().args[0].meta["type"] = SymType("B")
    refused(program, "the logits must be floating point")


# Sites


def test_every_site_has_an_attention_node():
    program = llama_program()
    program.sites = (*program.sites, dataclasses.replace(program.sites[0], layer=7))
    refused(program, "a site must have an attention node", "layer 7")


def test_every_attention_node_has_a_site():
    program = llama_program()
    program.sites = program.sites[:1]
    refused(program, "an attention node must belong to a site", "layers.1.attn")


def test_a_layer_has_one_attention_node():
    program = llama_program()
    node = program.attention_node(1)
    node.kwargs = {**node.kwargs, "layer": 0}
    refused(program, "a layer must have one attention node", "layers.1.attn")


def test_a_layer_has_one_site():
    program = llama_program()
    program.sites = (program.sites[0], program.sites[0])
    refused(program, "a layer must have one site")


@pytest.mark.parametrize(
    "changes",
    [{"num_kv_heads": 3}, {"head_dim": 0}, {"num_q_heads": -4}],
)
def test_head_counts_make_sense(changes):
    program = llama_program()
    set_site(program, **changes)
    refused(program, "query heads must be a multiple of KV heads", "layer 1")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_q_heads": 8}, "q must be [B, 8, S, 16]"),
        ({"num_kv_heads": 4}, "k must be [B, 4, S, 16]"),
        ({"v_head_dim": 8}, "v must be [B, 2, S, 8]"),
        ({"scale": 1.0}, "scale must be that of the site, 1.0"),
        ({"window": 3}, "window must be that of the site, 3"),
        ({"softcap": 30.0}, "softcap must be that of the site"),
    ],
)
def test_site_and_node_agree(changes, words):
    program = llama_program()
    set_site(program, **changes)
    refused(program, words, "layers.1.attn")


def test_the_result_of_attention_has_the_shape_of_its_site():
    program = llama_program()
    retype(program.attention_node(1), "B", "S", 4, 16)
    refused(program, "the result must be [B, 4, S, 16]", "layers.1.attn")


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("q", {"weight": "gone"}, "the projection of q must be a matrix"),
        ("k", {"weight": "norm.weight"}, "the projection of k must be a matrix"),
        ("v", {"bias": "gone"}, "the bias of v must be a weight"),
        ("v", {"start": 1}, "all heads of v must lie inside"),
        ("k", {"start": -1}, "all heads of k must lie inside"),
        ("q", {"head_stride": 17}, "all heads of q must lie inside"),
        ("o", {"layout": "in_out"}, "all heads of o must lie inside"),
    ],
)
def test_projections_lie_inside_their_weights(name, changes, words):
    program = llama_program()
    set_projection(program, name, **changes)
    refused(program, words, "layer 1")


def test_inv_freq_is_a_weight():
    program = llama_program()
    set_site(program, rope=dataclasses.replace(program.sites[1].rope, inv_freq="gone"))
    refused(program, "inv_freq of a site must be a weight", "layer 1")


# Cache


def test_all_attentions_are_cached_or_none():
    program = cached()
    node = program.attention_node(1)
    node.target = kvx.ATTENTION
    k, v, _ = program.append_node(1).args
    node.args = (node.args[0], k, v, node.args[2])
    node.kwargs = {"layer": 1, "scale": 0.25}
    refused(program, "attention must be cached if and only if", "layers.1.attn")


def test_keys_are_appended_before_they_are_read():
    program = cached()
    node = program.attention_node(1)
    node.args = (node.args[0], program.placeholder("cache"), node.args[2])
    refused(program, "the keys of layer 1 must be appended once before", "layers.1.attn")


def test_keys_of_the_right_layer_are_appended():
    program = cached()
    node = program.attention_node(1)
    node.args = (node.args[0], program.append_node(0), node.args[2])
    refused(program, "the keys of layer 1 must be appended once before", "layers.1.attn")


def test_handles_may_be_threaded_from_layer_to_layer():
    program = cached()
    append = program.append_node(1)
    append.args = (*append.args[:2], program.append_node(0))
    verify_program(program)


def test_a_handle_comes_from_the_input():
    program = cached()
    append = program.append_node(1)
    append.args = (*append.args[:2], program.placeholder("input_ids"))
    refused(program, "a cache handle must come from the input cache", "layers.1.attn")


def test_what_is_appended_has_the_shape_of_the_site():
    program = cached()
    append = program.append_node(1)
    append.args = (program.attention_node(1).args[0], *append.args[1:])
    refused(program, "k must be [B, 2, S, 16]", "layers.1.attn")


def test_v_head_dim_is_that_of_the_site():
    program = cached()
    node = program.attention_node(1)
    node.kwargs = {**node.kwargs, "v_head_dim": 8}
    refused(program, "v_head_dim must be 16", "layers.1.attn")


# Plan


def test_a_plan_comes_with_the_cache():
    program = cached()
    program.plan = None
    refused(program, "a plan if and only if it is cached")
    program = llama_program()
    program.plan = cached().plan
    refused(program, "a plan if and only if it is cached")


def test_the_plan_has_the_sites_of_the_program():
    program = cached()
    program.plan = dataclasses.replace(program.plan, sites=program.plan.sites[:1])
    refused(program, "the plan must have the sites of the program")


@pytest.mark.parametrize(("layer", "owner"), [(1, 5), (0, 1)])
def test_an_owner_exists_and_is_earlier(layer, owner):
    program = cached()
    node = program.attention_node(layer)
    node.args = (node.args[0], program.append_node(layer), node.args[2])
    append = program.append_node(layer)
    append.kwargs = {"layer": owner}
    set_plan(program, layer, owner=owner)
    refused(program, "the owner of a cache must be this layer or an earlier one", f"layer {layer}")


def test_a_shared_cache_is_read_as_its_owner_stores_it():
    program = quantised()
    node = program.attention_node(1)
    node.args = (node.args[0], program.append_node(0), node.args[2])
    set_plan(program, owner=0)
    program.graph.erase_node(program.append_node(1))
    verify_program(program)
    set_stream(program, "key", regions=Regions(sink=4))
    refused(program, "a site must read streams as their owner stores them", "layer 1")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_q_heads": 8}, "num_q_heads must be the same in site and plan: 4"),
        ({"num_kv_heads": 1}, "num_kv_heads must be the same"),
    ],
)
def test_geometry_of_plan_and_site_agree(changes, words):
    program = cached()
    set_plan(program, **changes)
    refused(program, words, "layer 1")


@pytest.mark.parametrize(
    ("stream", "changes", "words"),
    [
        ("key", {"head_dim": 8}, "head_dim of k must be the same"),
        ("value", {"head_dim": 8}, "head_dim of v must be the same"),
        ("key", {"basis": Basis("hadamard", 16)}, "basis of k must be the same"),
        ("value", {"basis": Basis("hadamard", 16)}, "basis of v must be the same"),
        ("key", {"codec": {"codec": "zip"}}, "the codec of the key of layer 1 must fit"),
        ("key", {"codec": {"codec": "int", "bit": 4}}, "the codec of the key of layer 1"),
        ("value", {"codec": {"codec": "int", "bits": 4, "group": 7}}, "the codec of the value"),
        ("value", {"regions": Regions(dtype="float15")}, "the codec of the value"),
        ("value", {"planes": (PlaneSpec("codes", "uint8", 9),)}, "the planes of the value"),
        ("key", {"tokens_per_group": 16}, "the planes of the key of layer 1 must be"),
        ("key", {"regions": Regions(sink=-1)}, "regions of the key of layer 1 must not"),
        ("key", {"regions": Regions(recent=33, flush="block")}, "must flush whole groups of 32"),
    ],
)
def test_streams_can_be_stored(stream, changes, words):
    program = quantised()
    set_stream(program, stream, **changes)
    refused(program, words)


@pytest.mark.parametrize("page_size", [0, 48])
def test_pages_hold_whole_groups(page_size):
    program = quantised()
    program.plan = dataclasses.replace(program.plan, layout=Layout("paged", page_size))
    refused(program, "a page must hold whole groups of 32 tokens of the key")


@pytest.mark.parametrize("basis", [Basis("hadamard", 12), Basis("hadamard", 32), Basis("dense")])
def test_a_basis_fits_its_stream(basis):
    program = quantised()
    set_site(program, k_basis=basis)
    set_stream(program, "key", basis=basis)
    refused(program, "the codec of the key of layer 1 must fit its stream")


# Facts


@pytest.mark.parametrize(
    ("fact", "value", "words"),
    [
        ("cache.inserted", False, "the fact cache.inserted must be True"),
        ("cache.layout", "contiguous", "the fact cache.layout must be paged(64)"),
        ("k.basis", "hadamard(16)", "the fact k.basis must be the basis of the sites, identity"),
        ("v.basis", "hadamard", "the fact v.basis must be the basis of the sites, identity"),
        ("k.codec", "none", "the fact k.codec must agree with the plan"),
        ("v.codec", "none", "the fact v.codec must agree with the plan"),
        ("k.rope", "pre", "the fact k.rope must agree with the plan"),
    ],
)
def test_facts_are_true(fact, value, words):
    program = quantised()
    program.facts = program.facts.updated({fact: value})
    refused(program, words)


@pytest.mark.parametrize("fact", ["hadamard", "hadamard(16)"])
def test_a_basis_fact_may_leave_out_sites_but_not_mix_them(fact):
    program = llama_program()
    program.facts = Facts({"v.basis": fact})
    set_site(program, v_basis=Basis("hadamard", 16))
    verify_program(program)
    program.facts = Facts()
    refused(program, "the fact v.basis must be the basis of the sites, hadamard(16), identity")
    program.facts = Facts({"v.basis": "hadamard(8)"})
    refused(program, "the fact v.basis")


def test_the_verifier_changes_nothing():
    program = quantised()
    before = (str(program.graph), program.sites, program.plan, program.facts.changed())
    verify_program(program)
    assert before == (str(program.graph), program.sites, program.plan, program.facts.changed())
