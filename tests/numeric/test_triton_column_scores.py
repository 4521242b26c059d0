"""Column scores in the interpreter against sums of softmax columns in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prefill_cases import DenseCase, make_case, reference
from torch import Tensor

from kvxform.codegen.triton.emit import emit
from kvxform.codegen.triton.loading import load
from kvxform.codegen.triton.spec import ColumnScoresSpec, PrefillSpec

pytestmark = pytest.mark.triton


def make_dense(spec: ColumnScoresSpec, starts: list[int], counts: list[int]) -> DenseCase:
    """Return the case of a prefill with the same scores."""
    dim = spec.head_dim
    prefill = PrefillSpec(
        spec.num_q_heads,
        spec.num_kv_heads,
        dim,
        dim,
        spec.dtype,
        window=spec.window,
        chunk=spec.chunk,
        softcap=spec.softcap,
        has_alibi=spec.has_alibi,
    )
    return make_case(prefill, starts, counts)


def run(spec: ColumnScoresSpec, case: DenseCase, tile: tuple[int, int] = (32, 16)) -> Tensor:
    module = load(emit(spec, interpret=True))
    _, lse, _ = reference(case)
    q, keys, lse = case.q.clone(), case.stored[0].clone(), lse.float()
    for b, (start, count) in enumerate(zip(case.starts, case.counts, strict=True)):
        q[b, :, count:] = math.nan
        lse[b, :, count:] = math.nan
        keys[b, :, start + count :] = math.nan
    scores = torch.full((keys.shape[0], keys.shape[1], keys.shape[2]), math.nan)
    starts, counts = case.int32(case.starts), case.int32(case.counts)
    config = module.Config(*tile, 4, 1)
    module.column_scores(
        q, keys, lse, starts, counts, scores, scale=case.scale, config=config, **case.options
    )
    return scores


def check(spec: ColumnScoresSpec, starts: list[int], counts: list[int]) -> None:
    case = make_dense(spec, starts, counts)
    scores = run(spec, case)
    _, _, wanted = reference(case)
    torch.testing.assert_close(scores.double(), wanted, rtol=0, atol=2e-5)
    # Weights of a query sum to one.
    sums = torch.tensor(counts) * (spec.num_q_heads / spec.num_kv_heads)
    torch.testing.assert_close(scores.sum(-1), sums[:, None].expand(-1, spec.num_kv_heads))


def test_ragged_rows_of_chunked_prefill() -> None:
    check(ColumnScoresSpec(6, 2, 16, "float16"), [0, 40, 7], [33, 9, 0])


def test_window_and_softcap() -> None:
    check(ColumnScoresSpec(2, 1, 24, "float32", window=10, softcap=3.0), [0, 50], [30, 20])


def test_chunks_and_alibi() -> None:
    check(ColumnScoresSpec(2, 1, 16, "float32", chunk=24, has_alibi=True), [0, 30], [33, 20])


def test_equal_calls_give_equal_bits() -> None:
    spec = ColumnScoresSpec(4, 1, 16, "float32")
    case = make_dense(spec, [5], [30])
    assert torch.equal(run(spec, case), run(spec, case))


@settings(max_examples=4, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 20)), min_size=1, max_size=2))
def test_any_rows(rows: list[tuple[int, int]]) -> None:
    check(
        ColumnScoresSpec(3, 1, 16, "float32", window=16),
        [a for a, _ in rows],
        [n for _, n in rows],
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("span", [{}, {"window": 20}, {"chunk": 24}, {"window": 30, "chunk": 40}])
@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (16, 1)])
def test_all_together(dtype: str, span: dict[str, int], heads: tuple[int, int]) -> None:
    spec = ColumnScoresSpec(*heads, 24, dtype, softcap=4.0, has_alibi=True, **span)
    check(spec, [0, 45, 17], [50, 20, 1])
