"""Emit `product`: a few rows times a weight, at the pace at which memory gives the weight.

A decode step multiplies as many rows as there are sequences by every weight of the model. Such a
product reads each weight once and computes little, so its time is that of reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvxform.codegen.triton.refusal import refuse
from kvxform.codegen.triton.registry import Emission, emits
from kvxform.codegen.triton.spec import KernelSpec

DTYPES = ("float16", "bfloat16")
MAX_ROWS = 16
# Output features of a program, channels of a warp at a time, warps, and stages of the pipeline. The
# first is within 2 % of the best that was found for any weight of an 8B model on an H100.
CONFIGS = ((16, 128, 4, 4), (16, 64, 4, 4), (16, 64, 2, 6))


@dataclass(frozen=True)
class ProductSpec(KernelSpec):
    """Spec of `product`: `x weight^T`, for up to `MAX_ROWS` rows x.

    Attributes:
        in_features: Channels of x, and columns of the weight.
        out_features: Rows of the weight.
        dtype: Dtype of x, the weight and the result, by torch name.
        has_bias: A bias is added.
    """

    kind: ClassVar[str] = "product"
    in_features: int
    out_features: int
    dtype: str
    has_bias: bool = False


@emits(ProductSpec)
def make_context(spec: ProductSpec, *, interpret: bool) -> Emission:
    """Return the template and its variables; the interpreter runs the same text.

    Raises:
        CodegenError: KVX401 for sizes that no tile divides, and for other than 16-bit dtypes.
    """
    if spec.dtype not in DTYPES:
        refuse(f"the dtype must be {' or '.join(DTYPES)}", spec.dtype, "product", "")
    configs = fitting(spec.in_features, spec.out_features)
    if not configs:
        got = f"{spec.out_features} x {spec.in_features}"
        refuse("channels must be whole runs of 128, features of 16", got, "product", "")
    return Emission("product.py.jinja", {"configs": configs})


def fitting(in_features: int, out_features: int) -> list[tuple[int, int, int, int]]:
    """Return the launch parameters whose tiles divide a weight."""
    return [
        (block, depth, warps, stages)
        for block, depth, warps, stages in CONFIGS
        if out_features % block == 0 and in_features % (depth * warps) == 0
    ]
