"""What this lowering can express, as tables; a program outside of them is refused before work."""

from __future__ import annotations

from typing import NoReturn

from kvxform.codecs.base import dtype_name, layers_of, make_codec
from kvxform.codecs.packing import BITS
from kvxform.codegen.onnx import (
    aten_complex,
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
from kvxform.codegen.onnx.forms import Form, OnnxOptions, Provider, check_options, choose_form
from kvxform.codegen.onnx.levels import ALL_DTYPES
from kvxform.codegen.onnx.ports import has_tail
from kvxform.errors import CodegenError
from kvxform.ir.plan import CachePlan, SitePlan
from kvxform.ir.program import Program
from kvxform.ir.stream_plan import StreamPlan

EMITTER_MODULES = (
    aten_complex,
    aten_index,
    aten_math,
    aten_nn,
    aten_shape,
    attend,
    dialect,
    rotations,
)  # they fill EMITTERS
PAYLOADS = ("kv", "k", "latent")


def check_program(program: Program, options: OnnxOptions | None = None) -> tuple[Form, Fallback]:
    """Choose the form of a package and refuse what this lowering cannot express.

    Args:
        program: What is to be exported.
        options: What is asked of the package; the best that is legal on the CPU if None.

    Returns:
        The form, and translations of the operations that have no emitter, ready for the emission.

    Raises:
        CodegenError: KVX401 with the operation or the layer, and what is supported; KVX403 if the
            options are not legal for this program.
    """
    form = check_form(program, options or OnnxOptions())
    fallback = Fallback(form.opset)
    for node in program.graph.nodes:
        if node.op == "call_function" and find_emitter(node) is None:
            fallback.prepare(node)
    return form, fallback


def check_form(program: Program, options: OnnxOptions) -> Form:
    """Choose the form of a package; shapes are enough.

    Raises:
        CodegenError: KVX401 with the layer, and what is supported; KVX403 if the options are not
            legal for this program.
    """
    check_options(options)
    check_plan(program, options.provider)
    return choose_form(program, options)


def check_plan(program: Program, provider: Provider = "cpu") -> None:
    """Refuse a cache plan that no level can express.

    Raises:
        CodegenError: KVX401 with the layer, and what is supported.
    """
    if program.plan is None or not program.is_cached:
        _refuse("an ONNX package needs a program with a cache", "none", "", "add insert-cache")
    if program.dtype not in ALL_DTYPES[provider]:
        supported = " or ".join(dtype_name(dtype) for dtype in ALL_DTYPES[provider])
        _refuse(f"the compute dtype must be {supported}", program.info.dtype, "", "convert first")
    if program.plan.layout.kind == "checkpoint":
        rule = "a package keeps the K and V of all tokens in its inputs"
        _refuse(rule, str(program.plan.layout), "", "run it eagerly")
    for site in program.plan.sites:
        _check_site(site)


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
