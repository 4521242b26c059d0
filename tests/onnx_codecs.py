"""Encode and decode of a codec in ONNX Runtime, on tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch
from onnx_tools import make_model, run_model
from torch import Tensor

from kvxform.codecs.base import Codec
from kvxform.codecs.klt import KltCodec
from kvxform.codecs.klt_trellis import TrellisKltCodec
from kvxform.codegen.onnx.builder import Builder, onnx_dtype
from kvxform.codegen.onnx.codec_base import emitter_of

# Without a CUDA kernel, or not for the types of codes.
FORBIDDEN = {"BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Mod"}


def plane_inputs(codec: Codec, head_dim: int) -> dict[str, ir.Value]:
    return {p.name: _input(p.name, p.torch_dtype, p.width) for p in codec.planes(head_dim)}


def encoder(codec: Codec, head_dim: int) -> ir.Model:
    b, x = Builder(), _input("x", torch.float32, head_dim)
    planes = emitter_of(codec, head_dim).encode(b, x)
    model = make_model(b, [x], [planes[p.name] for p in codec.planes(head_dim)])
    assert not FORBIDDEN & op_types(model)
    return model


def decoder(codec: Codec, head_dim: int) -> ir.Model:
    b, planes = Builder(), plane_inputs(codec, head_dim)
    values = emitter_of(codec, head_dim).decode(b, planes, ir.DataType.FLOAT)
    model = make_model(b, list(planes.values()), [b.op("Identity", values)])
    assert not FORBIDDEN & op_types(model)
    return model


def op_types(model: ir.Model) -> set[str]:
    return {node.op_type for node in model.graph}


def encoded(codec: Codec, x: Tensor) -> dict[str, Tensor]:
    """Return the planes of `x` `[B, Hk, T, D]`."""
    names = [p.name for p in codec.planes(x.shape[3])]
    return dict(zip(names, run_model(encoder(codec, x.shape[3]), [x.numpy()]), strict=True))


def decoded(codec: Codec, planes: Mapping[str, Tensor], head_dim: int) -> Tensor:
    arrays = [planes[p.name].numpy() for p in codec.planes(head_dim)]
    return run_model(decoder(codec, head_dim), arrays)[0]


def check_empty(codec: Codec, head_dim: int, num_heads: int = 2) -> None:
    """Assert that no tokens give no rows, in the shapes of the planes, and back."""
    planes = encoded(codec, torch.zeros(1, num_heads, 0, head_dim))
    for spec in codec.planes(head_dim):
        assert planes[spec.name].shape == (1, spec.heads(num_heads), 0, spec.width), spec.name
        assert planes[spec.name].dtype == spec.torch_dtype
    assert decoded(codec, planes, head_dim).shape == (1, num_heads, 0, head_dim)


def _input(name: str, dtype: torch.dtype, width: int) -> ir.Value:
    shape = ir.Shape(["b", f"heads_{name}", f"rows_{name}", width])
    return ir.Value(name=name, type=ir.TensorType(onnx_dtype(dtype)), shape=shape)


def check_codec(codec: Codec, x: Tensor, *, ties: float = 0.0) -> None:
    """Assert that ONNX decodes what torch encodes alike, and encodes alike but for ties.

    At a tie a value lies so near the border of two codes that another order of sums decides. So the
    planes of a token may differ if the token is decoded as well as by torch.

    Args:
        codec: The codec.
        x: Values `[B, Hk, T, D]`.
        ties: Largest share of tokens with other planes.
    """
    width, expected = x.shape[3], codec.encode(x)
    values = codec.decode(expected, torch.float32)
    scale = float(values.abs().max())
    torch.testing.assert_close(
        decoded(codec, expected, width), values, rtol=1e-5, atol=1e-6 * scale
    )
    found = encoded(codec, x)
    others = torch.zeros(x.shape[2], dtype=torch.bool)
    for spec in codec.planes(width):
        assert found[spec.name].dtype == spec.torch_dtype, spec.name
        assert found[spec.name].shape == expected[spec.name].shape, spec.name
        rows = (found[spec.name] != expected[spec.name]).any(-1).any(1).any(0)
        others |= rows.repeat_interleave(spec.tokens_per_row)
    assert others.float().mean() <= ties, f"{int(others.sum())} of {len(others)} tokens differ"
    have, want = (
        (codec.decode(planes, torch.float32) - x).pow(2).sum((0, 1, 3))
        for planes in (found, expected)
    )
    torch.testing.assert_close(have, want, rtol=1e-2, atol=1e-12 * scale**2)


def klt_codec(bits: tuple[tuple[int, ...], ...], memory: int = 0, **options: Any) -> KltCodec:
    """Return codec klt, or klt-trellis with a register, with random means."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(len(bits), len(bits[0]), generator=generator)
    constants = bits, tuple(map(tuple, mean.tolist()))
    if memory:
        return TrellisKltCodec(*constants, memory=memory, **options)
    return KltCodec(*constants, **options)
