"""Emission of `gather`: pages and exact buffers to dense K and V."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvxform.codecs.base import PlaneSpec
from kvxform.codegen.triton import fragment
from kvxform.codegen.triton.describe import cache_tensors
from kvxform.codegen.triton.refusal import refuse
from kvxform.codegen.triton.registry import Emission, emits
from kvxform.codegen.triton.spec import GatherSpec, SiteSpec, StreamSpec

MAX_TABLE = 16  # values of a table: each is an operand of the lookup

# (tokens, num_warps), the best guess first
_CONFIGS = ((32, 4), (64, 4), (16, 4), (64, 8))


@dataclass(frozen=True)
class StoredStream:
    """K or V as the templates of `gather` need it.

    Attributes:
        name: `key` or `value`.
        spec: How it is stored.
    """

    name: str
    spec: StreamSpec

    @property
    def planes(self) -> dict[str, PlaneSpec]:
        """Planes of the body by name."""
        return {plane.name: plane for plane in self.spec.planes}

    @property
    def block(self) -> int:
        """Channels of a tile: the next power of two."""
        return 1 << (self.spec.head_dim - 1).bit_length()

    @property
    def and_mask(self) -> str:
        """One more condition of a mask, where the tile is wider than the head."""
        head_dim = self.spec.head_dim
        return "" if self.block == head_dim else f" & (channels[None, :] < {head_dim})"

    @property
    def column(self) -> str:
        """Where in its row the scale of a channel is, or nothing if a token has but one."""
        if self.spec.axis == "channel":
            return "channels[None, :]"
        one = self.spec.group == self.spec.head_dim
        return "" if one else f"(channels // {self.spec.group})[None, :]"


@emits(GatherSpec)
def make_context(spec: GatherSpec, *, interpret: bool) -> Emission:
    """Return the template of `gather` and its variables.

    Raises:
        CodegenError: KVX401 for pages that groups do not fill, or a table that is too long.
    """
    site = spec.site
    streams = {name: StoredStream(name, stream) for name, stream in site.streams.items()}
    if site.layout == "fragment":
        return Emission("gather_fragment.py.jinja", {**streams, **_fragment_variables(site)})
    for stream in streams.values():
        _check(stream, site)
    variables = {
        "site": site,
        "cache": cache_tensors(site),
        "configs": _CONFIGS,
        "table_streams": [stream for stream in streams.values() if stream.spec.block > 1],
        **streams,
    }
    return Emission("gather_rows.py.jinja", variables)


def _fragment_variables(site: SiteSpec) -> dict[str, Any]:
    """Return where in a chunk everything is; raise CodegenError KVX401 if pages cannot be so."""
    reason = fragment.reason_against(site)
    if reason:
        refuse("pages must be able to have fragment order", reason, "", "use layout rows")
    areas, words = fragment.areas(site), fragment.chunk_words(site)
    value_start = areas["key"].words(site.page_size)
    shape = f"[num_pages, {site.num_kv_heads}, {words}]"
    block = fragment.block_tokens(site)
    sizes = [size for size in (32, 64, 16) if block <= size <= site.page_size]
    return {
        "site": site,
        "areas": areas,
        "starts": {"key": 0, "value": value_start, "record": fragment.record_start(site)},
        "record_fields": fragment.record_fields(site),
        "chunk_words": words,
        "cache": {"pool": f"Pages in fragment order, int32 `{shape}`."},
        "configs": tuple((size, warps) for size in sizes for warps in (4, 8)),
    }


def _check(stream: StoredStream, site: SiteSpec) -> None:
    group = stream.spec.tokens_per_group
    table = len(stream.spec.table) if stream.spec.block == 1 else 0
    if site.page_size % group:
        rule = f"the page size must be a multiple of the {group} tokens that share a scale"
        hint = f"use page-cache with page_size {-(-site.page_size // group) * group}"
        refuse(rule, site.page_size, "", hint)
    if table > MAX_TABLE:
        rule = f"a table may have at most {MAX_TABLE} values"
        refuse(rule, table, "", "use codes of at most 4 bits")
