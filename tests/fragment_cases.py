"""Sites, random caches and an fp64 reference for kernels over pages in fragment order."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvxform.codecs.hadamard import hadamard_matrix
from kvxform.codecs.packing import unpack
from kvxform.codegen.triton.spec import DecodeSpec, SiteSpec, StreamSpec

PLAIN = ("float16", "bfloat16")
KINDS = ("int2", "int4", "int4-float", "int4-symmetric", "int8", "int8-symmetric", *PLAIN)


def make_stream(kind: str, head_dim: int = 128) -> StreamSpec:
    """Return a stream by a name such as `int4`, `int8-symmetric` or `bfloat16`."""
    if kind in PLAIN:
        return StreamSpec(head_dim, 16, dtype=kind, group=head_dim)
    bits, _, form = kind.removeprefix("int").partition("-")
    zero = "float" if form == "float" else "int"
    symmetric = form == "symmetric"
    return StreamSpec(head_dim, int(bits), group=head_dim, symmetric=symmetric, zero=zero)


def make_site(
    key: str,
    value: str = "",
    *,
    head_dim: int = 128,
    groups: int = 4,
    heads: int = 2,
    page_size: int = 64,
    dtype: str = "float16",
) -> SiteSpec:
    """Return a site whose values are stored like its keys unless `value` says otherwise."""
    key_stream, value_stream = make_stream(key, head_dim), make_stream(value or key, head_dim)
    return SiteSpec(groups * heads, heads, key_stream, value_stream, page_size, "fragment", dtype)


def random_planes(
    site: SiteSpec, num_pages: int, device: str = "cpu"
) -> dict[str, dict[str, Tensor]]:
    """Return planes whose values are of the size of one, `[num_pages, Hk, page_size, width]`."""
    result = {}
    for name, stream in site.streams.items():
        shape = (num_pages, site.num_kv_heads, site.page_size)
        planes: dict[str, Tensor] = {}
        if not stream.is_coded:
            x = torch.randn(*shape, stream.head_dim, device=device)
            planes["value"] = x.to(getattr(torch, stream.dtype))
        else:
            width = stream.head_dim * stream.bits // 8
            planes["codes"] = torch.randint(0, 256, (*shape, width), device=device).byte()
            middle = (2**stream.bits - 1) / 2
            scale = (torch.rand(*shape, 1, device=device) + 0.5) / middle
            planes["scale"] = scale.half()
        if stream.has_zero:
            shift = torch.rand(*shape, 1, device=device) * 0.4 + 0.8
            zero = (middle * shift).round() if stream.zero == "int" else -scale * middle * shift
            planes["zero"] = zero.half()
        result[name] = planes
    return result


def decode_values(stream: StreamSpec, planes: dict[str, Tensor]) -> Tensor:
    """Return the stored values in float64, `[num_pages, Hk, page_size, D]`."""
    if not stream.is_coded:
        return planes["value"].double()
    codes, scale = unpack(planes["codes"], stream.bits).double(), planes["scale"].double()
    if stream.symmetric:
        return (codes - 2 ** (stream.bits - 1)) * scale
    zero = planes["zero"].double()
    return codes * scale + zero if stream.zero == "float" else (codes - zero) * scale


def reference(
    spec: DecodeSpec,
    q: Tensor,
    planes: dict[str, dict[str, Tensor]],
    block_table: Tensor,
    lengths: list[int],
    scale: float,
    extras: dict[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """Return output `[B, H, D]` and log-sum-exp `[B, H]` in float64, by the equations."""
    site = spec.site
    keys = decode_values(site.key, planes["key"])
    values = decode_values(site.value, planes["value"])
    q = q.double()
    if spec.has_signs:
        q = q * extras["signs"].double()
    if spec.query_block:
        h = hadamard_matrix(spec.query_block).to(q)
        q = (q.unflatten(-1, (-1, spec.query_block)) @ h).flatten(-2)
    out = torch.zeros(q.shape[0], site.num_q_heads, site.value.head_dim).to(q)
    lse = torch.full(q.shape[:2], -math.inf).to(q)
    for b, length in enumerate(lengths):
        if length == 0:
            continue
        pages = block_table[b, : -(-length // site.page_size)].long()
        k = keys[pages].transpose(0, 1).flatten(1, 2)[:, :length]  # [Hk, T, D]
        v = values[pages].transpose(0, 1).flatten(1, 2)[:, :length]
        k, v = (x.repeat_interleave(site.groups, 0) for x in (k, v))
        scores = (k @ q[b, :, :, None])[..., 0] * scale  # [H, T]
        if spec.softcap:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        place = torch.arange(length, device=q.device)
        if spec.has_alibi:
            scores = scores + extras["alibi_slopes"].double()[:, None] * (place - (length - 1))
        if spec.has_slot_bias:
            bias = extras["slot_bias"][b, :, :length].double()
            scores = scores + bias.repeat_interleave(site.groups, 0)
        if spec.window is not None:
            scores = scores.masked_fill(place < length - spec.window, -math.inf)
        if spec.chunk is not None:
            other = place // spec.chunk != (length - 1) // spec.chunk
            scores = scores.masked_fill(other, -math.inf)
        total = torch.logsumexp(scores, -1)
        if spec.has_sink_logits:
            total = torch.logaddexp(total, extras["sink_logits"].double())
        lse[b] = total
        out[b] = (torch.exp(scores - total[:, None])[:, None] @ v)[:, 0]
    return out, lse


def random_extras(
    spec: DecodeSpec, batch_size: int, max_seq_len: int, device: str = "cpu"
) -> dict[str, Tensor]:
    """Return the optional inputs that `spec` wants."""
    heads, kv_heads = spec.site.num_q_heads, spec.site.num_kv_heads
    signs = torch.randint(0, 2, (spec.site.key.head_dim,), device=device).float() * 2 - 1
    extras = {
        "signs": (spec.has_signs, signs),
        "sink_logits": (spec.has_sink_logits, torch.randn(heads, device=device) * 2),
        "alibi_slopes": (spec.has_alibi, torch.rand(heads, device=device) * 0.1),
        "slot_bias": (spec.has_slot_bias, torch.randn(batch_size, kv_heads, max_seq_len).to(device)),
    }
    return {name: x for name, (is_wanted, x) in extras.items() if is_wanted}
