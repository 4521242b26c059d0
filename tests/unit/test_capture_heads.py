"""Head maps: reading them off a graph, grouping, and writing them back as nodes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from kvxform.capture.emitting import HeadEmitter
from kvxform.capture.heads import (
    Stride,
    find_stride,
    from_rows,
    group_size,
    measure_heads,
    to_rows,
)
from kvxform.capture.probing import Prober, Setting
from kvxform.capture.structure import Stop
from kvxform.capture.weights import new_meta
from kvxform.ir.types import TensorType

aten = torch.ops.aten


def base_graph(shape: tuple[int | str, ...]) -> tuple[fx.Graph, fx.Node]:
    """Return a graph with the two inputs and one content node of type `shape`."""
    graph = fx.Graph()
    for name in ("input_ids", "position_ids"):
        graph.placeholder(name).meta = new_meta(TensorType(torch.int64, ("B", "S")))
    node = graph.call_function(aten.relu.default, (next(iter(graph.nodes)),))
    node.meta = new_meta(TensorType(torch.float64, shape))
    return graph, node


SHAPES = [("B", "S", 12), ("B", "S", 3, 4), ("B", 3, "S", 4), ("S", "B", 12), ("B", 3, 4, "S")]


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_and_values_are_inverse(shape: tuple[int | str, ...]) -> None:
    _, node = base_graph(shape)
    rows = torch.randn(2, 5, 12)
    value = from_rows(node, rows)
    assert value.shape == tuple({"B": 2, "S": 5}.get(n, n) for n in shape)
    assert torch.equal(to_rows(node, value), rows)


@st.composite
def head_maps(draw: st.DrawFn) -> Tensor:
    """Any choice of features: shuffled, strided, or plain."""
    heads, dim = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    kind = draw(st.sampled_from(["shuffled", "strided", "plain"]))
    if kind == "shuffled":
        seed = draw(st.integers(0, 1000))
        picked = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
        return picked[: heads * dim].view(heads, dim)
    step = draw(st.integers(dim, 24 // heads)) if kind == "strided" else dim
    start = draw(st.integers(0, 24 - (heads - 1) * step - dim))
    return start + torch.arange(heads)[:, None] * step + torch.arange(dim)


@settings(max_examples=60, deadline=None)
@given(index=head_maps(), shape=st.sampled_from([("B", "S", 24), ("B", 6, "S", 4), ("S", "B", 24)]))
def test_written_nodes_give_exactly_the_heads_of_the_map(
    index: Tensor, shape: tuple[int | str, ...]
) -> None:
    graph, anchor = base_graph(shape)
    end = graph.output(anchor)
    end.meta = new_meta(TensorType(torch.float64, shape))
    prober = Prober(graph, {})
    node = HeadEmitter(prober, end).emit(anchor, index)
    rows = torch.randn(2, 5, 24, dtype=torch.float64)
    setting = Setting.first(5, batch=2)
    (got,) = prober.run([node], setting, {anchor: from_rows(anchor, rows)})
    assert torch.equal(got, rows[..., index].transpose(1, 2))
    assert node.meta["type"].shape == ("B", index.shape[0], "S", index.shape[1])
    prober.refresh()
    measured = measure_heads(prober, node, Stop(anchor, ()))
    assert measured is not None
    assert torch.equal(measured.index, index)


@pytest.mark.parametrize(
    ("order", "group"),
    [([0, 0, 1, 1], 2), ([0, 1, 2], 1), ([0, 0, 0], 3), ([1, 1, 0, 0], 2)],
)
def test_neighbouring_groups_are_recognised(order: list[int], group: int) -> None:
    index = torch.arange(12).view(3, 4)[order]
    assert group_size(index) == group


@pytest.mark.parametrize("order", [[0, 1, 0, 1], [0, 0, 1], [0, 1, 1, 0]])
def test_heads_repeated_in_another_order_are_refused(order: list[int]) -> None:
    index = torch.arange(12).view(3, 4)[order]
    assert group_size(index) is None


def test_strides_are_read_off() -> None:
    index = 3 + torch.arange(4)[:, None] * 10 + torch.arange(5)
    assert find_stride(index) == Stride(3, 10)
    assert find_stride(index[:1]) == Stride(3, 5)
    assert find_stride(index.flip(1)) is None


def test_an_operand_that_computes_has_no_head_map() -> None:
    graph, anchor = base_graph(("B", 2, "S", 4))
    for target, args in (
        (aten.add.Tensor, (anchor, 1.0)),
        (aten.cumsum.default, (anchor, -1)),
        (aten.pow.Tensor_Scalar, (anchor, 2)),
    ):
        node = graph.call_function(target, args)
        node.meta = dict(anchor.meta)
        prober = Prober(graph, {})
        assert measure_heads(prober, node, Stop(anchor, (node,))) is None
