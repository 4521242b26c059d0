"""What may be asked of an export, and the form that a package gets.

| level | cache and attention |
| --- | --- |
| L0 | primitives of opset 18 |
| L1 | `Attention` over an unquantised cache; opset 24 adds buffers of a fixed length |
| L2 | a cache of bytes, decoded in the graph, then as L1 |
| L3 | `com.microsoft.GroupQueryAttention` over shared buffers, static scales |
| L4 | `com.microsoft.PagedAttention`, static scales |
| L5 | L0 or L2 wrapped into functions of the domain `kvx` |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvxform.codegen.onnx.builder import onnx_dtype
from kvxform.codegen.onnx.ports import is_plain
from kvxform.ir.program import Program

Level = Literal["L0", "L1", "L2", "L3", "L4", "L5"]
Provider = Literal["cpu", "cuda"]
CacheKind = Literal["grow", "buffer", "paged"]
LogitsKind = Literal["all", "last"]
WeightKind = Literal["source", "int4"]
MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class OnnxOptions:
    """What the user asks of an export; None means the best that is legal.

    Attributes:
        level: Emission level.
        opset: Version of the default domain: 18, or 23 and up.
        provider: The execution provider that the package is made for.
        runtime: Version of ONNX Runtime, `major.minor`.
        logits: Of all new tokens, or of the last one of each row.
        weights: As in the program, or `int4`: products by `MatMulNBits`.
    """

    level: Level | None = None
    opset: int | None = None
    provider: Provider = "cpu"
    runtime: str = "1.31"
    logits: LogitsKind = "all"
    weights: WeightKind = "source"


@dataclass(frozen=True)
class Form:
    """What a package is; written to `kvxform.json`, read by `OnnxSession`.

    Attributes:
        level: Emission level.
        opset: Version of the default domain.
        provider: The execution provider that it is made for.
        runtime: Least version of ONNX Runtime.
        cache: `grow`: planes grow by concatenation, rows padded on the left. `buffer`: planes
            `[B, Hk, capacity, width]` written in place, rows padded on the right. `paged`: blocks
            of tokens and a block table.
        logits: Of all new tokens `[B, S, vocab]`, or of the last one of each row `[B, 1, vocab]`.
        weights: How matrices are stored.
    """

    level: Level
    opset: int
    provider: Provider
    runtime: str
    cache: CacheKind
    logits: LogitsKind
    weights: WeightKind


def choose_form(program: Program, options: OnnxOptions) -> Form:
    """Return the best legal form of a checked program."""
    assert program.plan is not None, "checked"
    plain = all(
        is_plain(stream, onnx_dtype(program.dtype))
        for site in program.plan.owners
        for stream in site.streams.values()
    )
    level: Level = "L1" if plain else "L2"
    return Form(level, 23, options.provider, "1.30", "grow", options.logits, options.weights)
