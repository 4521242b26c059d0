"""What an explanation says of a site: read off the graph, and compared with how it was built."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from programs import gpt2_program, llama_program

import kvxform.ir.ops as kvx
from kvxform.explain.records import NormRecord, SiteRecord, WeightRecord
from kvxform.explain.sites import describe_sites
from kvxform.ir.program import Program
from kvxform.ir.types import TensorType
from kvxform.pass_base import Rewriter


def only_site(program: Program) -> SiteRecord:
    (site,) = describe_sites(program)
    return site


def with_norm(program: Program, where: str, size: int) -> Program:
    """Put an RMSNorm before or after the RoPE of q, or after the output projection."""
    rewriter = Rewriter(program, "test")
    attention = program.attention_node(0)
    rope = attention.args[0]
    anchors = {"before": rope.args[0], "after": rope}
    anchor = anchors.get(where)
    if anchor is None:
        name = "layers.0.attn.o.weight"
        (weight,) = (n for n in program.graph.nodes if n.op == "get_attr" and n.target == name)
        (anchor,) = weight.users
    users = list(anchor.users)
    program.weights["extra.weight"] = torch.ones(size, dtype=torch.float64)
    gain = rewriter.get_weight_node("extra.weight", anchor, TensorType(torch.float64, (size,)))
    new = rewriter.call_after(anchor, kvx.RMS_NORM, (anchor, gain, 1e-3), type_=anchor.meta["type"])
    for user in users:
        user.replace_input_with(anchor, new)
    return program


def test_a_llama_layer():
    site = only_site(llama_program(layers=1, weight_offset=1.0))
    assert (site.layer, site.module) == (0, "layers.0.attn")
    assert site.origin.endswith("(programs.py:1)")
    assert (site.num_q_heads, site.num_kv_heads, site.group) == (4, 2, 2)
    assert (site.head_dim, site.v_head_dim, site.is_default_scale) == (16, 16, True)
    assert (site.causal, site.window, site.chunk, site.softcap) == (True, None, None, None)
    assert site.norms == (
        NormRecord("input", "RMSNorm", 1e-5, 32, "layers.0.norm1.weight", offset=1.0),
    )
    assert site.q == WeightRecord(
        "layers.0.attn.q.weight", (64, 32), None, "out_in", "rows", 4, 16, 0, 16
    )
    assert site.o == WeightRecord(
        "layers.0.attn.o.weight", (32, 64), None, "out_in", "columns", 4, 16, 0, 16
    )
    assert (site.owner, site.notes) == (0, ())


def test_a_fused_projection_in_gpt2_layout():
    site = only_site(gpt2_program(layers=1))
    assert site.rope is None
    assert site.k == WeightRecord(
        "h.0.attn.c_attn.weight",
        (32, 96),
        "h.0.attn.c_attn.bias",
        "in_out",
        "columns",
        2,
        16,
        32,
        16,
    )
    assert site.norms[0].kind == "LayerNorm"
    assert site.norms[0].bias == "h.0.ln_1.bias"


def test_what_changes_scores():
    names = {"sink_logits": torch.zeros(4), "alibi_slopes": torch.ones(4)}
    extra = {"window": 5, "chunk": 8, "softcap": 30.0, **names}
    site = only_site(llama_program(layers=1, attention=extra))
    assert (site.window, site.chunk, site.softcap) == (5, 8, 30.0)
    assert (site.sink_logits, site.alibi_slopes) == ("sink_logits", "alibi_slopes")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda f: f, ("geometric", 10000.0, 1.0)),
        (lambda f: f.float(), ("geometric", 10000.0, 1.0)),
        (lambda f: 500000.0 ** (-torch.arange(8).double() / 8), ("geometric", 500000.0, 1.0)),
        (lambda f: f / 4, ("geometric", 10000.0, 4.0)),
        (lambda f: f * torch.tensor([1, 1, 1.01, 1, 1, 1, 1, 1]), ("table", None, 1.0)),
        (lambda f: f * torch.tensor([1, 1, 1, 1, 1, 1, 1, 0]), ("table", None, 1.0)),
        (lambda f: f.to("meta"), ("unknown", None, 1.0)),
    ],
)
def test_rotary_frequencies(change, expected):
    program = llama_program(layers=1)
    program.weights["inv_freq"] = change(program.weights["inv_freq"])
    rope = only_site(program).rope
    assert (rope.frequencies, rope.theta, rope.linear_factor) == expected
    assert (rope.rotary_dim, rope.pairs) == (16, "half")


@pytest.mark.parametrize(
    ("where", "size", "role", "place"),
    [
        ("before", 16, "q", "per head, before RoPE"),
        ("after", 16, "q", "per head, after RoPE"),
        ("output", 32, "output", ""),
    ],
)
def test_norms_inside_and_after(where, size, role, place):
    norms = only_site(with_norm(llama_program(layers=1), where, size)).norms
    assert [n.role for n in norms] == ["input", role]
    assert norms[1] == NormRecord(role, "RMSNorm", 1e-3, size, "extra.weight", place=place)


def test_a_projection_behind_more_than_a_choice_is_still_named():
    program = with_norm(llama_program(layers=1), "before", 16)
    program.sites = (dataclasses.replace(program.sites[0], q=None),)
    site = only_site(program)
    assert site.q.weight == "layers.0.attn.q.weight"
    assert (site.q.start, site.q.head_stride) == (None, None)


def test_layers_that_share_name_their_owner():
    program = llama_program()
    program.sites = (program.sites[0], dataclasses.replace(program.sites[1], shared_with=0))
    assert [site.owner for site in describe_sites(program)] == [0, 0]
