"""The table of emission levels: what each one needs of a program and of what was asked.

Nothing here tries anything out. A rule is a clause and a test; the first rule that does not hold is
the reason why a level is not legal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvxform.codecs.base import dtype_name
from kvxform.codegen.onnx.block_formats import block_format
from kvxform.codegen.onnx.builder import onnx_dtype
from kvxform.codegen.onnx.center_rules import are_centers_free
from kvxform.codegen.onnx.ports import has_tail, is_plain
from kvxform.ir.plan import SitePlan
from kvxform.ir.program import Program
from kvxform.ir.stream_plan import StreamPlan

if TYPE_CHECKING:
    from kvxform.codegen.onnx.forms import Level, OnnxOptions

FLOATS = (torch.float32, torch.float16)
HALVES = (torch.float16, torch.bfloat16)
ALL_DTYPES = {"cpu": FLOATS, "cuda": (*FLOATS, torch.bfloat16)}
LAST_OPSET = 25
BFLOAT16_OPSET = 22  # the first whose Sin, Cos and Round take it
CUDA_RUNTIME = "1.31"  # older builds were not run on a GPU
STATIC = "static-int"  # the codec whose bytes the contrib operators keep


@dataclass(frozen=True)
class SiteRule:
    """What must hold for every layer.

    Attributes:
        says: The rule, as a clause.
        holds: The test, of a program and one of its sites.
    """

    says: str
    holds: Callable[[Program, SitePlan], bool]


@dataclass(frozen=True)
class LevelRules:
    """One row of the table.

    Attributes:
        about: What is emitted.
        opset: Version of the default domain unless another one is asked for, by provider.
        first_opset: The oldest version that has all operators.
        runtime: Least version of ONNX Runtime, by provider; those of the CPU are measured.
        dtypes: Compute dtypes by provider; a provider that is not named cannot run it.
        int4_weights: Whether `MatMulNBits` may be used.
        sites: What must hold for every layer.
    """

    about: str
    opset: dict[str, int]
    first_opset: int
    runtime: dict[str, str]
    dtypes: dict[str, tuple[torch.dtype, ...]]
    int4_weights: bool = True
    sites: tuple[SiteRule, ...] = ()


def _streams(test: Callable[[Program, StreamPlan], bool]) -> Callable[[Program, SitePlan], bool]:
    return lambda program, site: all(test(program, s) for s in site.streams.values())


def _lacks(name: str) -> Callable[[Program, SitePlan], bool]:
    """Return a test that attention has no such option."""
    return lambda program, site: _options(program, site).get(name) in (None, False)


def _options(program: Program, site: SitePlan) -> dict[str, Any]:
    return dict(program.attention_node(site.layer).kwargs)


def is_unquantised(program: Program, stream: StreamPlan) -> bool:
    """Whether a stream is stored in the dtype of the model, every token alike."""
    return is_plain(stream, onnx_dtype(program.dtype))


def has_regions(stream: StreamPlan) -> bool:
    """Whether some tokens are stored in another way than the rest."""
    return stream.regions.sink > 0 or has_tail(stream)


def fits_contrib(program: Program, stream: StreamPlan) -> bool:
    """Whether GroupQueryAttention and PagedAttention can keep a stream."""
    static = stream.codec["codec"] == STATIC and not has_regions(stream)
    return is_unquantised(program, stream) or static


def fits_blocks(program: Program, stream: StreamPlan) -> bool:
    """Whether PagedAttention can keep a stream; it has fp8 besides."""
    return block_format(stream, program.dtype) is not None


PLAIN = SiteRule("streams must be unquantised, without regions", _streams(is_unquantised))
CONTRIB = (
    SiteRule("K and V must be cached themselves", lambda _, site: site.payload == "kv"),
    SiteRule("each layer must have a cache of its own", lambda _, site: site.owner == site.layer),
    SiteRule("no tokens may be kept in regions", _streams(lambda _, s: not has_regions(s))),
    SiteRule(
        "keys must be cached after RoPE, in the basis of the queries",
        _streams(lambda _, stream: not stream.is_turned_at_read),
    ),
    SiteRule(
        "keys and values must be equally wide",
        lambda _, site: site.key.head_dim == site.value.head_dim,
    ),
    SiteRule(
        "keys and values must be stored in one dtype",
        lambda _, site: len({s.planes[0].dtype for s in site.streams.values()}) == 1,
    ),
    SiteRule(
        "attention must be causal",
        lambda program, site: bool(_options(program, site).get("causal", True)),
    ),
    SiteRule("attention in chunks has no attribute", _lacks("chunk")),
    SiteRule("ALiBi has no input", _lacks("alibi_slopes")),
    SiteRule("means may not be taken from keys under a softcap or beside a sink", are_centers_free),
)
INT4_RUNTIME = "1.25"  # measured; 1.24 has errors in products of 8 bits and float16
BUFFERED = (
    *CONTRIB,
    SiteRule(f"streams must be unquantised or {STATIC}", _streams(fits_contrib)),
)
PAGED = (
    *CONTRIB,
    SiteRule(
        f"streams must be unquantised, {STATIC}, or fp8 e4m3 without scales", _streams(fits_blocks)
    ),
    SiteRule("head_dim must be a multiple of 8", lambda _, site: site.key.head_dim % 8 == 0),
)

LEVELS: dict[str, LevelRules] = {
    "L0": LevelRules(
        "primitives",
        {"cpu": 18, "cuda": 18},
        18,
        {"cpu": "1.20", "cuda": CUDA_RUNTIME},
        ALL_DTYPES,
        int4_weights=False,
    ),
    "L1": LevelRules(
        "Attention over an unquantised cache",
        {"cpu": 23, "cuda": 24},
        23,
        {"cpu": "1.24", "cuda": CUDA_RUNTIME},
        ALL_DTYPES,
        sites=(PLAIN,),
    ),
    "L2": LevelRules(
        "a cache of bytes, decoded in the graph",
        {"cpu": 23, "cuda": 24},
        23,
        {"cpu": "1.24", "cuda": CUDA_RUNTIME},
        ALL_DTYPES,
    ),
    "L3": LevelRules(
        "GroupQueryAttention over shared buffers",
        {"cpu": 24, "cuda": 23},
        23,
        {"cpu": "1.27", "cuda": CUDA_RUNTIME},
        {"cpu": FLOATS, "cuda": HALVES},
        sites=BUFFERED,
    ),
    "L4": LevelRules(
        "PagedAttention over blocks",
        {"cuda": 23},
        23,
        {"cuda": CUDA_RUNTIME},
        {"cuda": HALVES},
        sites=PAGED,
    ),
    "L5": LevelRules(
        "append and attention as functions of the domain kvx",
        {"cpu": 23, "cuda": 23},
        18,
        {"cpu": "1.24", "cuda": CUDA_RUNTIME},
        ALL_DTYPES,
    ),
}
PREFERENCE: tuple[Level, ...] = ("L1", "L3", "L2", "L0")  # without a wish, the first legal one


def reason_against(level: str, program: Program, options: OnnxOptions) -> str | None:
    """Return why a level is not legal, in one line, or None if it is.

    Args:
        level: A key of `LEVELS`.
        program: After `insert-cache`; shapes are enough.
        options: What else is asked for.
    """
    rules = LEVELS[level]
    if options.provider not in rules.dtypes:
        return f"runs on {' or '.join(rules.dtypes)} alone"
    dtypes = rules.dtypes[options.provider]
    if program.dtype not in dtypes:
        names = " or ".join(dtype_name(dtype) for dtype in dtypes)
        return f"on {options.provider} the compute dtype must be {names}"
    if options.opset is not None and options.opset < rules.first_opset:
        return f"needs opset {rules.first_opset} or newer"
    opset = options.opset or rules.opset[options.provider]
    if program.dtype == torch.bfloat16 and opset < BFLOAT16_OPSET:
        return f"bfloat16 needs opset {BFLOAT16_OPSET} or newer"
    least = rules.runtime[options.provider]
    if version_of(options.runtime) < version_of(least):
        return f"needs ONNX Runtime {least} or newer"
    if options.weights == "int4" and not rules.int4_weights:
        return "int4 weights need an operator that is not a primitive"
    if options.weights == "int4" and version_of(options.runtime) < version_of(INT4_RUNTIME):
        return f"int4 weights need ONNX Runtime {INT4_RUNTIME} or newer"
    return _site_reason(rules, program)


def takes_buffers(program: Program) -> bool:
    """Whether every plane has one row for each token, which never moves.

    Streams with regions move tokens from one plane to another; groups of tokens share a row.
    """
    assert program.plan is not None, "checked"
    return all(
        not has_regions(stream) and stream.tokens_per_group == 1
        for site in program.plan.owners
        for stream in site.streams.values()
    )


def _site_reason(rules: LevelRules, program: Program) -> str | None:
    assert program.plan is not None, "checked"
    for rule in rules.sites:
        for site in program.plan.sites:
            if not rule.holds(program, site):
                return f"{rule.says} (layer {site.layer})"
    return None


def version_of(text: str) -> tuple[int, int]:
    """Return the numbers of a version `major.minor`."""
    major, minor = text.split(".")
    return int(major), int(minor)
