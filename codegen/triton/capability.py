"""What this lowering can run; everything else is refused in one line, before any work.

`check_plan` needs the plan alone, `check_program` shapes and dtypes too, `check_device` the
machine.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from kvxform.codecs.base import CODECS, make_codec
from kvxform.codecs.exact import ExactCodec
from kvxform.codecs.fib_vq import FibVqCodec
from kvxform.codecs.integer import IntCodec
from kvxform.codecs.lloyd_max import LloydMaxCodec
from kvxform.codecs.token_norm import TokenNormCodec
from kvxform.codegen.eager.cache import check_plan as check_common
from kvxform.codegen.triton.emit import emit
from kvxform.codegen.triton.formats import reason_against
from kvxform.codegen.triton.refusal import refuse
from kvxform.codegen.triton.sites import kernel_specs, page_tokens
from kvxform.errors import CodegenError
from kvxform.ir.plan import CachePlan, SitePlan
from kvxform.ir.program import Program

DTYPES = ("float32", "float16", "bfloat16")
PAYLOADS = ("kv", "latent")
CODEC_CLASSES = (ExactCodec, IntCodec, TokenNormCodec, LloydMaxCodec, FibVqCodec)
EAGER = "or use target eager"


def check_plan(plan: CachePlan) -> None:
    """Refuse plans that no kernel can be made for.

    Raises:
        CodegenError: KVX401 with the layer and the nearest plan that is supported.
    """
    if plan.layout.kind == "checkpoint":
        rule = "kernels need the K and V of all tokens in memory"
        refuse(rule, str(plan.layout), "", f"leave out cache-residual, {EAGER}")
    for site in plan.sites:
        _check_site(site)
    check_common(plan, page_tokens(plan))


def check_program(program: Program) -> None:
    """Refuse programs that this lowering cannot run; works on weights without values.

    Raises:
        CodegenError: KVX401 with what is supported.
    """
    if program.plan is None or not program.is_cached:
        refuse("target triton needs a program with a cache", "none", "", "add insert-cache")
    if program.info.dtype not in DTYPES:
        rule = f"the compute dtype must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}"
        refuse(rule, program.info.dtype, "", f"convert the model first, {EAGER}")
    check_plan(program.plan)
    for layer, site in kernel_specs(program).items():
        for spec in site.by_kind.values():
            try:
                emit(spec, interpret=is_interpreted())
            except CodegenError as error:
                at = error.at or f"layer {layer}"
                raise CodegenError(
                    error.code, error.rule, where="triton", got=error.got, at=at, hint=error.hint
                ) from error


def check_device(device: torch.device) -> None:
    """Refuse a machine that cannot run kernels.

    Raises:
        CodegenError: KVX401 with what is missing.
    """
    if importlib.util.find_spec("triton") is None:
        refuse("target triton needs the package triton", "none", "", "pip install triton")
    if device.type == "cuda":
        if is_interpreted():
            hint = "unset TRITON_INTERPRET, or device='cpu'"
            refuse("Triton's interpreter runs on a CPU", "cuda", "", hint)
    elif not is_interpreted():
        hint = "device='cuda', or target eager"
        refuse("target triton needs a CUDA device", device.type, "", hint)


def check_interpreter(program: Program) -> None:
    """Refuse what Triton's interpreter would compute wrongly.

    Raises:
        CodegenError: KVX401 for bfloat16, whose products are wrong in Triton 3.6.
    """
    if is_interpreted() and program.info.dtype == "bfloat16":
        rule = "Triton's interpreter computes in float32 or float16"
        refuse(rule, "bfloat16", "", "unset TRITON_INTERPRET, or convert the model")


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: `TRITON_INTERPRET=1` was set at the start."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def default_device() -> torch.device | None:
    """Return where a model goes unless the caller says: CUDA if there is one, else no change."""
    has_cuda = torch.cuda.is_available() and not is_interpreted()
    return torch.device("cuda") if has_cuda else None


def _check_site(site: SitePlan) -> None:
    at = f"layer {site.layer}"
    if site.payload not in PAYLOADS:
        rule = f"payload must be {' or '.join(PAYLOADS)}"
        refuse(rule, site.payload, at, EAGER.removeprefix("or "))
    if site.payload == "latent" and site.key.recent_capacity:
        rule = "a latent must be encoded token by token, at once"
        hint = "use codes of the token axis and recent: 0, " + EAGER
        refuse(rule, f"the last {site.key.recent_capacity} tokens exact", at, hint)
    if site.key.rope == "pre":
        refuse("keys must be cached after RoPE", "pre", at, "leave out cache-prerope, " + EAGER)
    if any(stream.basis.inverse for stream in site.streams.values()):
        rule = "bases must be undone by queries or weights, not when the cache is read"
        refuse(rule, "a basis of several heads", at, EAGER.removeprefix("or "))
    sinks = {name: stream.regions.sink for name, stream in site.streams.items()}
    if len(set(sinks.values())) > 1:
        rule = "K and V must have the same number of sink tokens"
        got = " and ".join(str(n) for n in sinks.values())
        refuse(rule, got, at, f"use sink: {max(sinks.values())} for both")
    for stream in site.streams.values():
        codec = str(stream.codec["codec"])
        if CODECS.get(codec) not in CODEC_CLASSES:
            known = " or ".join(c.name for c in CODEC_CLASSES)
            refuse(f"the codec must be {known}", codec, at, f"use codec int, {EAGER}")
        unfit = reason_against(make_codec(stream.codec), stream.head_dim)
        if unfit:
            refuse(f"codec {codec}: {unfit.rule}", unfit.got, at, f"{unfit.hint}, {EAGER}")
