"""Emission of `decode`: attention of one new query a sequence over what the pages hold."""

from __future__ import annotations

import math
from typing import Any

from kvxform.codegen.triton import decode_fragment, fragment
from kvxform.codegen.triton.describe import cache_tensors
from kvxform.codegen.triton.refusal import refuse
from kvxform.codegen.triton.registry import Emission, emits
from kvxform.codegen.triton.spec import DecodeSpec, SiteSpec
from kvxform.codegen.triton.streams import MIN_BLOCK, TileStream, tile_width

DTYPES = ("float16", "bfloat16", "float32")
MAX_HEAD_DIM = 256
MAX_GROUPS = 64  # query heads of a KV head
BLOCKS = (16, 32, 64, 128, 256)  # of Hadamard transforms
QUERY_LIMIT = 2.0**13  # power of two below the largest channel of a query in float16

# (block_n, ctas_per_sm, num_warps, num_stages), the best guess first
_CONFIGS = (
    (64, 3, 4, 3),
    (128, 2, 4, 2),
    (64, 4, 4, 2),
    (128, 2, 4, 3),
    (64, 4, 2, 3),
    (32, 4, 4, 3),
    (32, 4, 2, 3),
    (16, 4, 2, 3),
)
# Parts of 16 channels are too narrow for four warps.
_NARROW_CONFIGS = ((32, 4, 2, 3), (32, 6, 2, 2), (32, 4, 4, 3), (16, 6, 2, 3))
_WEIGHT_BITS = {8: 6, 4: 2, 3: 1, 2: 0}
# Heads of more than 128 channels need more registers than four warps have.
_WIDE_CONFIGS = ((64, 2, 8, 3), (64, 2, 8, 2), (64, 1, 8, 3), (32, 2, 4, 2), (16, 4, 4, 3))


@emits(DecodeSpec)
def make_context(spec: DecodeSpec, *, interpret: bool) -> Emission:
    """Return the template of `decode` and its variables.

    Raises:
        CodegenError: KVX401 for what no tile can express.
    """
    if spec.site.layout == "fragment":
        fast = decode_fragment.make_context(spec)
        return _make_twin(spec, fast) if interpret else fast
    _check(spec)
    return Emission("decode_rows.py.jinja", _variables(spec))


def _make_twin(spec: DecodeSpec, fast: Emission) -> Emission:
    """Return the plain Triton twin of a kernel over fragments; its host code is the same."""
    site, areas = spec.site, fragment.areas(spec.site)
    variables = {
        **fast.variables,
        "areas": areas,
        "starts": {"key": 0, "value": areas["key"].words(site.page_size)},
        "record_fields": fragment.record_fields(site),
        "key_stream": TileStream.of("key", site),
        "value_stream": TileStream.of("value", site),
        "num_rows": tile_width(site.groups),
    }
    return Emission("decode_fragment_twin.py.jinja", variables)


def _variables(spec: DecodeSpec) -> dict[str, Any]:
    site = spec.site
    key, value = TileStream.of("key", site), TileStream.of("value", site)
    streams = (key, value)
    has_groups = key.is_channel or value.is_channel
    is_gathered = not has_groups and site.page_size % 64 != 0
    is_normal = "float16" in (key.dtype, key.exact_dtype)
    return {
        "site": site,
        "key": key,
        "value": value,
        "groups": site.groups,
        "kv_heads": site.num_kv_heads,
        "num_rows": tile_width(site.groups),
        "page_size": site.page_size,
        "head_dim": key.spec.head_dim,
        "query_width": tile_width(key.spec.head_dim),
        "value_width": tile_width(value.spec.head_dim),
        "sink": key.spec.sink,
        "cache": cache_tensors(site),
        "configs": _configs(site, streams, is_gathered=is_gathered),
        "table_streams": [stream for stream in streams if stream.spec.table],
        "unpackers": {stream.unpacker: stream for stream in streams if stream.unpacker},
        "has_shared": any(stream.spec.token_norm == "site" for stream in streams),
        "is_gathered": is_gathered,
        "page_run": math.gcd(site.page_size, MIN_BLOCK),  # tokens that are surely neighbours
        "is_normal": is_normal,
        "q_limit": QUERY_LIMIT,
        "has_channel_keys": key.is_channel and not key.wide,
        "has_one_rule": (key.spec.keep, key.spec.chunk) == (value.spec.keep, value.spec.chunk),
        "has_buffers": site.has_exact,
        "key_buffers": key.spec.sink or key.spec.capacity,
        "has_tail": any(stream.spec.capacity for stream in streams),
        "tail_body_streams": [stream for stream in streams if "body" in stream.tail_sources],
        "tail_words": _tail_words(key, value),
        "offset_groups": list(value.groups) if value.is_token and value.offset else [],
        "weight_bits": _weight_bits(value),
        "is_local": spec.window is not None or spec.chunk is not None,
        "is_product": spec.softcap is None and not spec.has_alibi and not spec.has_slot_bias,
        "needs_tokens": spec.has_alibi or spec.has_slot_bias,
        "scale_column": "scale[:, None]" if is_normal else "scale",
        "extras": _extras(spec),
        "reduce_extras": [
            name
            for name, wanted in (("sink_logits", spec.has_sink_logits), ("lse", spec.has_lse))
            if wanted
        ],
    }


def _weight_bits(value: TileStream) -> int:
    """Return the power of two of weights: as large as weights times scales stay float16."""
    if value.dtype != "float16" or not value.spec.is_coded or value.spec.table:
        return 0
    return 8 if value.is_channel else _WEIGHT_BITS[value.spec.bits]


def _tail_words(key: TileStream, value: TileStream) -> str:
    names = {"key": key.spec.capacity, "value": value.spec.capacity}
    return " or ".join({"key": "K", "value": "V"}[name] for name, size in names.items() if size)


def _extras(spec: DecodeSpec) -> dict[str, str]:
    """Return what the docstring says of each optional tensor that this kernel takes, by name."""
    site, heads = spec.site, spec.site.num_q_heads
    meanings = {
        "rows": (site.has_exact, "Row of the buffers of each sequence, int32 `[B]`."),
        "signs": (spec.has_signs, f"Signs of channels, `[{site.key.head_dim}]`."),
        "sink_logits": (
            spec.has_sink_logits,
            f"A softmax column without a value, `[{heads}]`.",
        ),
        "alibi_slopes": (spec.has_alibi, f"Slopes of ALiBi, `[{heads}]`."),
        "slot_bias": (
            spec.has_slot_bias,
            f"Added to scores, float32 `[B, {site.num_kv_heads}, T]` by position.",
        ),
        "lse": (
            spec.has_lse,
            f"Log-sum-exp of scores{', sink logit included' if spec.has_sink_logits else ''},"
            f" natural logarithm, float32 `[B, {heads}]`, contiguous; -inf for no tokens.",
        ),
    }
    return {name: meaning for name, (wanted, meaning) in meanings.items() if wanted}


def _configs(
    site: SiteSpec, streams: tuple[TileStream, ...], *, is_gathered: bool
) -> tuple[tuple[int, ...], ...]:
    """Return the launch parameters whose tiles fit pages and groups."""
    tokens = [stream.tokens_per_group for stream in site.streams.values()]
    fits = math.gcd(*(size for size in tokens if size > 1), 0 if is_gathered else site.page_size)
    is_narrow = any(part.block == MIN_BLOCK for stream in streams for part in stream.parts)
    is_wide = max(stream.head_dim for stream in site.streams.values()) > 128
    wanted = _WIDE_CONFIGS if is_wide else _NARROW_CONFIGS if is_narrow else _CONFIGS
    return tuple(config for config in wanted if fits % config[0] == 0)


def _check(spec: DecodeSpec) -> None:
    site = spec.site
    rules: list[tuple[bool, str, object, str]] = [
        (
            site.dtype in DTYPES,
            f"the dtype must be one of {', '.join(DTYPES)}",
            site.dtype,
            "use float32",
        ),
        (
            site.groups <= MAX_GROUPS,
            f"at most {MAX_GROUPS} query heads may share a KV head",
            site.groups,
            "use the eager lowering",
        ),
        (
            site.key.sink == site.value.sink,
            "K and V must have the same number of sink tokens",
            f"{site.key.sink} and {site.value.sink}",
            "give both the same `sink`",
        ),
        (
            spec.query_block in (0, *BLOCKS) and site.key.head_dim % (spec.query_block or 1) == 0,
            f"a Hadamard block must be one of {BLOCKS} and divide head_dim",
            spec.query_block,
            "leave the rotation of queries in the graph",
        ),
    ]
    for stream in site.streams.values():
        tokens = stream.tokens_per_group
        rules += [
            (
                stream.head_dim <= MAX_HEAD_DIM,
                f"head_dim must be at most {MAX_HEAD_DIM}",
                stream.head_dim,
                "use the eager lowering",
            ),
            (
                tokens == 1 or tokens % MIN_BLOCK == 0,
                f"tokens that share a scale must be a multiple of {MIN_BLOCK}",
                tokens,
                "use group: 32",
            ),
            (
                site.page_size % tokens == 0,
                f"a page must hold whole groups of {tokens} tokens",
                site.page_size,
                f"use page_size: {-(-site.page_size // tokens) * tokens}",
            ),
        ]
    for fits, rule, got, hint in rules:
        if not fits:
            refuse(rule, got, "", hint)
