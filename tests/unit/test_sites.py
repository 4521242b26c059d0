"""Which kernels a site needs: storage, options of scores, and rotations that kernels take over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from programs import apply, gpt2_program, llama_program

import kvxform.ir.ops as kvx
from kvxform.codegen.triton.sites import FoldedHadamard, kernel_specs, page_tokens
from kvxform.codegen.triton.spec import AppendSpec, GatherSpec
from kvxform.ir.program import Program
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.passes.memory.page_cache import PageCache
from kvxform.passes.quantize.quantize_kv import QuantizeKv
from kvxform.passes.rotation.rotate_qk import RotateQk

INT4 = {"codec": "int", "bits": 4, "axis": "token", "symmetric": False}
KIVI = {"codec": "int", "bits": 2, "axis": "channel", "group": 32, "zero": "float"}


def make_program(
    *passes: Any, head_dim: int = 64, dtype: torch.dtype = torch.float16, **model: Any
) -> Program:
    program = llama_program(head_dim=head_dim, dtype=dtype, **model)
    for graph_pass in (InsertCache(), *passes):
        program, _ = apply(graph_pass, program)
    return program


def test_every_site_has_its_kernels():
    kernels = kernel_specs(make_program(QuantizeKv(INT4, INT4), PageCache(32), layers=3))
    assert list(kernels) == [0, 1, 2]
    site = kernels[0]
    assert set(site.by_kind) == {"append", "decode", "gather", "prefill"}
    spec = site.gather.site
    assert site.append == AppendSpec(spec)
    assert site.gather == GatherSpec(spec)
    assert (spec.num_q_heads, spec.num_kv_heads, spec.page_size) == (4, 2, 32)
    assert (spec.dtype, spec.key.bits, spec.key.group) == ("float16", 4, 64)
    assert kernels[0].by_kind == kernels[2].by_kind  # so there is one file for all layers


def test_bytes_per_token_are_those_of_the_plan():
    for passes in ([], [QuantizeKv(INT4, INT4)], [QuantizeKv(KIVI, INT4)]):
        program = make_program(*passes, PageCache(64))
        kernels = kernel_specs(program)
        total = sum(site.gather.site.bytes_per_token for site in kernels.values())
        assert total == program.plan.bytes_per_token


@pytest.mark.parametrize(
    ("passes", "changes", "layout"),
    [
        ([QuantizeKv(INT4, INT4), PageCache(64)], {}, "fragment"),
        ([PageCache(64)], {}, "fragment"),
        ([QuantizeKv(KIVI, INT4), PageCache(64)], {}, "rows"),
        ([QuantizeKv(INT4, INT4), PageCache(64)], {"head_dim": 48}, "rows"),
        ([QuantizeKv(INT4, INT4), PageCache(64)], {"dtype": torch.float32}, "rows"),
    ],
)
def test_fragments_where_they_can_hold_the_plan(passes, changes, layout):
    kernels = kernel_specs(make_program(*passes, **changes))
    assert {site.gather.site.layout for site in kernels.values()} == {layout}


def test_prefill_knows_what_stays_exact():
    regions = {"recent": 32, "flush": "block"}
    quantize = QuantizeKv(
        KIVI, INT4, regions={"sink": 4}, key_regions={"sink": 4, **regions}, value_regions=None
    )
    prefill = kernel_specs(make_program(quantize))[0].prefill
    assert (prefill.key_sink, prefill.key_keep, prefill.key_chunk) == (4, 0, 32)
    assert (prefill.value_sink, prefill.value_keep, prefill.value_chunk) == (4, 0, 1)


def test_options_of_scores_reach_both_attentions():
    options = {"window": 9, "softcap": 30.0, "alibi_slopes": torch.rand(4)}
    kernels = kernel_specs(make_program(attention=options))[0]
    for spec in (kernels.decode, kernels.prefill):
        assert (spec.window, spec.chunk, spec.softcap) == (9, None, 30.0)
        assert (spec.has_alibi, spec.has_sink_logits) == (True, False)
    plain = kernel_specs(make_program(attention={"sink_logits": torch.rand(4), "chunk": 8}))[0]
    assert (plain.decode.chunk, plain.decode.has_sink_logits) == (8, True)
    assert (plain.decode.window, plain.decode.softcap, plain.decode.has_alibi) == (
        None,
        None,
        False,
    )


def test_a_contiguous_cache_has_pages_that_hold_whole_groups():
    assert page_tokens(make_program().plan) == 64
    groups = {**KIVI, "group": 96}
    assert page_tokens(make_program(QuantizeKv(groups, INT4)).plan) == 192


@pytest.mark.parametrize("seed", [None, 5])
def test_kernels_take_over_rotations(seed):
    program = make_program(RotateQk(32, seed), QuantizeKv(INT4, INT4))
    site = kernel_specs(program)[1]
    signs = None if seed is None else "rotate_qk.signs_64_5"
    key, query = program.append_node(1).args[0], program.attention_node(1).args[0]
    assert site.key_hadamard == FoldedHadamard(key.name, 32, signs)
    assert site.query_hadamard == FoldedHadamard(query.name, 32, signs)
    assert (site.append.key_block, site.append.has_signs) == (32, seed is not None)
    assert (site.decode.query_block, site.decode.has_signs) == (32, seed is not None)


def test_a_rotation_that_another_node_reads_stays_in_the_graph():
    program = make_program(RotateQk(32))
    key = program.append_node(0).args[0]
    with program.graph.inserting_after(key):
        program.graph.call_function(torch.ops.aten.neg.default, (key,))
    site = kernel_specs(program)[0]
    assert (site.key_hadamard, site.append.key_block) == (None, 0)
    assert site.query_hadamard is not None


def test_a_block_that_kernels_cannot_apply_stays_in_the_graph():
    site = kernel_specs(make_program(RotateQk(8)))[0]
    assert (site.key_hadamard, site.query_hadamard) == (None, None)


def test_a_site_that_reads_another_cache_appends_nothing():
    program = make_program(RotateQk(32), QuantizeKv(INT4, INT4), PageCache(32))
    append, reader = program.append_node(1), program.attention_node(1)
    reader.args = (reader.args[0], program.append_node(0), *reader.args[2:])
    program.graph.erase_node(append)
    program.plan = program.plan.replace_site(1, owner=0)
    site = kernel_specs(program)[1]
    assert (site.owner, site.append, site.key_hadamard) == (0, None, None)
    assert site.query_hadamard is not None
    assert "append" not in site.by_kind


def test_nothing_is_rotated_without_the_pass():
    program, _ = apply(InsertCache(), gpt2_program(dtype=torch.float16))
    assert not list(program.calls(kvx.HADAMARD))
    site = kernel_specs(program)[0]
    assert (site.append.key_block, site.decode.query_block) == (0, 0)
