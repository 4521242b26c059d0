"""What this lowering can express, as tables; a program outside of them is refused before work."""

from __future__ import annotations

from typing import NoReturn

import torch

from kvxform.codecs.base import layers_of, make_codec
from kvxform.codecs.packing import BITS
from kvxform.codegen.onnx import (
    aten_index,
    aten_math,
    aten_nn,
    aten_shape,
    attend,
    dialect,
    rotations,
)
from kvxform.codegen.onnx.codecs import CODEC_EMITTERS
from kvxform.codegen.onnx.emission import find_emitter
from kvxform.codegen.onnx.fallback import Fallback
from kvxform.codegen.onnx.ports import has_tail
from kvxform.errors import CodegenError
from kvxform.ir.plan import CachePlan, SitePlan
from kvxform.ir.program import Program
from kvxform.ir.stream_plan import StreamPlan

OPSET = 23  # the first with Attention, RMSNormalization and RotaryEmbedding
IR_VERSION = 11

EMITTER_MODULES = (
    aten_index,
    aten_math,
    aten_nn,
    aten_shape,
    attend,
    dialect,
    rotations,
)  # they fill EMITTERS
DTYPES = {torch.float32: "float32", torch.float16: "float16"}  # what Attention takes on CPU
PAYLOADS = ("kv", "k", "latent")


def check_program(program: Program) -> Fallback:
    """Refuse what this lowering cannot express.

    Returns:
        Translations of the operations that have no emitter, ready for the emission.

    Raises:
        CodegenError: KVX401 with the operation or the layer, and what is supported.
    """
    if program.plan is None or not program.is_cached:
        _refuse("an ONNX package needs a program with a cache", "none", "", "add insert-cache")
    if program.dtype not in DTYPES:
        supported = " or ".join(DTYPES.values())
        _refuse(f"the compute dtype must be {supported}", program.info.dtype, "", "convert first")
    if program.plan.layout.kind == "checkpoint":
        rule = "a package keeps the K and V of all tokens in its inputs"
        _refuse(rule, str(program.plan.layout), "", "run it eagerly")
    for site in program.plan.sites:
        _check_site(site)
    fallback = Fallback(OPSET)
    for node in program.graph.nodes:
        if node.op == "call_function" and find_emitter(node) is None:
            fallback.prepare(node)
    return fallback


def takes_padding(plan: CachePlan) -> bool:
    """Whether rows of a batch may have different lengths, padded on the left.

    Planes have one length for all rows, so sinks and groups of tokens would hold padding.
    """
    return all(_takes_padding(st) for site in plan.owners for st in site.streams.values())


def _takes_padding(stream: StreamPlan) -> bool:
    return stream.regions.sink == 0 and stream.keep_and_chunk[1] == 1


def _check_site(site: SitePlan) -> None:
    at = f"layer {site.layer}"
    if site.payload not in PAYLOADS:
        rule = f"payload must be {' or '.join(PAYLOADS)}"
        _refuse(rule, site.payload, at, "cache K and V")
    for stream in site.streams.values():
        _check_codec(stream, at)
        group, chunk = stream.tokens_per_group, stream.keep_and_chunk[1]
        if has_tail(stream) and chunk % group:
            rule = f"a block flush must be a multiple of the codec's group of {group} tokens"
            _refuse(rule, chunk, at, f"use recent: {-(-chunk // group) * group}")


def _check_codec(stream: StreamPlan, at: str) -> None:
    """Refuse a codec without an emitter, also where another codec wraps it."""
    codec = make_codec(stream.codec)
    for part in layers_of(codec):
        if type(part) not in CODEC_EMITTERS:
            known = ", ".join(sorted(c.name for c in CODEC_EMITTERS))
            bits = codec.bits_per_value(stream.head_dim)
            nearest = min(BITS, key=lambda n: abs(n - bits))
            rule = f"the codec must be one of {known}"
            _refuse(rule, part.name, at, f"use codec int with bits: {nearest}")


def _refuse(rule: str, got: object, at: str, hint: str) -> NoReturn:
    raise CodegenError("KVX401", rule, where="onnx", got=got, at=at, hint=hint)
