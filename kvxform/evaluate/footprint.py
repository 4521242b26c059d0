"""True bits of a plan: in a long sequence, and at a length where exact regions still count."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from kvxform.codecs.base import dtype_from_name
from kvxform.ir.plan import CachePlan

SHORT = 1024  # tokens at which regions are counted


@dataclass(frozen=True)
class Footprint:
    """What a cache costs.

    Attributes:
        bits_long: Bits per cached element of a long sequence, all metadata included.
        bits_short: The same at `short_tokens`, exact first and last tokens included.
        short_tokens: Where `bits_short` is taken.
        bytes_short: Bytes that a session holds for one sequence of that length: whole pages, and
            buffers of exact tokens at their largest.
    """

    bits_long: float
    bits_short: float
    short_tokens: int
    bytes_short: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return dataclasses.asdict(self)


def measure_footprint(plan: CachePlan, tokens: int = SHORT) -> Footprint:
    """Return the cost of `plan` by arithmetic.

    Args:
        plan: What is cached.
        tokens: Cached tokens at which regions are counted.
    """
    return Footprint(
        plan.bits_per_value, bits_at(plan, tokens), tokens, plan.bytes_at([tokens], tokens)
    )


def bits_at(plan: CachePlan, tokens: int) -> float:
    """Return bits per cached element of one sequence of `tokens` cached tokens.

    Encoded tokens cost what their planes take, others their exact dtype. Unused places of pages
    and buffers are not counted.
    """
    total = 0.0
    for site in plan.owners:
        for stream in site.streams.values():
            body = stream.body_tokens(tokens)
            wide = stream.head_dim * dtype_from_name(stream.regions.dtype).itemsize
            exact = (tokens - body) * site.num_kv_heads * wide
            total += body * stream.body_bytes_per_token(site.num_kv_heads) + exact
    return total * 8 / (tokens * plan.values_per_token)
