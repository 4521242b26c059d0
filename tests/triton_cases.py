"""Caches as Triton kernels see them, made by the codecs, and attention over them in float64.

A case is made from plain K and V: `live_copy` says what a query reads of them at some length, and
`store` lays the same tokens out as pages, sinks and rings. Everything that no kernel may read or
trust is poisoned: NaN in floats, random bytes in codes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvxform.codecs.base import Codec, dtype_from_name
from kvxform.codecs.fib_vq import FibVqCodec
from kvxform.codecs.integer import IntCodec
from kvxform.codecs.lloyd_max import LloydMaxCodec
from kvxform.codecs.packing import pack, unpack
from kvxform.codecs.token_norm import TokenNormCodec
from kvxform.codegen.triton.formats import codec_fields
from kvxform.codegen.triton.spec import SiteSpec, StreamSpec

INT_FIELDS = ("bits", "axis", "group", "symmetric", "zero", "clip", "include_zero")


class Stored(NamedTuple):
    """The same K and V as pages and buffers, at given lengths.

    Attributes:
        tensors: What the fields of `Cache` are called, and the tensor of each.
        block_table: int32 `[B, max_pages]`; 0 where a sequence has no page.
        rows: int32 `[B]`, row of the buffers of each sequence.
        lengths: int32 `[B]`, cached tokens.
    """

    tensors: dict[str, Tensor]
    block_table: Tensor
    rows: Tensor
    lengths: Tensor

    def cache(self, module: ModuleType) -> Any:
        """Return the `Cache` of an emitted module."""
        return module.Cache(**{name: self.tensors[name] for name in module.Cache._fields})

    def to(self, device: str) -> Stored:
        """Return the same on another device."""
        tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return Stored(
            tensors, self.block_table.to(device), self.rows.to(device), self.lengths.to(device)
        )


def int_stream(head_dim: int = 64, bits: int = 4, **fields: Any) -> StreamSpec:
    """Return a stream of codes; the group is all channels, or 32 tokens with axis `channel`."""
    whole = 32 if fields.get("axis") == "channel" else head_dim
    fields.setdefault("group", whole)
    if fields.get("axis") == "channel":
        fields.setdefault("chunk", fields["group"])
    if fields.get("sink") or fields.get("keep") or fields.get("chunk", 1) > 1:
        fields.setdefault("exact_dtype", "float16")
    return StreamSpec(head_dim, bits, **fields)


def codec_stream(head_dim: int, codec: Codec, **fields: Any) -> StreamSpec:
    """Return a stream of a codec."""
    found = {**codec_fields(codec, head_dim), **fields}
    if found.get("axis") == "channel":
        found.setdefault("chunk", found["group"])
    if found.get("sink") or found.get("keep") or found.get("chunk", 1) > 1:
        found.setdefault("exact_dtype", "float16")
    return StreamSpec(head_dim, **found)


def plain_stream(head_dim: int = 64, dtype: str = "float16", **fields: Any) -> StreamSpec:
    """Return a stream of plain values."""
    bits = dtype_from_name(dtype).itemsize * 8
    if fields.get("sink") or fields.get("keep") or fields.get("chunk", 1) > 1:
        fields.setdefault("exact_dtype", dtype)
    return StreamSpec(head_dim, bits, dtype=dtype, group=head_dim, **fields)


def make_site(
    key: StreamSpec,
    value: StreamSpec | None = None,
    *,
    heads: tuple[int, int] = (4, 2),
    page_size: int = 32,
    layout: str = "rows",
    dtype: str = "float16",
) -> SiteSpec:
    """Return a site; V is stored as K unless given."""
    return SiteSpec(*heads, key, value or key, page_size, layout, dtype)  # type: ignore[arg-type]


def random_kv(
    site: SiteSpec, batch_size: int, num_tokens: int, *, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return K and V `[B, Hk, T, D]` of the site's dtype, with channels of unequal size."""
    generator = torch.Generator().manual_seed(seed)

    def draw(head_dim: int) -> Tensor:
        shape = (batch_size, site.num_kv_heads, num_tokens, head_dim)
        size = 0.5 + torch.rand(head_dim, generator=generator)
        x = torch.randn(shape, generator=generator) * size
        x = x + 0.5 * torch.randn(head_dim, generator=generator)
        return x.to(dtype_from_name(site.dtype))

    return draw(site.key.head_dim), draw(site.value.head_dim)


def random_q(site: SiteSpec, *shape: int, seed: int = 1) -> Tensor:
    """Return q `[*shape, D]` of the site's dtype."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(*shape, site.key.head_dim, generator=generator)
    return q.to(dtype_from_name(site.dtype))


def body_tokens(stream: StreamSpec, length: int) -> int:
    """Return how many tokens after the sink are codes at a cached length."""
    return max(0, (length - stream.sink - stream.keep) // stream.chunk * stream.chunk)


def encode(stream: StreamSpec, x: Tensor) -> dict[str, Tensor]:
    """Return the planes of `x` `[..., T, D]`."""
    if not stream.is_coded:
        return {"value": x.to(dtype_from_name(stream.dtype))}
    if not stream.table or stream.gain:
        return codec_of(stream).encode(x)
    if not stream.token_norm:
        return _encode_table(stream, x.float())
    norm = x.float().norm(dim=-1, keepdim=True).clamp_min(2.0**-14)
    return {**_encode_table(stream, x.float() / norm), "norm": norm.half()}


def decode(stream: StreamSpec, planes: Mapping[str, Tensor]) -> Tensor:
    """Return the float64 values `[..., T, D]` of planes."""
    if not stream.is_coded:
        return planes["value"].double()
    if stream.table and not stream.gain:
        table = torch.tensor(stream.table, dtype=torch.float64)
        values = table[unpack(planes["codes"], stream.bits).int()]
        values = values * _spread(stream, planes["scale"].double())
        return values * planes["norm"].double() if stream.token_norm else values
    return codec_of(stream).decode(planes, torch.float64)


def codec_of(stream: StreamSpec) -> Codec:
    """Return the codec that the codes of a stream are made by."""
    if stream.block > 1:
        words = len(stream.table) // stream.block
        return FibVqCodec(words, stream.block, gain=stream.gain)
    if stream.gain:
        return LloydMaxCodec(len(stream.table), gain=stream.gain)
    codec = IntCodec(**{name: getattr(stream, name) for name in INT_FIELDS})
    return TokenNormCodec(codec, stream.token_norm) if stream.token_norm else codec


def _encode_table(stream: StreamSpec, x: Tensor) -> dict[str, Tensor]:
    """Scale groups so that their largest value is the largest of the table; take the nearest."""
    table = torch.tensor(stream.table)
    axis = -1 if stream.axis == "token" else -2
    groups = x.unflatten(axis, (-1, stream.group))
    scale = (groups.abs().amax(axis) / table.abs().max()).clamp_min(2.0**-14).half()
    values = x / _spread(stream, scale.float())
    codes = (values[..., None] - table).abs().argmin(-1)
    return {"codes": pack(codes.to(torch.uint8), stream.bits), "scale": scale}


def _spread(stream: StreamSpec, scale: Tensor) -> Tensor:
    return scale.repeat_interleave(stream.group, -1 if stream.axis == "token" else -2)


def arrive(stream: StreamSpec, x: Tensor) -> Tensor:
    """Return tokens as they enter the cache: rounded, if some of them stay exact for a while."""
    return x.to(dtype_from_name(stream.exact_dtype)) if stream.capacity else x


def live_copy(stream: StreamSpec, x: Tensor, length: int) -> Tensor:
    """Return what a query reads at a cached length, float64 `[..., length, D]`.

    Args:
        stream: How the stream is stored.
        x: Tokens before they were cached, `[..., T, D]`.
        length: Cached tokens, the query's own included.
    """
    x = arrive(stream, x[..., :length, :])
    end = min(length, stream.sink) if stream.sink else 0
    body = stream.sink + body_tokens(stream, length)
    parts = []
    if end:
        parts.append(x[..., :end, :].to(dtype_from_name(stream.exact_dtype)).double())
    if body > stream.sink:
        parts.append(decode(stream, encode(stream, x[..., stream.sink : body, :])))
    if length > body:
        parts.append(x[..., body:, :].double())
    return torch.cat(parts, -2) if parts else x.double()


def store(
    site: SiteSpec,
    keys: Tensor,
    values: Tensor,
    lengths: Sequence[int],
    *,
    seed: int = 2,
    spare_pages: int = 2,
) -> Stored:
    """Lay out row b's first `lengths[b]` tokens; pages lie in random order.

    Args:
        site: How K and V are stored.
        keys: Tokens before they were cached, `[B, Hk, T, D]`; likewise `values`.
        lengths: Cached tokens of each row.
        seed: Seed of the order of pages and of garbage.
        spare_pages: Pages that belong to nobody.
    """
    generator = torch.Generator().manual_seed(seed)
    streams, data = site.streams, {"key": keys, "value": values}
    bodies = [max(body_tokens(st, n) for st in streams.values()) for n in lengths]
    counts = [-(-body // site.page_size) for body in bodies]
    num_pages = 1 + sum(counts) + spare_pages
    order = 1 + torch.randperm(num_pages - 1, generator=generator)
    block_table = torch.zeros(len(lengths), max([1, *counts]), dtype=torch.int32)
    rows = torch.randperm(len(lengths) + 1, generator=generator)[: len(lengths)].int()
    first = 0
    for b, count in enumerate(counts):
        block_table[b, :count] = order[first : first + count].int()
        first += count
    tensors: dict[str, Tensor] = {}
    for name, stream in streams.items():
        pools = _garbage_pools(site, stream, num_pages, generator)
        exact = _garbage_buffers(site, stream, len(lengths) + 1)
        for b, length in enumerate(lengths):
            _store_row(site, stream, data[name][b], length, block_table[b], pools)
            _store_exact(stream, data[name][b], length, int(rows[b]), exact)
        tensors |= {f"{name}_{plane}": pool for plane, pool in pools.items()}
        tensors |= {f"{name}_{part}": buffer for part, buffer in exact.items()}
    if site.layout == "fragment":
        tensors = _as_fragments(site, tensors)
    lengths_now = torch.tensor(lengths, dtype=torch.int32)
    return Stored(tensors, block_table, rows, lengths_now)


def _garbage_pools(
    site: SiteSpec, stream: StreamSpec, num_pages: int, generator: torch.Generator
) -> dict[str, Tensor]:
    pools = {}
    for plane in stream.planes:
        rows = site.page_size // plane.tokens_per_row
        shape = (num_pages, plane.heads(site.num_kv_heads), rows, plane.width)
        if plane.dtype == "uint8":
            pool = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        else:
            pool = torch.full(shape, math.nan, dtype=plane.torch_dtype)
        pools[plane.name] = pool
    return pools


def _garbage_buffers(site: SiteSpec, stream: StreamSpec, num_rows: int) -> dict[str, Tensor]:
    sizes = {"sink": stream.sink, "recent": stream.capacity}
    return {
        name: torch.full(
            (num_rows, site.num_kv_heads, size, stream.head_dim),
            math.nan,
            dtype=dtype_from_name(stream.exact_dtype),
        )
        for name, size in sizes.items()
        if size
    }


def _store_row(
    site: SiteSpec,
    stream: StreamSpec,
    x: Tensor,
    length: int,
    pages: Tensor,
    pools: dict[str, Tensor],
) -> None:
    """Write the codes of one row; x is `[Hk, T, D]`."""
    body = body_tokens(stream, length)
    if body == 0:
        return
    planes = encode(stream, arrive(stream, x)[:, stream.sink : stream.sink + body])
    for plane in stream.planes:
        content, per_page = planes[plane.name], site.page_size // plane.tokens_per_row
        for i in range(content.shape[1]):
            page = int(pages[i // per_page])
            pools[plane.name][page, :, i % per_page] = content[:, i]


def _store_exact(
    stream: StreamSpec, x: Tensor, length: int, row: int, buffers: dict[str, Tensor]
) -> None:
    for position in range(min(length, stream.sink)):
        buffers["sink"][row, :, position] = x[:, position]
    for position in range(stream.sink + body_tokens(stream, length), length):
        slot = (position - stream.sink) % stream.capacity
        buffers["recent"][row, :, slot] = x[:, position]


def _as_fragments(site: SiteSpec, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    from kvxform.codegen.triton import fragment  # only this layout needs it

    planes = {
        name: {p.name: tensors.pop(f"{name}_{p.name}") for p in stream.planes}
        for name, stream in site.streams.items()
    }
    return {**tensors, "pool": fragment.from_planes(site, planes)}


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    slot_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the attention of the last token's query, and its log-sum-exp, in float64.

    Args:
        q: `[H, D]`.
        keys: `[Hk, n, D]`; the query is at position n - 1.
        values: `[Hk, n, Dv]`.
        scale: Factor of q k^T.
        window: Tokens that are seen, counted from the last.
        chunk: Tokens before the last multiple of it are not seen.
        softcap: Cap of scaled scores.
        sink_logits: `[H]`, one more softmax column without a value.
        alibi_slopes: `[H]`.
        slot_bias: `[Hk, at least n]`.

    Where no token is seen, the output is zero and the log-sum-exp minus infinity.
    """
    length, groups = keys.shape[1], q.shape[0] // keys.shape[0]
    if length == 0:
        return q.new_zeros(q.shape[0], values.shape[-1]).double(), q.new_full(
            (q.shape[0],), -math.inf
        ).double()
    k, v = (x.double().repeat_interleave(groups, 0) for x in (keys, values))
    scores = torch.einsum("hd,hnd->hn", q.double(), k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    positions = torch.arange(length, device=q.device)
    if alibi_slopes is not None:
        scores = scores + alibi_slopes.double()[:, None] * (positions - (length - 1))
    if slot_bias is not None:
        scores = scores + slot_bias[:, :length].double().repeat_interleave(groups, 0)
    hidden = torch.zeros(length, dtype=torch.bool, device=q.device)
    if window is not None:
        hidden |= positions < length - window
    if chunk is not None:
        hidden |= positions < (length - 1) // chunk * chunk
    scores = scores.masked_fill(hidden, -math.inf)
    if sink_logits is not None:
        scores = torch.cat([scores, sink_logits.double()[:, None]], 1)
    lse = scores.logsumexp(-1)
    is_empty = lse.isneginf()[:, None]  # every token is left out by its bias
    weights = (scores - lse[:, None]).masked_fill(is_empty, -math.inf).exp()[:, :length]
    return torch.einsum("hn,hnd->hd", weights, v), lse


def decode_reference(
    site: SiteSpec, q: Tensor, keys: Tensor, values: Tensor, lengths: Sequence[int], **options: Any
) -> tuple[Tensor, Tensor]:
    """Return `attend` of every row over what is live at its length: `[B, H, Dv]`, `[B, H]`.

    `slot_bias` is `[B, Hk, T]` here; q must be rotated already.
    """
    bias, outs = options.pop("slot_bias", None), []
    for b, length in enumerate(lengths):
        k = live_copy(site.key, keys[b], length)
        v = live_copy(site.value, values[b], length)
        row = {} if bias is None else {"slot_bias": bias[b]}
        outs.append(attend(q[b], k, v, **options, **row))
    return torch.stack([o for o, _ in outs]), torch.stack([lse for _, lse in outs])
