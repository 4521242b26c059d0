"""Pages in fragment order: the 16 bytes that a lane reads are operands of its `mma.m16n8k16`.

A pool is int32 `[num_pages, Hk, chunk_words]`. A chunk is what one KV head stores of one page:
an area of keys, an area of values, then one record of scales and zero points per token.

Both areas consist of rows of 64 bytes, 16 words. Four lanes read a row, 16 bytes each. A pair of
words (2i, 2i + 1) holds two neighbouring *columns*: column 2i in the low 16 bits of both words,
column 2i + 1 in the high ones. So a word is two 16-bit halves, and code j of a half sits at bit
`bits * j`. The codes of one column are the *slots* of the row, `32 / bits` of them: those of the
even word first. Slots run over groups of 16 channels, then over tokens.

- Keys: a row belongs to a token and a column is a channel of a group. Codes of a token fill a row,
  several rows (`planes`, each an area of its own), or half a row: then the tokens l and l + 16 of
  a block of 32 share a row. Order: `[plane][block][label l][16 words]`.
- Values: a row belongs to channel c of all groups and a column is the label of a token in its
  block. Order: `[plane][block][channel c][16 words]`.
- Records, in the order of tokens: float16 scale and zero point, or norm, of the key, then of the
  value, each only if its codec stores one; they are the numbers of the codec, unchanged.

A token owns whole words of keys (of a shared row: the even or the odd ones), whole 16-bit halves
of values, and its record, so one token is appended without reading. Plain 16-bit values are codes
of 16 bits. No bit is unused: a page takes the bytes of its planes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvxform.codecs.base import dtype_from_name
from kvxform.codecs.packing import pack, unpack
from kvxform.codegen.triton import fragment_levels
from kvxform.codegen.triton.spec import SiteSpec, StreamSpec

HEAD_DIMS = (64, 128, 256)
MAX_GROUPS = 16  # query heads of a KV head: two tiles of 8 columns
BLOCK = 16  # tokens of a block, channels of a group
ROW_WORDS = 16
PARAMETERS = ("scale", "zero", "norm")  # planes of a codec that go to the record


@dataclass(frozen=True)
class AreaLayout:
    """Geometry of the keys or the values of a page.

    Attributes:
        bits: Bits of a code, 16 for plain values.
        groups: Groups of 16 channels of a token.
    """

    bits: int
    groups: int

    @classmethod
    def of(cls, stream: StreamSpec) -> AreaLayout:
        """Return the geometry of `stream`."""
        return cls(stream.bits, stream.head_dim // BLOCK)

    @property
    def slots(self) -> int:
        """Codes of a column in a row."""
        return 32 // self.bits

    @property
    def planes(self) -> int:
        """Rows of 64 bytes that a token fills; 1 if tokens share a row."""
        return max(1, self.groups // self.slots)

    @property
    def tokens_per_row(self) -> int:
        """Tokens that share a row."""
        return max(1, self.slots // self.groups)

    def words(self, page_size: int) -> int:
        """Return words of the area in a page."""
        return page_size * self.groups * BLOCK * self.bits // 32


def reason_against(site: SiteSpec) -> str | None:
    """Return why pages of `site` cannot be in fragment order, as a clause, or None if they can."""
    if site.dtype not in ("float16", "bfloat16"):
        return f"a model in {site.dtype} has no 16-bit operands"
    if site.key.head_dim != site.value.head_dim:
        return "keys and values have different head_dim"
    if site.key.head_dim not in HEAD_DIMS:
        return f"head_dim is none of {HEAD_DIMS}"
    if site.groups > MAX_GROUPS:
        return f"more than {MAX_GROUPS} query heads share a KV head"
    is_plain = any(not stream.is_coded for stream in site.streams.values())
    if site.key.head_dim == 256 and (is_plain or site.groups > 8):
        return "tiles of head_dim 256 fit registers only as codes and for 8 query heads a KV head"
    for name, stream in site.streams.items():
        reason = _reason_against_stream(stream)
        if reason:
            return f"{name}: {reason}"
    block = block_tokens(site)
    if site.page_size < block or site.page_size & (site.page_size - 1):
        return f"page_size must be a power of two and at least {block}"
    return None


def _reason_against_stream(stream: StreamSpec) -> str | None:
    if not stream.is_plain:
        return "some tokens stay exact"
    if not stream.is_coded:
        is_short = stream.dtype in ("float16", "bfloat16")
        return None if is_short else f"values are stored as {stream.dtype}"
    if stream.bits not in (2, 4, 8):
        return f"codes of {stream.bits} bits do not fill halves of words"
    if stream.table and not _is_level_table(stream):
        return "codes stand for values of a table"
    if stream.token_norm:
        return "tokens have a norm"
    if stream.axis != "token" or stream.group != stream.head_dim:
        return "a token has more than one scale"
    if AreaLayout.of(stream).tokens_per_row > 2:
        return "more than two tokens would share a row of 64 bytes"
    return None


def _is_level_table(stream: StreamSpec) -> bool:
    """Whether registers hold the table: few levels of directions, as many below zero as above."""
    is_small = stream.block == 1 and stream.bits in fragment_levels.BITS
    return bool(stream.gain) and is_small and fragment_levels.is_symmetric(stream.table)


def areas(site: SiteSpec) -> dict[str, AreaLayout]:
    """Return the geometry of `key` and `value`."""
    return {name: AreaLayout.of(stream) for name, stream in site.streams.items()}


def block_tokens(site: SiteSpec) -> int:
    """Return the tokens that pages are built of: 16, or 32 if tokens share rows."""
    return BLOCK * max(area.tokens_per_row for area in areas(site).values())


def record_fields(site: SiteSpec) -> tuple[tuple[str, str], ...]:
    """Return (stream, plane) of each float16 of a record, in the order in which they lie."""
    return tuple(
        (name, plane.name)
        for name, stream in site.streams.items()
        for plane in stream.planes
        if plane.name in PARAMETERS
    )


def record_start(site: SiteSpec) -> int:
    """Return the word of a chunk at which records begin."""
    return sum(area.words(site.page_size) for area in areas(site).values())


def chunk_words(site: SiteSpec) -> int:
    """Return the words of one page of one KV head."""
    return record_start(site) + site.page_size * len(record_fields(site)) // 2


@functools.cache
def key_index(area: AreaLayout, page_size: int) -> Tensor:
    """Return which code each field of each word of the area of keys holds.

    Args:
        area: Geometry of the keys.
        page_size: Tokens a page.

    Returns:
        int64 `[words, fields]`, `token * D + channel`; the fields of a word by rising bit, so
        field f sits at bit `bits * f`.
    """
    column, slot = _columns_and_slots(area)
    label = torch.arange(BLOCK)[None, None, :, None, None]
    token, group = _token_and_group(area, slot, page_size)
    index = (token + label) * area.groups * BLOCK + BLOCK * group + column
    return index.reshape(-1, area.slots)


@functools.cache
def value_index(area: AreaLayout, page_size: int) -> Tensor:
    """Return which code each field of each word of the area of values holds, as `key_index`."""
    column, slot = _columns_and_slots(area)
    channel = torch.arange(BLOCK)[None, None, :, None, None]
    token, group = _token_and_group(area, slot, page_size)
    index = (token + column) * area.groups * BLOCK + BLOCK * group + channel
    return index.reshape(-1, area.slots)


def _columns_and_slots(area: AreaLayout) -> tuple[Tensor, Tensor]:
    """Return column and slot of each field of a row, int64 `[16 words, fields]`."""
    word, field = torch.arange(ROW_WORDS)[:, None], torch.arange(area.slots)
    per_half = area.slots // 2
    column = (word & ~1) + field // per_half
    return column, (word & 1) * per_half + field % per_half


def _token_and_group(area: AreaLayout, slot: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """Return first token of its run of 16 and channel group, `[plane, block, 1, words, fields]`."""
    plane = torch.arange(area.planes)[:, None, None, None, None]
    rows = page_size // (BLOCK * area.tokens_per_row)
    block = torch.arange(rows)[None, :, None, None, None]
    groups_a_row = min(area.slots, area.groups)
    token = (block * area.tokens_per_row + slot // groups_a_row) * BLOCK
    return token, plane * groups_a_row + slot % groups_a_row


def from_planes(site: SiteSpec, planes: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
    """Return the pool that holds `planes`.

    Args:
        site: What is stored; `reason_against` it is None.
        planes: Planes of `key` and `value` by name, `[num_pages, Hk, page_size, width]`.

    Returns:
        int32 `[num_pages, Hk, chunk_words]`.
    """
    parts = []
    for name, stream in site.streams.items():
        codes = _codes_of(stream, planes[name])  # [n, Hk, page_size, D]
        index = _index(site, name).to(codes.device)
        shifts = stream.bits * torch.arange(index.shape[1], device=codes.device)
        fields = codes.flatten(-2)[..., index.flatten()].unflatten(-1, index.shape)
        words = (fields << shifts).sum(-1)
        parts.append((words - ((words >> 31) << 32)).int())
    records = [planes[name][plane] for name, plane in record_fields(site)]
    if records:
        parts.append(torch.cat(records, -1).flatten(-2).view(torch.int32))
    return torch.cat(parts, -1)


def to_planes(site: SiteSpec, pool: Tensor) -> dict[str, dict[str, Tensor]]:
    """Return the planes of `key` and `value` that `pool` holds; the inverse of `from_planes`."""
    planes: dict[str, dict[str, Tensor]] = {}
    start = 0
    for name, stream in site.streams.items():
        index = _index(site, name).to(pool.device)
        words = pool[..., start : start + index.shape[0], None]
        start += index.shape[0]
        shifts = stream.bits * torch.arange(index.shape[1], device=pool.device, dtype=torch.int32)
        fields = (words >> shifts) & (2**stream.bits - 1)
        codes = fields.new_empty(*pool.shape[:2], site.page_size * stream.head_dim)
        codes[..., index.flatten()] = fields.flatten(-2)
        planes[name] = _planes_of(stream, codes.unflatten(-1, (site.page_size, stream.head_dim)))
    names = record_fields(site)
    if names:
        records = pool[..., start:].contiguous().view(torch.float16)
        records = records.unflatten(-1, (site.page_size, len(names)))
        for i, (name, plane) in enumerate(names):
            planes[name][plane] = records[..., i : i + 1].contiguous()
    return planes


def _index(site: SiteSpec, name: str) -> Tensor:
    make = key_index if name == "key" else value_index
    return make(areas(site)[name], site.page_size)


def _codes_of(stream: StreamSpec, planes: Mapping[str, Tensor]) -> Tensor:
    """Return unsigned codes as int64, `[n, Hk, page_size, D]`."""
    if stream.is_coded:
        return unpack(planes["codes"], stream.bits).long()
    return planes["value"].view(torch.int16).long() & 0xFFFF


def _planes_of(stream: StreamSpec, codes: Tensor) -> dict[str, Tensor]:
    """Return the plane of codes or of plain values; the inverse of `_codes_of`."""
    if stream.is_coded:
        return {"codes": pack(codes.to(torch.uint8), stream.bits)}
    return {"value": codes.to(torch.int16).view(dtype_from_name(stream.dtype))}
