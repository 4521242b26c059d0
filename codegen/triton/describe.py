"""Say in words what a kernel was generated from: the first lines of every emitted file."""

from __future__ import annotations

import textwrap

from kvxform.codecs.base import dtype_from_name
from kvxform.codegen.triton.product import ProductSpec
from kvxform.codegen.triton.spec import (
    AppendSpec,
    ColumnScoresSpec,
    DecodeSpec,
    GatherSpec,
    KernelSpec,
    PrefillSpec,
    SiteSpec,
    StreamSpec,
)

WIDTH = 96
TITLES = {
    "append": "Write new K and V into the cache",
    "decode": "Attention of one new query a sequence over the cache",
    "gather": "Copy the cache to dense K and V",
    "prefill": "Causal attention of many new queries over dense K and V",
    "column_scores": "Attention that each cached token got, summed over queries",
    "product": "A few rows times a weight",
}


def title(spec: KernelSpec) -> str:
    """Return what the kernel does, without a full stop."""
    return TITLES.get(spec.kind, spec.kind)


def plan_lines(spec: KernelSpec) -> list[str]:
    """Return what the text of the kernel depends on; long entries are broken and indented."""
    site = getattr(spec, "site", None)
    lines = _site_lines(site) if isinstance(site, SiteSpec) else _dense_lines(spec)
    return [
        textwrap.fill(line, WIDTH, subsequent_indent="  ") for line in lines + _option_lines(spec)
    ]


def bytes_per_token(spec: KernelSpec) -> float:
    """Return the cache bytes of one token, all heads: what a kernel must read or write of it."""
    if isinstance(spec, AppendSpec | DecodeSpec | GatherSpec):
        return spec.site.bytes_per_token
    if isinstance(spec, ProductSpec):
        return 0.0
    if isinstance(spec, PrefillSpec):
        width = spec.key_dim + spec.value_dim
    else:
        assert isinstance(spec, ColumnScoresSpec), "all other kinds are above"
        width = spec.head_dim
    return spec.num_kv_heads * width * dtype_from_name(spec.dtype).itemsize


def cache_tensors(site: SiteSpec) -> dict[str, str]:
    """Return what docstrings say of each tensor of a cache in layout rows, by name."""
    heads, tensors = site.num_kv_heads, {}
    for name, stream in site.streams.items():
        for plane in stream.planes:
            rows = site.page_size // plane.tokens_per_row
            shape = f"[num_pages, {plane.heads(heads)}, {rows}, {plane.width}]"
            tensors[f"{name}_{plane.name}"] = f"Pages, {plane.dtype} `{shape}`."
        for buffer, length in (("sink", stream.sink), ("recent", stream.capacity)):
            if length:
                shape = f"[num_rows, {heads}, {length}, {stream.head_dim}]"
                tensors[f"{name}_{buffer}"] = f"Exact tokens, {stream.exact_dtype} `{shape}`."
    return tensors


def _site_lines(site: SiteSpec) -> list[str]:
    return [
        f"{site.num_q_heads} query heads, {site.num_kv_heads} KV heads, {site.dtype}",
        f"pages of {site.page_size} tokens, layout {site.layout}",
        f"K: {_stream_words(site.key, site.num_kv_heads)}",
        f"V: {_stream_words(site.value, site.num_kv_heads)}",
    ]


def _stream_words(stream: StreamSpec, num_kv_heads: int) -> str:
    words = [f"head_dim {stream.head_dim}"]
    if stream.is_coded:
        words += _code_words(stream)
        bits = stream.bytes_per_token(num_kv_heads) * 8 / (num_kv_heads * stream.head_dim)
        words.append(f"{bits:g} bits a value")
    else:
        words.append(stream.dtype)
    if stream.sink:
        words.append(f"first {stream.sink} tokens exact")
    if stream.capacity:
        least = f"{stream.keep} to " if stream.keep < stream.capacity else ""
        words.append(f"newest {least}{stream.capacity} tokens exact")
    return ", ".join(words)


def _code_words(stream: StreamSpec) -> list[str]:
    per = "tokens" if stream.axis == "channel" else "channels"
    many = f" for {stream.block} channels" if stream.block > 1 else ""
    if stream.gain:
        return [f"codes of {stream.bits} bits{many}, one norm ({stream.gain}) a token and head"]
    words = [f"int{stream.bits}, one scale for {stream.group} {per}"]
    words.append(f"zero point as {stream.zero}" if stream.has_zero else "no zero point")
    words += [f"a norm for each token of a {stream.token_norm}"] if stream.token_norm else []
    return words + ([f"table of {len(stream.table)} values"] if stream.table else [])


def _dense_lines(spec: KernelSpec) -> list[str]:
    if isinstance(spec, ProductSpec):
        size = f"weight of {spec.out_features} x {spec.in_features}, {spec.dtype}"
        return [size + (", with a bias" if spec.has_bias else "")]
    if not isinstance(spec, PrefillSpec | ColumnScoresSpec):
        return []
    lines = [f"{spec.num_q_heads} query heads, {spec.num_kv_heads} KV heads, {spec.dtype}"]
    if isinstance(spec, PrefillSpec):
        lines.append(f"head_dim {spec.key_dim} of K, {spec.value_dim} of V")
        for name, sink, keep, chunk in (
            ("K", spec.key_sink, spec.key_keep, spec.key_chunk),
            ("V", spec.value_sink, spec.value_keep, spec.value_chunk),
        ):
            if (sink, keep, chunk) != (0, 0, 1):
                lines.append(f"{name}: {sink} tokens of sink, {keep} kept exact, chunks of {chunk}")
    else:
        lines.append(f"head_dim {spec.head_dim}")
    return lines


def _option_lines(spec: KernelSpec) -> list[str]:
    """Return a line for each option that is not at its default."""
    data = spec.to_json()
    words = {
        "key_block": "new keys: Hadamard of blocks of {} channels",
        "for_hopper": "for Hopper (compute capability 9)",
        "query_block": "queries: Hadamard of blocks of {} channels",
        "has_signs": "random signs before the Hadamard",
        "window": "sliding window of {} tokens",
        "chunk": "chunks of {} tokens see only themselves",
        "softcap": "scores capped at {}",
        "has_sink_logits": "sink logits",
        "has_alibi": "ALiBi",
        "has_slot_bias": "a bias for each cached token",
        "has_lse": "log-sum-exp is written",
    }
    lines = [text.format(data[name]) for name, text in words.items() if data.get(name)]
    if data.get("rope"):
        lines.append(f"new keys: RoPE of {data['rope']['rotary_dim']} channels")
    return lines
