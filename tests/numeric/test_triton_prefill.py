"""Prefill kernels in the interpreter against attention of each query alone, in float64."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prefill_cases import first_exact, make_case, reference, run_prefill

from kvxform.codecs.basis import Basis
from kvxform.codegen.triton.emit import emit
from kvxform.codegen.triton.loading import load
from kvxform.codegen.triton.spec import PrefillSpec

pytestmark = pytest.mark.triton

# Weights are rounded to the dtype of V; outputs are of the size of one.
TOLERANCE = {"float16": 3e-3, "float32": 3e-6}
KIVI = {"key_chunk": 16, "value_keep": 16}  # keys in blocks, values one by one


def check(
    spec: PrefillSpec, starts: list[int], counts: list[int], tile: tuple[int, int] = (32, 16)
) -> None:
    case = make_case(spec, starts, counts)
    module = load(emit(spec, interpret=True))
    out, lse = run_prefill(module, case, config=module.Config(*tile, 4, 1))
    wanted, wanted_lse, _ = reference(case)
    assert out.dtype == case.q.dtype
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=TOLERANCE[spec.dtype])
    if spec.has_lse:
        torch.testing.assert_close(lse.double(), wanted_lse, rtol=0, atol=3e-6)


def test_causal_attention_of_grouped_heads() -> None:
    check(PrefillSpec(4, 2, 16, 16, "float16"), [0], [40])


def test_chunked_prefill_of_ragged_rows() -> None:
    check(PrefillSpec(3, 1, 16, 16, "float32", has_lse=True), [0, 31, 5, 8], [20, 1, 0, 9])


def test_values_of_another_width_and_channels_that_fill_no_tile() -> None:
    check(PrefillSpec(2, 2, 24, 40, "float16", has_lse=True), [3], [30])


@pytest.mark.parametrize(
    "spec",
    [
        PrefillSpec(2, 1, 32, 16, "float16", query_block=32, has_signs=True),
        PrefillSpec(2, 1, 48, 48, "float32", query_block=16, has_lse=True),
    ],
    ids=["whole", "blocks"],
)
def test_queries_are_rotated(spec: PrefillSpec) -> None:
    plain = dataclasses.replace(spec, query_block=0, has_signs=False)
    case = make_case(plain, [3], [20])
    signs = torch.where(torch.rand(spec.key_dim) < 0.5, -1.0, 1.0)
    q = Basis("hadamard", spec.query_block).rotate(
        case.q.double() * (signs if spec.has_signs else 1)
    )
    wanted, _, _ = reference(case._replace(q=q))
    module = load(emit(spec, interpret=True))
    rotated = case._replace(spec=spec, options={"signs": signs} if spec.has_signs else {})
    out, _ = run_prefill(module, rotated, config=module.Config(32, 16, 4, 1))
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=TOLERANCE[spec.dtype])
    assert (wanted - reference(case)[0]).abs().max() > 0.1


def test_window() -> None:
    check(PrefillSpec(2, 1, 16, 16, "float32", window=12, has_lse=True), [0, 60], [30, 25])


@pytest.mark.parametrize("span", [{"window": 20}, {"chunk": 32}])
def test_tiles_that_no_query_sees_are_skipped(span: dict[str, int]) -> None:
    """They are not masked: weights of zero would still spread what is not a number."""
    spec = PrefillSpec(1, 1, 16, 16, "float32", **span)
    case = make_case(spec, [64], [8])
    module = load(emit(spec, interpret=True))
    config = module.Config(16, 16, 4, 1)
    wanted, _ = run_prefill(module, case, config=config)
    for stored in case.stored:
        stored[:, :, :32] = math.nan  # the first query sees 45 and later, or 64 and later
    assert torch.equal(run_prefill(module, case, config=config)[0], wanted)


def test_chunks_that_see_only_themselves() -> None:
    check(PrefillSpec(2, 1, 16, 16, "float32", chunk=24), [0, 40], [30, 33])


def test_softcap_sink_logits_and_alibi() -> None:
    spec = PrefillSpec(
        4,
        2,
        16,
        16,
        "float32",
        softcap=1.5,
        has_sink_logits=True,
        has_alibi=True,
        has_lse=True,
    )
    check(spec, [0, 20], [9, 20])


def test_regions_with_two_rules() -> None:
    spec = PrefillSpec(2, 1, 16, 16, "float32", key_sink=3, value_sink=3, has_lse=True, **KIVI)
    check(spec, [0, 50], [70, 20])


def test_a_tile_of_regions_takes_only_the_copies_it_needs() -> None:
    """Tiles that no query reads in one copy must not depend on it, not even by 0 * NaN."""
    spec = PrefillSpec(1, 1, 16, 16, "float32", key_keep=20, value_keep=20)
    case = make_case(spec, [64], [8])
    module = load(emit(spec, interpret=True))
    config = module.Config(16, 16, 4, 1)
    wanted, _ = run_prefill(module, case, config=config)
    turn = first_exact(71, (0, 20, 1)) // 16 * 16 + 16  # first tile that is exact for all queries
    for stored in case.stored:
        stored[:, :, turn:] = math.nan
    for exact in case.exact:
        exact[:, :, : first_exact(64, (0, 20, 1))] = math.nan
    out, _ = run_prefill(module, case, config=config)
    assert torch.equal(out, wanted)


def test_the_copy_matters() -> None:
    """Near miss: without the rule the same tokens give another result."""
    with_rule = PrefillSpec(1, 1, 16, 16, "float32", key_keep=8, value_keep=8)
    case = make_case(with_rule, [0], [20])
    plain = PrefillSpec(1, 1, 16, 16, "float32")
    wanted, _, _ = reference(case)
    other, _, _ = reference(case._replace(spec=plain))
    assert (wanted - other).abs().max() > 0.1


def test_chunked_prefill_gives_what_one_prefill_gives() -> None:
    spec = PrefillSpec(2, 1, 16, 16, "float32", key_chunk=8, value_keep=5)
    case = make_case(spec, [0], [40])
    module = load(emit(spec, interpret=True))
    config = module.Config(32, 16, 4, 1)
    whole, _ = run_prefill(module, case, config=config)
    for first, last in ((0, 7), (7, 8), (8, 33), (33, 40)):
        part = case._replace(starts=[first], counts=[last - first], q=case.q[:, :, first:last])
        out, _ = run_prefill(module, part, config=config)
        torch.testing.assert_close(out, whole[:, :, first:last], rtol=0, atol=2e-6)


def test_strides_are_free() -> None:
    """Tokens before heads, as projections give them."""
    spec = PrefillSpec(2, 1, 16, 16, "float32")
    case = make_case(spec, [4], [12])
    turned = case._replace(
        q=case.q.transpose(1, 2).contiguous().transpose(1, 2),
        stored=tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in case.stored),
    )
    assert turned.q.stride() != case.q.stride()
    module = load(emit(spec, interpret=True))
    config = module.Config(16, 16, 4, 1)
    assert torch.equal(
        run_prefill(module, turned, config=config)[0], run_prefill(module, case, config=config)[0]
    )


ROWS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)), min_size=1, max_size=2)


@settings(max_examples=4, deadline=None)
@given(ROWS, st.integers(0, 3), st.integers(0, 9), st.sampled_from([1, 4, 8]))
def test_any_rows_and_rules(rows: list[tuple[int, int]], sink: int, keep: int, chunk: int) -> None:
    rule = {"key_sink": sink, "value_sink": sink, "key_keep": keep, "key_chunk": chunk}
    spec = PrefillSpec(2, 1, 16, 16, "float32", has_lse=True, **rule)
    check(spec, [a for a, _ in rows], [n for _, n in rows])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("regions", [{}, KIVI, {"key_keep": 9, "key_chunk": 8}, {"value_keep": 30}])
@pytest.mark.parametrize(
    "span", [{}, {"window": 20}, {"chunk": 24}, {"window": 30, "chunk": 40, "softcap": 2.0}]
)
@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (16, 1)])
def test_all_together(
    dtype: str, regions: dict[str, int], span: dict[str, int], heads: tuple[int, int]
) -> None:
    spec = PrefillSpec(*heads, 24, 16, dtype, has_lse=True, has_alibi=True, **regions, **span)
    check(spec, [0, 45, 17], [50, 20, 1])


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_head_dims(head_dim: int) -> None:
    check(PrefillSpec(2, 1, head_dim, head_dim, "float16"), [10], [40], (64, 32))
