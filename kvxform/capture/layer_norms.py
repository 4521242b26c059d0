"""Recognise LayerNorm that is written out, by its values, and replace it with `aten.layer_norm`.

As in `norms`, a candidate starts at a root and at a node that all of it is computed from, and is
extended as long as the op equals it on random input. The op rounds in its own way; where a model
takes its norms in a dtype coarser than its own, they are left as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from kvxform.capture.emitting import insert
from kvxform.capture.heads import Axes, from_rows, num_features
from kvxform.capture.norms import LARGEST_EPS, find_longest, raise_each
from kvxform.capture.probing import Prober, Setting, is_close
from kvxform.capture.structure import (
    Stop,
    literals,
    shape_of,
    tensor_type,
)
from kvxform.ir.rounding import coarsest

_ROOTS = frozenset({"rsqrt", "sqrt", "pow", "std"})
_INSIDE = _ROOTS | frozenset(
    {"mean", "sum", "var", "square", "mul", "div", "add", "sub", "reciprocal", "to", "_to_copy"}
)
_SETTING = Setting.first(3, batch=2)
_SIZES = (1.0, 1e-3, 30.0)  # of the inputs; the small one makes eps count
_SHIFT = 0.7  # added to the inputs, so that the mean counts


@dataclass(frozen=True)
class LayerNorm:
    """A proven LayerNorm: `out = layer_norm(x, weight, bias, eps)` over the last axis."""

    x: fx.Node
    out: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    eps: float
    region: tuple[fx.Node, ...]


def raise_layer_norms(prober: Prober) -> int:
    """Replace every LayerNorm that is written out; return how many there were."""
    return raise_each(prober, _ROOTS, find_layer_norm, _replace)


def find_layer_norm(prober: Prober, root: fx.Node) -> LayerNorm | None:
    """Return the longest LayerNorm around `root`, or None. Source: arXiv 1607.06450."""
    return find_longest(prober, root, _INSIDE, _explain)


def _explain(prober: Prober, stop: Stop, out: fx.Node) -> LayerNorm | None:
    """Return the norm that the region from `stop` to `out` computes, or None."""
    axes = Axes.of(stop.node)
    if axes is None or tensor_type(stop.node) != tensor_type(out) or not axes.is_last_feature():
        return None
    dtype = stop.node.meta["type"].dtype
    if coarsest(dtype, _model_dtype(prober.graph)) != _model_dtype(prober.graph):
        return None
    prober.remember(stop.region, _SETTING)
    rows = prober.random(2, 3, num_features(stop.node), dtype=dtype) + _SHIFT
    samples = [from_rows(stop.node, rows * size) for size in _SIZES]
    wants = [prober.run([out], _SETTING, {stop.node: x})[0] for x in samples]
    for norm in _hypotheses(prober, stop, out):
        gots = (apply_layer_norm(prober, norm, x) for x in samples)
        if all(is_close(got, want) for got, want in zip(gots, wants, strict=True)):
            return norm
    return None


def _model_dtype(graph: fx.Graph) -> torch.dtype:
    """Return the dtype of the logits."""
    (output,) = (n for n in graph.nodes if n.op == "output")
    dtype: torch.dtype = output.args[0].meta["type"].dtype
    return dtype


def _hypotheses(prober: Prober, stop: Stop, out: fx.Node) -> Iterator[LayerNorm]:
    """Yield norms worth a trial: numbers of the region, and vectors as long as the last axis."""
    type_ = stop.node.meta["type"]
    vectors = [
        leaf
        for leaf in prober.leaves(stop.region)
        if (own := tensor_type(leaf)) and own.shape == type_.shape[-1:] and own.dtype == type_.dtype
    ]
    eps = sorted({n for _, n in literals(stop.region, float) if 0 < n < LARGEST_EPS})
    choices: list[fx.Node | None] = [None, *vectors]
    for number, weight, bias in itertools.product(eps, choices, choices):
        if weight is None or weight is not bias:
            yield LayerNorm(stop.node, out, weight, bias, number, stop.region)


def apply_layer_norm(prober: Prober, norm: LayerNorm, x: Tensor) -> Tensor:
    """Return `aten.layer_norm` of `x` as `norm` describes it."""
    weight, bias = (
        None if node is None else prober.value(node, _SETTING) for node in (norm.weight, norm.bias)
    )
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, norm.eps)


def _replace(prober: Prober, norm: LayerNorm) -> None:
    sizes = [shape_of(norm.x)[-1]]
    args = (norm.x, sizes, norm.weight, norm.bias, norm.eps)
    node = insert(norm.out, torch.ops.aten.layer_norm.default, args, shape_of(norm.x))
    norm.out.replace_all_uses_with(node)
    prober.content.add(node)
