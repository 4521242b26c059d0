"""Where the heads of an attention operand come from, measured instead of matched.

Between a projection and attention lie views, splits, transposes and repeats. Whatever they are,
together they pick features: channel d of head h is feature `index[h, d]` of an *anchor* node. The
index is read off by sending the feature numbers themselves through the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from kvxform.capture.probing import Prober, Setting, is_close
from kvxform.capture.structure import Stop, shape_of, tensor_type
from kvxform.ir.rounding import coarsest

DIGIT_BASE = 16  # of feature numbers; bfloat16 holds products of so small numbers well enough


@dataclass(frozen=True)
class HeadMap:
    """Channel d of head h of an operand is `factor[d]` times feature `index[h, d]` of an anchor.

    Attributes:
        anchor: Node that all of the operand passes through.
        index: int64 `[heads, head_dim]`, into the flattened features of the anchor.
        factor: float64 `[head_dim]`; the same for every head.
        region: Content nodes between anchor (excluded) and operand (included).
    """

    anchor: fx.Node
    index: Tensor
    factor: Tensor
    region: tuple[fx.Node, ...]

    def uniform_factor(self) -> float | None:
        """Return the factor if it is the same for all channels."""
        first = float(self.factor[0])
        return first if bool((self.factor == first).all()) else None


@dataclass(frozen=True)
class Axes:
    """Which axes of an anchor are batch and sequence; all others are features."""

    batch: int
    sequence: int
    features: tuple[int, ...]

    @staticmethod
    def of(node: fx.Node) -> Axes | None:
        """Return the axes of a node, or None unless `B` and `S` are one axis each."""
        type_ = tensor_type(node)
        if type_ is None or type_.shape.count("B") != 1 or type_.shape.count("S") != 1:
            return None
        rest = tuple(i for i, n in enumerate(type_.shape) if n not in ("B", "S"))
        if not all(isinstance(type_.shape[i], int) for i in rest):
            return None
        return Axes(type_.shape.index("B"), type_.shape.index("S"), rest)

    def is_last_feature(self) -> bool:
        """Return whether the last axis is a feature axis."""
        return max(self.batch, self.sequence) < max(self.features, default=-1)


def feature_sizes(node: fx.Node) -> list[int]:
    """Return the sizes of the feature axes of a node that has `Axes`."""
    axes = Axes.of(node)
    assert axes is not None
    return [int(shape_of(node)[i]) for i in axes.features]


def num_features(node: fx.Node) -> int:
    """Return how many features a node with `Axes` has."""
    return int(torch.Size(feature_sizes(node)).numel())


def from_rows(node: fx.Node, rows: Tensor) -> Tensor:
    """Arrange `rows` `[B, S, features]` as a value of `node`."""
    axes = Axes.of(node)
    assert axes is not None
    value = rows.unflatten(-1, feature_sizes(node)) if axes.features else rows.squeeze(-1)
    return value.permute(_order(axes)).contiguous()


def to_rows(node: fx.Node, value: Tensor) -> Tensor:
    """Arrange a value of `node` as rows `[B, S, features]`; the inverse of `from_rows`."""
    axes = Axes.of(node)
    assert axes is not None
    return value.permute(axes.batch, axes.sequence, *axes.features).flatten(2)


def _order(axes: Axes) -> list[int]:
    """Return the permutation from (batch, sequence, features) to the axes of the node."""
    source = {axes.batch: 0, axes.sequence: 1}
    source |= {axis: i + 2 for i, axis in enumerate(axes.features)}
    return [source[i] for i in range(len(source))]


def measure_heads(prober: Prober, operand: fx.Node, stop: Stop) -> HeadMap | None:
    """Return how `operand` `[B, H, S, D]` picks features of `stop.node` at position 0, or None.

    None means that the operand is not a choice of features there: it adds, mixes or computes.
    """
    if Axes.of(stop.node) is None:
        return None
    count, dtype = num_features(stop.node), _float_type(stop.node)
    if dtype is None:
        return None
    setting = Setting.first(3)
    prober.remember(stop.region, setting)

    def first_token(features: Tensor) -> Tensor:
        rows = features.to(prober.device, dtype).expand(1, setting.length, count)
        bound = {stop.node: from_rows(stop.node, rows)}
        value: Tensor = prober.run([operand], setting, bound)[0]
        return value[0, :, 0].double().cpu()  # [H, D]

    factor = first_token(torch.ones(count))
    if not bool(torch.isfinite(factor).all()) or bool((factor == 0).any()):
        return None
    index = read_index(lambda features: first_token(features) / factor, count)
    if index is None or bool((factor != factor[0]).any()):
        return None
    noise = prober.random(count, dtype=dtype)
    want, both = noise.double().cpu()[index] * factor, coarsest(dtype, operand.meta["type"].dtype)
    if not is_close(first_token(noise), want, both) or bool(first_token(noise * 0).any()):
        return None
    return HeadMap(stop.node, index, factor[0], stop.region)


def read_index(send: Callable[[Tensor], Tensor], count: int) -> Tensor | None:
    """Return which of `count` features each element is of what `send` makes of features.

    Features are numbered, and the numbers sent digit by digit: 16 bits hold few integers.

    Args:
        send: From features `[count]`, float64, to a choice of them, of any shape and dtype.
        count: Features.

    Returns:
        int64 on the CPU, or None if what comes back is no choice.
    """
    numbers, place, index = torch.arange(count), 1, None
    while index is None or place < count:
        found = send((numbers // place % DIGIT_BASE + 1).double()).double().cpu().round().long() - 1
        if bool((found < 0).any() or (found >= DIGIT_BASE).any()):
            return None
        index = found * place if index is None else index + found * place
        place *= DIGIT_BASE
    return None if bool((index >= count).any()) else index


def is_static(prober: Prober, operand: fx.Node, heads: HeadMap) -> bool:
    """Return whether the map holds at every position, so that nothing but a choice happens."""
    setting = Setting.first(5, batch=2)
    dtype = _float_type(heads.anchor)
    assert dtype is not None
    rows = prober.random(2, 5, num_features(heads.anchor), dtype=dtype)
    bound = {heads.anchor: from_rows(heads.anchor, rows)}
    prober.remember(heads.region, setting)
    (got,) = prober.run([operand], setting, bound)
    want = (rows.double()[..., heads.index] * heads.factor).transpose(1, 2)
    return is_close(got.double(), want, coarsest(dtype, operand.meta["type"].dtype))


def _float_type(node: fx.Node) -> torch.dtype | None:
    type_ = tensor_type(node)
    return type_.dtype if type_ is not None and type_.dtype.is_floating_point else None


def group_size(index: Tensor) -> int | None:
    """Return how often each KV head repeats in `index`, or None if not in neighbouring groups.

    `kvx::attention` lets query head h read KV head `h // group`. Heads repeated in any other order
    cannot be stored once.
    """
    unique = torch.unique(index, dim=0).shape[0]
    if index.shape[0] % unique:
        return None
    group = index.shape[0] // unique
    return group if torch.equal(index, index[::group].repeat_interleave(group, 0)) else None


@dataclass(frozen=True)
class Stride:
    """An index of the form `start + h * step + d`."""

    start: int
    step: int


def find_stride(index: Tensor) -> Stride | None:
    """Return the stride form of `index` `[heads, head_dim]`, or None if it has none."""
    start = int(index[0, 0])
    step = int(index[1, 0]) - start if index.shape[0] > 1 else index.shape[1]
    want = start + torch.arange(index.shape[0])[:, None] * step + torch.arange(index.shape[1])
    return Stride(start, step) if step > 0 and torch.equal(index, want) else None
