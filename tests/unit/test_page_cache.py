"""page-cache: the layout of the plan, and groups that would cross a page."""

from __future__ import annotations

import pytest
from programs import apply, fired, llama_program, reasons

from kvxform.errors import PassError, RecipeError
from kvxform.ir.plan import Layout
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.passes.memory.page_cache import PageCache
from kvxform.passes.quantize.quantize_kv import QuantizeKv


def cached_program():
    program, _ = apply(InsertCache(), llama_program())
    return program


def test_the_layout_is_paged_and_the_graph_stays():
    program = cached_program()
    paged, found = apply(PageCache(32), program)
    assert fired(found) == 1
    assert paged.plan.layout == Layout("paged", 32)
    assert paged.facts["cache.layout"] == "paged(32)"
    assert [n.name for n in paged.graph.nodes] == [n.name for n in program.graph.nodes]
    # 33 tokens are two pages of 32, for 2 layers, K and V, 2 heads of 16 float64
    assert paged.plan.bytes_at([33], 64) == 2 * 32 * 2 * 2 * 2 * 16 * 8


def test_the_page_size_can_be_changed():
    paged, _ = apply(PageCache(32), cached_program())
    again, found = apply(PageCache(64), paged)
    assert fired(found) == 1
    assert again.plan.layout.page_size == 64


@pytest.mark.parametrize(("group", "page_size"), [(32, 16), (48, 64), (128, 64)])
def test_groups_that_would_cross_a_page_are_refused_in_either_order(group, page_size):
    quantize = QuantizeKv({"codec": "int", "axis": "channel", "group": group}, None)
    grouped, _ = apply(quantize, cached_program())
    with pytest.raises(PassError, match=rf"KVX205 \[page-cache\].*{group} tokens.*got {page_size}"):
        PageCache(page_size).match(grouped)
    paged, _ = apply(PageCache(page_size), cached_program())
    with pytest.raises(PassError, match=rf"KVX205 \[quantize-kv\].*{page_size}; got {group} at"):
        quantize.match(paged)


def test_groups_that_divide_a_page_are_fine():
    grouped, _ = apply(
        QuantizeKv({"codec": "int", "axis": "channel", "group": 16}, None), cached_program()
    )
    _, found = apply(PageCache(16), grouped)
    assert fired(found) == 1


def test_without_a_cache_there_is_nothing_to_page():
    assert reasons(PageCache().match(llama_program())) == ["there is no cache"]
    (requirement,) = PageCache.requires
    assert not requirement.is_met(llama_program().facts)


@pytest.mark.parametrize("page_size", [0, 8, 48, 512])
def test_other_page_sizes_are_refused(page_size):
    with pytest.raises(RecipeError, match=r"KVX107 \[page-cache\] page_size.*got"):
        PageCache(page_size)
