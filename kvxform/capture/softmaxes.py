"""Recognise softmaxes that are written by hand, by their values.

The weights that multiply the values are followed back to scores. Whatever lies between, if it gives
the softmax of random scores it is one: exponentials over their sum, a log-softmax, weights that are
masked and then normalised again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from kvxform.capture.emitting import insert
from kvxform.capture.orient import PRODUCTS
from kvxform.capture.probing import Prober, Setting, is_close
from kvxform.capture.scores import eval_size
from kvxform.capture.structure import Stop, chain_back, op_name, shape_of, tensor_type
from kvxform.ir.types import TensorType

aten = torch.ops.aten
_SETTING = Setting.first(5, batch=2)
_LONGEST = 16  # nodes of a softmax
_SQUARE = ("S", "S")


def raise_softmaxes(prober: Prober) -> int:
    """Replace softmaxes by hand between two products, in place; return how many."""
    for node in [n for n in prober.graph.nodes if n in prober.content]:
        _normalise_first(prober, node)
    prober.refresh()
    count = 0
    for node in [n for n in prober.graph.nodes if n in prober.content]:
        if op_name(node) in PRODUCTS and _is_square(node.args[0]):
            weights = node.args[0]
            assert isinstance(weights, fx.Node)
            count += _raise(prober, weights)
    prober.refresh()
    return count


def _is_square(node: object) -> bool:
    type_ = tensor_type(node) if isinstance(node, fx.Node) else None
    return type_ is not None and type_.shape[-2:] == _SQUARE


def _normalise_first(prober: Prober, node: fx.Node) -> None:
    """Replace `(e v) / sum(e)` by `(e / sum(e)) v`."""
    if op_name(node) != "div" or len(node.args) != 2:
        return
    product, total = node.args
    if not isinstance(product, fx.Node) or not isinstance(total, fx.Node):
        return
    weights = product.args[0] if op_name(product) in PRODUCTS else None
    if not isinstance(weights, fx.Node) or not _is_square(weights):
        return
    is_sum = op_name(total) == "sum" and total.args[0] is weights
    if not is_sum or shape_of(total) != (*shape_of(weights)[:-1], 1):
        return
    assert callable(product.target)
    normal = insert(node, aten.div.Tensor, (weights, total), shape_of(weights))
    args = (normal, product.args[1])
    node.replace_all_uses_with(insert(node, product.target, args, shape_of(product)))


def _raise(prober: Prober, weights: fx.Node) -> bool:
    """Replace `weights` by a softmax if they are one; return whether they were."""
    if op_name(weights) in ("softmax", "_softmax"):
        return False
    for stop in chain_back(weights, prober.content, lambda n: op_name(n) not in PRODUCTS):
        if len(stop.region) > _LONGEST:
            return False
        if not stop.region or shape_of(weights) != _shape(stop.node):
            continue
        for mask in _masks(prober, stop):
            if _is_softmax(prober, weights, stop, mask):
                _replace(prober, weights, stop, mask)
                return True
    return False


def _shape(node: fx.Node) -> tuple[int | str, ...]:
    type_ = tensor_type(node)
    return () if type_ is None or not type_.dtype.is_floating_point else type_.shape


def _masks(prober: Prober, stop: Stop) -> Iterator[fx.Node | None]:
    """Yield None, then the squares that may multiply the weights."""
    yield None
    for leaf in prober.leaves(stop.region):
        if _is_square(leaf):
            yield leaf


def _is_softmax(prober: Prober, weights: fx.Node, stop: Stop, mask: fx.Node | None) -> bool:
    """Compare on random scores, large ones among them."""
    sizes = {"B": _SETTING.batch, "S": _SETTING.length}
    shape = [eval_size(n, sizes) for n in shape_of(stop.node)]
    dtype = stop.node.meta["type"].dtype
    prober.remember(stop.region, _SETTING)
    for size in (1.0, 8.0):
        scores = prober.random(*shape, dtype=dtype) * size
        (got,) = prober.run([weights], _SETTING, {stop.node: scores})
        if not is_close(got, _softmax(prober, scores, mask)):
            return False
    return True


def _softmax(prober: Prober, scores: Tensor, mask: fx.Node | None) -> Tensor:
    if mask is not None:
        scores = scores + prober.value(mask, _SETTING).to(scores.dtype).log()
    return scores.softmax(-1)


def _replace(prober: Prober, weights: fx.Node, stop: Stop, mask: fx.Node | None) -> None:
    scores, shape = stop.node, shape_of(stop.node)
    wide = max((_dtype(n) for n in stop.region), key=lambda d: torch.finfo(d).bits)
    if mask is not None:
        real = insert(weights, aten.to.dtype, (mask, scores.meta["type"].dtype), shape_of(mask))
        real.meta["type"] = TensorType(scores.meta["type"].dtype, shape_of(mask))
        bias = insert(weights, aten.log.default, (real,), shape_of(mask))
        scores = insert(weights, aten.add.Tensor, (scores, bias), shape)
    node = insert(weights, aten.softmax.int, (scores, -1, wide), shape)
    node.meta["type"] = TensorType(wide, shape)
    if wide != _dtype(weights):
        node = insert(weights, aten.to.dtype, (node, _dtype(weights)), shape)
        node.meta["type"] = weights.meta["type"]
    weights.replace_all_uses_with(node)
    prober.refresh()


def _dtype(node: fx.Node) -> torch.dtype:
    type_ = tensor_type(node)
    if type_ is None or not type_.dtype.is_floating_point:
        return torch.float16  # the narrowest counts for nothing
    return type_.dtype
