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

import re
from dataclasses import dataclass
from typing import Literal, NoReturn, get_args

from kvxform.codegen.onnx.levels import (
    INT4_RUNTIME,
    LAST_OPSET,
    LEVELS,
    PREFERENCE,
    reason_against,
    takes_buffers,
    version_of,
)
from kvxform.errors import CodegenError
from kvxform.ir.program import Program
from kvxform.onnx_options import Level as Level
from kvxform.onnx_options import LogitsKind as LogitsKind
from kvxform.onnx_options import OnnxOptions as OnnxOptions
from kvxform.onnx_options import Provider as Provider
from kvxform.onnx_options import WeightKind as WeightKind

CacheKind = Literal["grow", "buffer", "paged"]
MICROSOFT = "com.microsoft"
LEVEL_NAMES: tuple[Level, ...] = get_args(Level)
CHOICES = {
    "level": LEVEL_NAMES,
    "provider": get_args(Provider),
    "logits": get_args(LogitsKind),
    "weights": get_args(WeightKind),
}
CAPACITY = "max_sequence_length"
BLOCK_TOKENS = 256  # GenAI's default
FIRST_OPSET, COMPOSITE_OPSET, BUFFER_OPSET = 18, 23, 24
# Nodes have metadata from version 10 on, so older opsets come with that one.
IR_VERSIONS = {**dict.fromkeys(range(18, 23), 10), 23: 11, 24: 12, 25: 13}
SCATTER_RUNTIME = 1, 25  # the first that has TensorScatter
ALIGNED_RUNTIME = 1, 28  # before it, causal attention over buffers is wrong with several new tokens
FIXED_KINDS: dict[Level, CacheKind] = {"L0": "grow", "L3": "buffer", "L4": "paged", "L5": "grow"}


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
        block_size: Tokens a block of a `paged` cache; 0 for others.
    """

    level: Level
    opset: int
    provider: Provider
    runtime: str
    cache: CacheKind
    logits: LogitsKind
    weights: WeightKind
    block_size: int = 0

    @property
    def is_primitive(self) -> bool:
        """Whether norms, RoPE and attention must be taken apart into primitives."""
        return self.level == "L0" or self.opset < COMPOSITE_OPSET

    @property
    def capacity(self) -> str | None:
        """The symbol of the rows of planes that are written in place, or None."""
        return CAPACITY if self.cache == "buffer" else None

    @property
    def ends_itself(self) -> bool:
        """Whether causal attention over buffers needs no mask."""
        return self.capacity is not None and version_of(self.runtime) >= ALIGNED_RUNTIME

    @property
    def ir_version(self) -> int:
        """Version of the file format that belongs to the opset."""
        return IR_VERSIONS[self.opset]


def choose_form(program: Program, options: OnnxOptions) -> Form:
    """Return the form of a package of a checked program.

    Raises:
        CodegenError: KVX403 if what is asked for is not legal, with the reason.
    """
    check_options(options)
    level = options.level or _best_level(program, options)
    reason = reason_against(level, program, options)
    if reason is not None:
        _refuse_level(level, reason, program, options)
    rules = LEVELS[level]
    opset = options.opset or rules.opset[options.provider]
    kind = _cache_kind(level, opset, options, program)
    return Form(
        level,
        opset,
        options.provider,
        _least_runtime(level, kind, options),
        kind,
        options.logits,
        options.weights,
        block_size=_block_size(program) if kind == "paged" else 0,
    )


def legal_levels(
    program: Program, options: OnnxOptions | None = None
) -> tuple[tuple[Level, str | None], ...]:
    """Return every level, with the reason why it is not legal, or None if it is.

    Args:
        program: A checked program.
        options: What else is asked of the export; its `level` does not matter.
    """
    wanted = options or OnnxOptions()
    check_options(wanted)
    return tuple((level, reason_against(level, program, wanted)) for level in LEVEL_NAMES)


def check_options(options: OnnxOptions) -> None:
    """Refuse values that mean nothing.

    Raises:
        CodegenError: KVX403 with what is known.
    """
    for name, known in CHOICES.items():
        value = getattr(options, name)
        if value not in known and (name, value) != ("level", None):
            rule = f"{name} must be one of {', '.join(known)}"
            raise CodegenError("KVX403", rule, where="onnx", got=value)
    if options.opset is not None and not FIRST_OPSET <= options.opset <= LAST_OPSET:
        rule = f"opset must be {FIRST_OPSET} to {LAST_OPSET}"
        raise CodegenError("KVX403", rule, where="onnx", got=options.opset)
    if not re.fullmatch(r"[0-9]+\.[0-9]+", options.runtime):
        rule = "runtime must be a version such as 1.31"
        raise CodegenError("KVX403", rule, where="onnx", got=repr(options.runtime))


def _block_size(program: Program) -> int:
    """Return tokens a block of a paged cache: those of a page, if the plan has pages."""
    assert program.plan is not None, "checked"
    return program.plan.layout.page_size or BLOCK_TOKENS


def _best_level(program: Program, options: OnnxOptions) -> Level:
    legal = [n for n in PREFERENCE if reason_against(n, program, options) is None]
    if legal:
        return legal[0]
    reason = reason_against(PREFERENCE[-1], program, options)
    assert reason is not None, "no level is legal"
    return _refuse_level(PREFERENCE[-1], reason, program, options)


def _refuse_level(level: Level, reason: str, program: Program, options: OnnxOptions) -> NoReturn:
    legal = [name for name, against in legal_levels(program, options) if against is None]
    hint = f"legal with these options: {', '.join(legal)}" if legal else "ask for other options"
    raise CodegenError(
        "KVX403", f"level {level} is not legal here: {reason}", where="onnx", hint=hint
    )


def _cache_kind(level: Level, opset: int, options: OnnxOptions, program: Program) -> CacheKind:
    """Return how planes are kept; buffers need TensorScatter, and rows that never move."""
    if level in FIXED_KINDS:
        return FIXED_KINDS[level]
    has_scatter = opset >= BUFFER_OPSET and version_of(options.runtime) >= SCATTER_RUNTIME
    return "buffer" if has_scatter and takes_buffers(program) else "grow"


def _least_runtime(level: Level, kind: CacheKind, options: OnnxOptions) -> str:
    """Return the oldest version of ONNX Runtime that runs a package."""
    least = version_of(LEVELS[level].runtime[options.provider])
    if kind == "buffer" and level not in FIXED_KINDS:
        is_new = version_of(options.runtime) >= ALIGNED_RUNTIME
        least = max(least, ALIGNED_RUNTIME if is_new else SCATTER_RUNTIME)
    if options.weights == "int4":
        least = max(least, version_of(INT4_RUNTIME))
    return f"{least[0]}.{least[1]}"
