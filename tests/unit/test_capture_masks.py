"""Classification of masks by their values."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from kvxform.capture.masks import MaskKind, classify, describe
from kvxform.capture.probing import Prober, Setting
from kvxform.capture.weights import new_meta
from kvxform.ir.types import TensorType

aten = torch.ops.aten


def distances(length: int) -> Tensor:
    where = torch.arange(length)
    return where[:, None] - where[None]


def chunks(size: int, *, first: int = 0, length: int = 9) -> Tensor:
    part = (torch.arange(length) + first) // size
    return part[:, None] == part[None]


@settings(max_examples=30, deadline=None)
@given(length=st.integers(2, 20), window=st.integers(1, 20))
def test_a_window_is_described(length: int, window: int) -> None:
    d = distances(length)
    want = MaskKind(causal=True, window=window if window < length else None)
    assert describe((d >= 0) & (d < window)) == want


@settings(max_examples=30, deadline=None)
@given(length=st.integers(3, 20), size=st.integers(2, 20))
def test_chunks_are_described(length: int, size: int) -> None:
    seen = chunks(size, length=length) & (distances(length) >= 0)
    assert describe(seen) == MaskKind(causal=True, chunk=size if size < length else None)


def test_a_full_mask_is_bidirectional() -> None:
    assert describe(torch.ones(4, 4, dtype=torch.bool)) == MaskKind(causal=False)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d >= -1,  # sees one token ahead
        lambda d: d >= 1,  # does not see itself
        lambda d: (d >= 0) & (d != 2),  # a hole
        lambda d: (d >= 0) & ((d < 3) | (d == 6)),
        lambda d: d.abs() < 3,  # a window on both sides
        lambda d: chunks(4) & (d < 3) & (d >= 0),  # a window in chunks
        lambda d: chunks(4, first=1) & (d >= 0),  # chunks that do not start at 0
    ],
)
def test_other_masks_are_refused(change) -> None:
    assert (
        describe(change(distances(9)))
        == "the mask is neither causal nor a sliding window nor chunks"
    )


class MaskGraph:
    """A mask as a graph: `distance >= first` and `distance < number`, or chunks of `number`."""

    def __init__(self, number: int, *, first: int = 0, chunks: bool = False) -> None:
        self.graph = fx.Graph()
        for name in ("input_ids", "position_ids"):
            self.graph.placeholder(name).meta = new_meta(TensorType(torch.int64, ("B", "S")))
        ids = next(iter(self.graph.nodes))
        size = self.graph.call_function(aten.sym_size.int, (ids, 1))
        where = self.graph.call_function(aten.arange.default, (size,))
        rows = self.graph.call_function(aten.unsqueeze.default, (where, 1))
        columns = self.graph.call_function(aten.unsqueeze.default, (where, 0))
        distance = self.graph.call_function(aten.sub.Tensor, (rows, columns))
        seen = self.graph.call_function(aten.ge.Scalar, (distance, first))
        if chunks:
            parts = [
                self.graph.call_function(aten.floor_divide.default, (n, number))
                for n in (rows, columns)
            ]
            near = self.graph.call_function(aten.eq.Tensor, tuple(parts))
        else:
            near = self.graph.call_function(aten.lt.Scalar, (distance, number))
        self.mask = self.graph.call_function(aten.bitwise_and.Tensor, (seen, near))

    def classify(self) -> MaskKind | str:
        prober = Prober(self.graph, {})

        def evaluate(setting: Setting, numbers: dict[int, int]) -> Tensor:
            (seen,) = prober.run([self.mask], setting, numbers=numbers)
            return torch.where(seen, 0.0, -math.inf)

        return classify(prober, evaluate, [self.mask])


@pytest.mark.parametrize("window", [1, 4, 8, 9, 10, 63, 4096, 32768])
def test_a_window_of_any_size_is_found(window: int) -> None:
    assert MaskGraph(window).classify() == MaskKind(causal=True, window=window)


@pytest.mark.parametrize("size", [4, 10, 8192])
def test_chunks_of_any_size_are_found(size: int) -> None:
    assert MaskGraph(size, chunks=True).classify() == MaskKind(causal=True, chunk=size)


def test_a_mask_that_is_off_by_one_is_refused() -> None:
    assert isinstance(MaskGraph(4096, first=1).classify(), str)


Bias = Callable[[Tensor, Tensor], Tensor]  # from positions of queries and keys


def biased(bias: Bias) -> MaskKind | str:
    """Classify a causal mask of three heads with a bias."""

    def evaluate(setting: Setting, _: dict[int, int]) -> Tensor:
        keys = torch.arange(setting.length, dtype=torch.float64)
        queries = keys[:, None]
        added = bias(queries, keys) * torch.ones(setting.batch, 3, 1, 1, dtype=torch.float64)
        return torch.where(queries >= keys, added, -math.inf)

    return classify(Prober(fx.Graph(), {}), evaluate, [])


SLOPES = torch.tensor([0.5, 0.3, 0.01], dtype=torch.float64)[:, None, None]
LINEAR: dict[str, Bias] = {
    "distance": lambda t, p: SLOPES * (p - t),
    "key position": lambda t, p: SLOPES * p,
    "key position from the end": lambda t, p: SLOPES * (p - p.numel() + 1),
    "any constant of a row": lambda t, p: SLOPES * p + t.sqrt() * 7,
}
NOT_LINEAR: dict[str, Bias] = {
    "square": lambda t, p: SLOPES * (p - t) ** 2,
    "one percent off": lambda t, p: SLOPES * (p - t) * (1 + 0.01 * (p == 0)),
    "on some keys": lambda t, p: SLOPES * (p - t) * (p > 1),
    "with the length": lambda t, p: SLOPES * (p - t) * p.numel(),
}


@pytest.mark.parametrize("name", LINEAR)
def test_slopes_are_read_up_to_a_constant_of_a_row(name: str) -> None:
    found = biased(LINEAR[name])
    assert found == MaskKind(causal=True)
    assert found.slopes is not None
    assert torch.allclose(found.slopes, SLOPES.flatten(), rtol=1e-12, atol=0)


def test_one_slope_of_all_heads_is_found_next_to_a_window() -> None:
    found = biased(lambda t, p: torch.where(t - p < 3, 0.5 * p, -math.inf))
    assert found == MaskKind(causal=True, window=3)
    assert torch.equal(found.slopes, torch.tensor([0.5], dtype=torch.float64))


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_another_bias_is_refused(name: str) -> None:
    found = biased(NOT_LINEAR[name])
    assert isinstance(found, str)
    assert ("other slopes" if name == "with the length" else "not a slope times") in found


def test_a_mask_that_differs_between_heads_is_refused() -> None:
    prober = Prober(fx.Graph(), {})

    def evaluate(setting: Setting, _: dict[int, int]) -> Tensor:
        d = distances(setting.length)
        planes = torch.stack([d >= 0, (d >= 0) & (d < 3)])[None]
        return torch.where(planes, 0.0, -math.inf)

    assert classify(prober, evaluate, []) == "the mask differs between heads"


def test_a_mask_that_changes_with_the_length_is_refused() -> None:
    prober = Prober(fx.Graph(), {})

    def evaluate(setting: Setting, _: dict[int, int]) -> Tensor:
        d = distances(setting.length)
        seen = (d >= 0) & (d < 3) if setting.length < 8 else d >= 0
        return torch.where(seen, 0.0, -math.inf)

    assert "at length 9" in str(classify(prober, evaluate, []))
