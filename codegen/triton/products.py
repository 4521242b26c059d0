"""Products with weights in a decode step: which of them `product` kernels do, and how.

The op `kvx_triton::product` stands for such a kernel in a graph: opaque to `torch.compile`, as the
cached ops are.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor, fx

from kvxform.codegen.triton.capability import is_interpreted
from kvxform.codegen.triton.emit import emit
from kvxform.codegen.triton.loading import load
from kvxform.codegen.triton.product import DTYPES, MAX_ROWS, ProductSpec, fitting

_LIBRARY = torch.library.Library("kvx_triton", "DEF")
_LIBRARY.define("product(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor")


def use_products(module: fx.GraphModule, num_rows: int) -> int:
    """Let kernels do the products of a graph with weights that fit them.

    Args:
        module: A graph of `aten.linear`; it is rewritten.
        num_rows: Rows that each product has: sequences of a decode step.

    Returns:
        How many products were taken over.
    """
    taken = 0
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        if num_rows <= MAX_ROWS and _fits(module, node):
            node.target = torch.ops.kvx_triton.product.default
            taken += 1
    module.recompile()
    return taken


def _fits(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the second argument of a `linear` is a weight that a kernel can read."""
    source = node.args[1]
    if not isinstance(source, fx.Node) or source.op != "get_attr":
        return False
    weight = getattr(module, str(source.target))
    is_16_bit = str(weight.dtype).removeprefix("torch.") in DTYPES
    is_plain = weight.dim() == 2 and weight.is_contiguous() and weight.data_ptr() % 16 == 0
    return is_16_bit and is_plain and bool(fitting(weight.shape[1], weight.shape[0]))


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `x weight^T + bias` for x `[..., K]` of few rows, by a kernel."""
    rows = x.reshape(-1, x.shape[-1])
    out = x.new_empty(rows.shape[0], weight.shape[0])
    options = {} if bias is None else {"bias": bias}
    dtype = str(weight.dtype).removeprefix("torch.")
    module = _module(ProductSpec(weight.shape[1], weight.shape[0], dtype, bias is not None))
    module.product(rows, weight, out, **options)
    return out.view(*x.shape[:-1], -1)


def _fake_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@functools.cache
def _module(spec: ProductSpec) -> ModuleType:
    return load(emit(spec, interpret=is_interpreted()))


_LIBRARY.impl("product", product, "CompositeExplicitAutograd")
torch.library.register_fake("kvx_triton::product", _fake_product, lib=_LIBRARY)
