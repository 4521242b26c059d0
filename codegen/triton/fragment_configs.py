"""Launch parameters of decode over pages in fragment order: what fits the registers, best first."""

from __future__ import annotations

from kvxform.codegen.triton import fragment
from kvxform.codegen.triton.fragment import BLOCK
from kvxform.codegen.triton.spec import SiteSpec

MAX_CONFIGS = 8
WORDS_A_LANE = 32  # of K and V of a tile: what three CTAs of four warps have registers for
OTHER_REGISTERS = 32  # addresses, softmax, records
TABLE_REGISTERS = 16  # of levels, and of looking them up
REGISTER_FILE = 65536  # of a multiprocessor
MAX_REGISTERS = 255  # of a thread


def count_columns(site: SiteSpec) -> int:
    """Return query heads of a KV head, padded to the columns of one or two mma."""
    return 8 if site.groups <= 8 else 16


def list_configs(site: SiteSpec) -> list[tuple[int, int, int, int, int]]:
    """Return warps, tokens of a tile, CTAs, limit of registers and round; best guess first.

    `tile` is the number of tokens whose K and V are 32 words a lane. The order is that of
    measurements on an H100 (docs/adr/0008-triton-decode.md).
    """
    words = sum(area.words(site.page_size) for area in fragment.areas(site).values())
    tokens = 32 * WORDS_A_LANE * site.page_size // words
    smallest = fragment.block_tokens(site)
    tile = max(1 << (tokens.bit_length() - 1), smallest)
    bits = max(stream.bits for stream in site.streams.values())
    if bits < 8:
        wanted = [(4, 2 * tile, 2, 0), (8, 2 * tile, 1, 0), (4, tile, 3, 168), (4, tile, 4, 128)]
        wanted += [(2, 2 * tile, 4, 0), (4, 2 * tile, 3, 168), (8, tile, 2, 128)]
        wanted += [(4, tile // 2, 4, 128), (4, tile, 2, 0), (8, tile, 1, 0)]
    else:
        wanted = [(4, 2 * tile, 2, 0), (4, tile, 3, 168), (8, 2 * tile, 1, 0), (4, tile, 4, 128)]
        wanted += [(4, tile, 2, 0), (8, tile, 1, 0), (2, tile, 4, 0)]
    if any(stream.table for stream in site.streams.values()):  # bound by instructions: many warps
        wanted = [(4, tile, 3, 168), (4, tile // 2, 4, 128), (4, tile, 2, 0), (8, tile, 1, 0)]
        wanted += [(4, 2 * tile, 2, 0)]
    elif bits in (2, 16) or (bits == 4 and 2 * tile > site.page_size):
        wanted.sort(key=lambda config: config[2] != 3)  # tiles cannot grow, so three CTAs first
    chosen: list[tuple[int, int, int, int, int]] = []
    for warps, size, ctas, limit in wanted:
        size = max(min(size, site.page_size), smallest)
        if _fits(site, size, limit or min(REGISTER_FILE // (32 * warps * ctas), MAX_REGISTERS)):
            config = (warps, size, ctas, limit, _round(site, warps, ctas))
            chosen += [config] if config not in chosen else []
    return chosen[:MAX_CONFIGS]


def _fits(site: SiteSpec, tile: int, limit: int) -> bool:
    """Estimate whether the loop stays within `limit` registers a thread."""
    words = sum(area.words(site.page_size) for area in fragment.areas(site).values())
    held = words * tile // (site.page_size * 32)
    columns, groups = count_columns(site), site.key.head_dim // BLOCK
    outputs, query = groups * columns // 2, groups * columns // 4
    scores = tile * columns // 16  # and weights
    tables = TABLE_REGISTERS * any(stream.table for stream in site.streams.values())
    return held + outputs + query + scores + tables + OTHER_REGISTERS <= limit


def _round(site: SiteSpec, warps: int, ctas: int) -> int:
    """Return how many parts are merged at a time: few CTAs have few parts but many registers."""
    heads = max(1 << (site.groups - 1).bit_length(), warps)
    values = site.key.head_dim // 32 * heads // warps  # of one part, a lane
    wanted = 16 if ctas == 1 else 8
    return max(2, min(wanted, 64 // values))
