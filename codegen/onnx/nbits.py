"""Matrices of few bits: packed by ONNX Runtime's own quantiser, multiplied by `MatMulNBits`.

A matrix `[N, K]` is cut into blocks of 32 values along K, each with a scale and a zero point. Codes
are `[N, K/32, bytes of a block]`, so their rows are also rows of a table: an embedding that is
tied to the head is read by `GatherBlockQuantized` from the same constants. That table has 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from kvxform.codegen.onnx.builder import onnx_dtype
from kvxform.errors import KvxformError

BLOCK = 32
MATRIX_BITS, TABLE_BITS = 4, 8
SUFFIXES = {(4, False): ".int4", (8, False): ".int8", (4, True): ".int4t", (8, True): ".int8t"}
PARTS = ("codes", "scale", "zero")

Array = npt.NDArray[np.generic]


@dataclass(frozen=True)
class Packing:
    """How a matrix is packed.

    Attributes:
        bits: Of a code, 4 or 8.
        is_turned: Whether the weight is `[K, N]`, as GPT-2 has them, and not `[N, K]`.
    """

    bits: int
    is_turned: bool = False

    @property
    def suffix(self) -> str:
        """What is put to the name of a weight that is packed like this."""
        return SUFFIXES[self.bits, self.is_turned]

    def sizes(self, weight: Tensor) -> tuple[int, int]:
        """Return N and K of a weight."""
        n, k = weight.shape[::-1] if self.is_turned else weight.shape
        return int(n), int(k)

    def shape(self, part: str, weight: Tensor) -> list[int]:
        """Return the shape of a part of a packed weight."""
        n, k = self.sizes(weight)
        blocks = -(-k // BLOCK)
        if part == "codes":
            return [n, blocks, BLOCK * self.bits // 8]
        return [n, blocks if part == "scale" else -(-blocks * self.bits // 8)]

    def dtype(self, part: str, weight: Tensor) -> ir.DataType:
        """Return the dtype of a part of a packed weight."""
        return onnx_dtype(weight.dtype) if part == "scale" else ir.DataType.UINT8


def packing_from_name(stored: str) -> Packing | None:
    """Return the packing that the name of a stored weight says, or None if it is not packed."""
    for (bits, is_turned), suffix in SUFFIXES.items():
        if stored.endswith(suffix):
            return Packing(bits, is_turned)
    return None


class Packer:
    """Packs weights part by part, in memory never more than one packed weight."""

    def __init__(self) -> None:
        self._name, self._parts = "", (Tensor(), Tensor(), Tensor())

    def parts(self, name: str, weight: Tensor, packing: Packing) -> Sequence[ir.LazyTensor]:
        """Return the parts of a weight as tensors that are made when they are written."""
        return [self._lazy(name, weight, packing, part) for part in PARTS]

    def _lazy(self, name: str, weight: Tensor, packing: Packing, part: str) -> ir.LazyTensor:
        full = f"{name}{packing.suffix}.{part}"

        def make() -> ir.TensorProtocol:
            if self._name != name:
                self._name, self._parts = name, pack(weight, packing)
            found = self._parts[PARTS.index(part)]
            return ir.tensor_adapters.TorchTensor(found, name=full)

        shape = ir.Shape(packing.shape(part, weight))
        return ir.LazyTensor(make, packing.dtype(part, weight), shape, name=full)


def pack(weight: Tensor, packing: Packing) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scales and zero points of a matrix.

    Args:
        weight: `[N, K]`, or `[K, N]` if it is turned.
        packing: How it is packed.

    Raises:
        KvxformError: KVX704 if onnxruntime is not installed.
    """
    quantise = _quantisers()[packing.bits]
    n, k = packing.sizes(weight)
    columns = weight if packing.is_turned else weight.T
    source = np.zeros((-(-k // BLOCK) * BLOCK, n), np.float32)
    source[:k] = columns.float().numpy()
    arrays = [
        np.zeros(packing.shape(part, weight), np.float32 if part == "scale" else np.uint8)
        for part in PARTS
    ]
    codes, scale, zero = arrays
    quantise(codes, source, scale, zero, BLOCK, n, k, False)
    scales = torch.from_numpy(scale).to(weight.dtype)
    return torch.from_numpy(codes), scales, torch.from_numpy(zero)


def unpack(parts: Sequence[Tensor], packing: Packing, like: Tensor) -> Tensor:
    """Return the matrix that packed parts stand for, in the shape and dtype of `like`."""
    codes, scale, zero = parts
    n, k = packing.sizes(like)
    blocks = scale.shape[1]
    values = _nibbles(codes, packing.bits).reshape(n, blocks, BLOCK)
    zeros = _nibbles(zero, packing.bits)[:, :blocks, None]
    matrix = ((values - zeros) * scale.float()[..., None]).reshape(n, -1)[:, :k]
    return (matrix.T if packing.is_turned else matrix).to(like.dtype).contiguous()


def _nibbles(x: Tensor, bits: int) -> Tensor:
    """Return bytes as numbers of `bits` bits, the low ones first, float32."""
    if bits == 4:
        x = torch.stack([x & 15, x >> 4], -1).flatten(-2)
    return x.float()


def _quantisers() -> dict[int, Callable[..., None]]:
    try:
        from onnxruntime.capi import _pybind_state as state
    except ImportError as error:
        raise KvxformError(
            "KVX704",
            "weights of 4 bits are packed by the package onnxruntime",
            where="onnx",
            hint="pip install 'kvxform[cpu]'",
        ) from error
    return {4: state.quantize_matmul_4bits, 8: state.quantize_matmul_8bits}
