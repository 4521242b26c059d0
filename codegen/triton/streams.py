"""How a stored K or V stream is read by a tile kernel: which bytes, which channels, which units.

Codes are unpacked where they stand in their byte and taken as float16: a byte with only the bits
`code << shift` left is the subnormal `code * 2**(shift - 24)`. Tensor cores take subnormals as they
are, so no conversion and no bias is needed, only a power of two at the end.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from kvxform.codecs.base import PlaneSpec
from kvxform.codegen.triton.spec import SiteSpec, StreamSpec
from kvxform.codegen.triton.sub_tiles import SubTile, sub_tiles

SUBNORMAL = 24  # bit 0 of a float16 is worth 2**-24
MIN_BLOCK = 16  # the shortest inner axis of `tl.dot`


@dataclass(frozen=True)
class Part:
    """A run of channels that is one operand.

    Attributes:
        name: Suffix of its variables.
        first_channel: First of the channels.
        width: Channels.
        group: Index of its scale, along channels.
        shift: The operand is `value * 2**shift / unit` of its stream.
        stride: Distance of its channels.
    """

    name: str
    first_channel: int
    width: int
    group: int
    shift: int
    stride: int = 1

    @property
    def channels(self) -> str:
        """Channels of the tile, a Python expression of int32 `[block]`."""
        stride = f" * {self.stride}" if self.stride > 1 else ""
        start = f"{self.first_channel} + " if self.first_channel else ""
        return f"{start}tl.arange(0, {self.block}){stride}"

    @property
    def end(self) -> int:
        """The first channel past the part."""
        return self.first_channel + self.width * self.stride

    @property
    def block(self) -> int:
        """Channels of the tile: a power of two."""
        return tile_width(self.width)


@dataclass(frozen=True)
class Load:
    """Elements of a row that are loaded as one tile.

    Attributes:
        name: Suffix of its variables.
        first: First element of the row.
        start: First element after `first`, of those that are repeated.
        period: Elements from `first` on that are repeated, or 0.
    """

    name: str
    first: int
    start: int = 0
    period: int = 0


@dataclass(frozen=True)
class CodeBlock:
    """Loads that are unpacked together into parts.

    Attributes:
        loads: What is loaded: one run of elements, or low and high bits if codes have 3 bits.
        parts: What it unpacks to, in the order of the unpacking function.
    """

    loads: tuple[Load, ...]
    parts: tuple[Part, ...]

    @property
    def width(self) -> int:
        """Elements of a load."""
        return self.parts[0].width

    @property
    def block(self) -> int:
        """Elements of the tile: a power of two."""
        return self.parts[0].block


@dataclass(frozen=True)
class TileStream:
    """One stream of a site as a template needs it.

    Attributes:
        name: `key` or `value`.
        spec: What is stored.
        wide: Everything is computed in float32.
        blocks: How rows are loaded and unpacked.
        tail_sources: Where tokens may be that are not codes in both streams: `body`, `recent`.
    """

    name: str
    spec: StreamSpec
    wide: bool
    blocks: tuple[CodeBlock, ...]
    tail_sources: list[str]

    @classmethod
    def of(cls, name: str, site: SiteSpec) -> TileStream:
        """Return the stream of `site` called `name`; a float32 model computes in float32."""
        spec = site.streams[name]
        (other,) = (stream for key, stream in site.streams.items() if key != name)
        wide = "float32" in (site.dtype, spec.dtype, spec.exact_dtype)
        in_place = spec.is_coded and not spec.table and not wide
        blocks = tuple(_blocks(spec, in_place=in_place))
        return cls(name, spec, wide, blocks, _tail_sources(spec, other))

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts, in the order of their blocks."""
        return tuple(itertools.chain.from_iterable(block.parts for block in self.blocks))

    @property
    def is_subnormal(self) -> bool:
        """Whether operands are codes in place, as subnormal float16."""
        return self.spec.is_coded and not self.spec.table and not self.wide

    @property
    def unit(self) -> float:
        """What a product with operands of shift 0 has to be multiplied by."""
        return 2.0**SUBNORMAL if self.is_subnormal else 1.0

    @property
    def dtype(self) -> str:
        """Dtype of the operands by torch name."""
        if self.wide:
            return "float32"
        return "float16" if self.spec.is_coded else self.spec.dtype

    @property
    def exact_dtype(self) -> str:
        """Dtype of operands that are exact tokens; empty if there are none."""
        return "float32" if self.wide and self.spec.exact_dtype else self.spec.exact_dtype

    @property
    def is_channel(self) -> bool:
        """Whether tokens of a channel share a scale."""
        return self.spec.is_coded and self.spec.axis == "channel"

    @property
    def is_token(self) -> bool:
        """Whether channels of a token share a scale."""
        return self.spec.is_coded and self.spec.axis == "token"

    @property
    def groups(self) -> dict[int, tuple[Part, ...]]:
        """Parts by the index of their scale, for one scale a token or more."""
        found: dict[int, tuple[Part, ...]] = {}
        for part in self.parts:
            found[part.group] = (*found.get(part.group, ()), part)
        return dict(sorted(found.items()))

    @property
    def offset(self) -> str:
        """How a value is made of a code: by `code`, the zero point of a code; `value`; or none."""
        if not self.spec.is_coded or self.spec.table:
            return ""
        return "value" if self.spec.has_zero and self.spec.zero == "float" else "code"

    @property
    def middle(self) -> float:
        """The zero point of symmetric codes."""
        return float(2 ** (self.spec.bits - 1))

    @property
    def parameters(self) -> tuple[PlaneSpec, ...]:
        """Planes beside the codes."""
        return self.spec.planes[1:]

    @property
    def row_width(self) -> int:
        """Elements of a row of codes or values."""
        return self.spec.planes[0].width

    def acc_unit(self, part: Part) -> float:
        """Return what a sum over tokens has to be multiplied by once it is complete."""
        return self.unit / 2**part.shift if self.is_token else 1.0

    @property
    def body_tokens(self) -> str:
        """Python for the tokens after the sink that are codes when `length` are cached."""
        exact = self.spec.sink + self.spec.keep
        free = f"tl.maximum(length - {exact}, 0)" if exact else "length"
        return free if self.spec.chunk == 1 else f"{free} // {self.spec.chunk} * {self.spec.chunk}"

    @property
    def _kind(self) -> str:
        kind = f"words{self.spec.block}_" if self.spec.block > 1 else "int"
        return f"wide_{kind}" if self.wide else kind

    @property
    def entry_values(self) -> int:
        """Numbers that one load from the table of codes gets: two or four float16, or one."""
        if self.wide or self.spec.bits == 3:
            return 1
        return self.spec.block if self.spec.block > 1 else 8 // self.spec.bits

    @property
    def has_high_bits(self) -> bool:
        """Whether codes are stored as low and high bits."""
        return self.spec.is_coded and self.spec.bits in (3, 6)

    @property
    def unpacker(self) -> str:
        """Name of the function that unpacks; empty for plain values."""
        if not self.spec.is_coded:
            return ""
        if self.spec.table:
            return f"look_up_{self._kind}{self.spec.bits}"
        return f"widen_int{self.spec.bits}" if self.wide else f"unpack_int{self.spec.bits}"


def _tail_sources(spec: StreamSpec, other: StreamSpec) -> list[str]:
    is_last = spec.keep >= other.keep + other.chunk - 1  # the other never has fewer codes
    is_same = (spec.keep, spec.chunk) == (other.keep, other.chunk)
    in_body = not is_same and not is_last
    return ["body"] * in_body + ["recent"] * (spec.capacity > 0)


def tile_width(width: int) -> int:
    """Return the width of a tile that holds `width` elements and can be an operand."""
    return max(MIN_BLOCK, 1 << (width - 1).bit_length())


def _blocks(spec: StreamSpec, *, in_place: bool) -> Iterator[CodeBlock]:
    number = itertools.count()

    def part(tile: SubTile) -> Part:
        shift = tile.shift if in_place else 0
        return Part(str(next(number)), tile.first_channel, tile.width, tile.group, shift)

    if not spec.is_coded:
        whole = SubTile(0, 0, 0, spec.head_dim, 0)
        yield CodeBlock((Load("0", 0),), (part(whole),))
    elif spec.block > 1:
        yield _word_block(spec)
    elif spec.bits == 3:
        for i, tiles in enumerate(_three_bit_tiles(spec)):
            low, eighth = Load(f"{i}", tiles[0].first_byte), spec.head_dim // 8
            high = Load(f"{i}_high", 2 * eighth, low.first, eighth)
            yield CodeBlock((low, high), tuple(part(tile) for tile in tiles))
    else:
        runs = itertools.groupby(sub_tiles(spec), lambda tile: tile.first_byte)
        for i, (first, run) in enumerate(runs):
            yield CodeBlock((Load(str(i), first),), tuple(part(tile) for tile in run))


def _word_block(spec: StreamSpec) -> CodeBlock:
    """Return how codes of several channels are read: parts hold the i-th channels of words.

    Codes of 6 bits are stored as low bits, two codes a byte, and high bits, four codes a byte.
    """
    codes_a_byte = 1 if spec.bits == 8 else 2
    width, quarter = spec.num_codes // codes_a_byte, spec.num_codes // 4
    loads: tuple[Load, ...] = (Load("0", 0),)
    if spec.bits == 6:
        loads += (Load("0_high", width, 0, quarter),)
    parts = tuple(
        Part(f"{run}_{i}", run * width * spec.block + i, width, 0, 0, spec.block)
        for run in range(codes_a_byte)
        for i in range(spec.block)
    )
    return CodeBlock(loads, parts)


def _three_bit_tiles(spec: StreamSpec) -> Iterator[tuple[SubTile, ...]]:
    """Yield runs of four sub-tiles that share bytes of low bits: the first D / 4 bytes of a row.

    Byte j of these holds channels j + p D / 4. Their high bits are in byte j modulo D / 8 of the
    rest, at bit 2 p, or at 2 p + 1 if j is in the upper half.
    """
    row = spec.head_dim // 4
    group = spec.group if spec.axis == "token" else spec.head_dim
    width = math.gcd(row, group)
    for first in range(0, row, width):
        channels = [p * row + first for p in range(4)]
        yield tuple(SubTile(first, 2 * p, c, width, c // group) for p, c in enumerate(channels))
