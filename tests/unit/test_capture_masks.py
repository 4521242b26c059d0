"""Classification of masks by their values."""

from __future__ import annotations

import math

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


@settings(max_examples=30, deadline=None)
@given(length=st.integers(2, 20), window=st.integers(1, 20))
def test_a_window_is_described(length: int, window: int) -> None:
    d = distances(length)
    want = MaskKind(causal=True, window=window if window < length else None)
    assert describe((d >= 0) & (d < window)) == want


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
        lambda d: (
            (d >= 0) & (torch.arange(9)[:, None] // 4 == torch.arange(9)[None] // 4)
        ),  # chunks
    ],
)
def test_other_masks_are_refused(change) -> None:
    assert describe(change(distances(9))) == "the mask is neither causal nor a sliding window"


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


def test_a_chunked_mask_is_refused_although_short_runs_look_causal() -> None:
    found = MaskGraph(8192, chunks=True).classify()
    assert isinstance(found, str)
    assert "8192" in found


def test_a_mask_that_is_off_by_one_is_refused() -> None:
    assert isinstance(MaskGraph(4096, first=1).classify(), str)


def test_a_bias_besides_the_mask_is_refused() -> None:
    prober = Prober(fx.Graph(), {})

    def evaluate(setting: Setting, _: dict[int, int]) -> Tensor:
        d = distances(setting.length)
        return torch.where(d >= 0, d * -0.5, -math.inf)

    assert classify(prober, evaluate, []) == "scores get a bias besides the mask"


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
