"""Emit `append`: rotate new K, quantise, pack, and write K and V into pages, in one launch.

`append_parts` says how a tile of tokens is cut; here is what is refused, and the rest of the
variables of the templates.
"""

from __future__ import annotations

from kvxform.codegen.triton import fragment
from kvxform.codegen.triton.append_parts import StreamText, make_streams
from kvxform.codegen.triton.refusal import refuse
from kvxform.codegen.triton.registry import Emission, emits
from kvxform.codegen.triton.spec import AppendSpec, SiteSpec, StreamSpec

GROUP_TOKENS = (16, 32, 64, 128)  # groups of the channel axis that fit a tile
MAX_PARTS = 64  # statements of each kind; heads of odd sizes are cut finely
TABLE_BITS = 4  # a code is found by comparing with every bound between two entries
TILES = ((32, 4), (64, 4), (16, 2), (64, 8), (32, 2), (16, 4))  # tokens and warps, best guess first
# KV heads of a program that writes one token, tried with these. Decode steps take the first: two
# where values are encoded, so that threads have work, one where they are only copied.
HEADS = {"coded": (2, 4, 1, 2, 4, 1), "plain": (1, 2, 4, 1, 1, 1)}


@emits(AppendSpec)
def make_context(spec: AppendSpec, *, interpret: bool) -> Emission:
    """Return the template of the layout of `spec` and its variables.

    Raises:
        CodegenError: KVX401 for formats that no template holds.
    """
    for name, stream in spec.site.streams.items():
        _check_stream(name, stream, spec.site.page_size)
    sinks = spec.site.key.sink, spec.site.value.sink
    if sinks[0] != sinks[1]:
        refuse("K and V must have the same sink", sinks, "site", "give both the same `sink`")
    _check_rotation(spec)
    streams = make_streams(spec)
    for s in streams:
        if s.parts > MAX_PARTS:
            rule = f"a head must be at most {MAX_PARTS} runs of channels that share a scale"
            refuse(rule, s.parts, s.name, "use 8 bits, or larger groups")
    variables = {
        "site": spec.site,
        "streams": streams,
        "key": streams[0],
        "value": streams[1],
        "quantisers": {s.label: s for s in streams if s.spec.is_coded},
        "cache_fields": cache_fields(spec.site, streams),
        "tiles": TILES,
        "warps": {
            "one": num_warps([s.flush_tokens * s.spec.head_dim for s in streams]),
            "many": num_warps([(s.tile_tokens or 1) * s.spec.head_dim for s in streams]),
        },
    }
    if spec.site.layout == "fragment":
        variables |= fragment_variables(spec.site)
    return Emission(f"append_{spec.site.layout}.py.jinja", variables)


def fragment_variables(site: SiteSpec) -> dict[str, object]:
    """Return what the template needs to know of pages in fragment order."""
    reason = fragment.reason_against(site)
    if reason:
        refuse("pages must be able to be in fragment order", reason, "site", "use layout rows")
    fields = fragment.record_fields(site)
    areas = fragment.areas(site)
    least, most = fragment.block_tokens(site), site.page_size
    max_heads = 1 << (site.num_kv_heads - 1).bit_length()
    is_coded = any(stream.is_coded for stream in site.streams.values())
    return {
        "chunk_words": fragment.chunk_words(site),
        "record_start": fragment.record_start(site),
        "areas": areas,
        "area_starts": {"key": 0, "value": areas["key"].words(site.page_size)},
        "num_fields": len(fields),
        "fields": {
            stream: [(plane, i) for i, (name, plane) in enumerate(fields) if name == stream]
            for stream in areas
        },
        "cache_fields": {
            "pool": f"int32 `[num_pages, {site.num_kv_heads}, {fragment.chunk_words(site)}]`."
        },
        "tiles": [
            (*tile, min(heads, max_heads))
            for tile, heads in zip(TILES, HEADS["coded" if is_coded else "plain"], strict=True)
            if least <= tile[0] <= most
        ],
    }


def cache_fields(site: SiteSpec, streams: tuple[StreamText, StreamText]) -> dict[str, str]:
    """Return the tensors of the cache by name, each with its dtype and shape in words."""
    heads, fields = site.num_kv_heads, {}
    for s in streams:
        for name, plane in zip(s.planes, s.spec.planes, strict=True):
            rows = site.page_size // plane.tokens_per_row
            shape = f"[num_pages, {plane.heads(heads)}, {rows}, {plane.width}]"
            fields[name] = f"{plane.dtype} `{shape}`."
        for name in s.exact:
            tokens = s.spec.sink if name.endswith("_sink") else s.spec.capacity
            shape = f"[num_rows, {heads}, {tokens}, {s.spec.head_dim}]"
            fields[name] = f"{s.spec.exact_dtype} `{shape}`."
    return fields


def num_warps(elements: list[int]) -> int:
    """Return warps for tiles of so many elements: up to 32 elements a thread, at most 8 warps."""
    needed = max(1, max(elements) // 1024)
    return min(8, 1 << (needed - 1).bit_length())


def _check_stream(name: str, stream: StreamSpec, page_size: int) -> None:
    if stream.block == 1 and stream.table and stream.bits > TABLE_BITS:
        refuse("tables must have at most 16 entries", len(stream.table), name, "use bits: 4")
    if stream.axis == "channel" and stream.is_coded:
        if stream.group not in GROUP_TOKENS:
            rule = f"groups of the channel axis must have {GROUP_TOKENS} tokens"
            refuse(rule, stream.group, name, "use group: 32")
        if stream.chunk % stream.group:
            rule = f"whole groups of {stream.group} tokens must become codes at a time"
            refuse(rule, stream.chunk, name, f"use recent: {stream.group}")
        if page_size % stream.group:
            rule = f"a page must hold whole groups of {stream.group} tokens"
            refuse(rule, page_size, name, f"use page_size: {stream.group}")


def _check_rotation(spec: AppendSpec) -> None:
    dim, block, rope = spec.site.key.head_dim, spec.key_block, spec.rope
    if block & (block - 1) or (block and dim % block):
        refuse(f"a Hadamard block must be a power of two that divides {dim}", block, "key", "")
    if rope is not None and spec.site.key.token_norm == "site":
        refuse("norms over all KV heads are taken before RoPE", "rope", "key", "apply RoPE before")
    if rope is not None and (rope.rotary_dim % 2 or not 0 < rope.rotary_dim <= dim):
        rule = f"rotary_dim must be even and at most head_dim {dim}"
        refuse(rule, rope.rotary_dim, "key", "apply RoPE before")
