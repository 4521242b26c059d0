"""How `append` cuts a tile of tokens into tensors, and the statements that join them again.

A tile holds some tokens of one head. Its channels are cut into *parts* of one width, a power of
two, each a tensor of its own in the emitted text. All codes of a part have the same place in the
bytes (layout `rows`) or 16-bit halves (`fragment`) that they are packed into, and one scale. So
packing joins whole parts, element by element, for every head_dim.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

from kvxform.codegen.triton import fragment, fragment_levels
from kvxform.codegen.triton.spec import AppendSpec, RopeSpec, StreamSpec

PARTS_PER_BYTES = {2: 4, 3: 8, 4: 2, 8: 1}  # parts that a row has at least, by bits of a code
FLUSH_TOKENS = 32  # tokens of a tile that leaves the ring while one token is appended


@dataclass(frozen=True)
class Packed:
    """Bytes of a row that are made of the same codes of several parts.

    Attributes:
        first_byte: First of the bytes.
        expression: The bytes, a Python expression of int32.
    """

    first_byte: int
    expression: str


@dataclass(frozen=True)
class StreamText:
    """What the templates need to know of the K or the V half.

    Part i holds runs of `run` neighbouring channels: the first starts at channel `i * run`, the
    next ones `run * parts` channels further each. Where a code stands for a block of channels, part
    i holds the i-th channels of all blocks.

    Attributes:
        name: `key` or `value`.
        letter: `k` or `v`.
        spec: How it is stored.
        width: Channels of a part.
        run: Neighbouring channels of a part; all of it with layout `rows` and codes of one channel.
        label: Suffix of its quantiser: empty if K and V have the same.
        is_fragment: Whether pages are in fragment order.
        rope: RoPE of new tokens, or None.
        block: Hadamard block of new tokens, or 0.
        has_signs: Channels are multiplied by signs before the Hadamard.
    """

    name: str
    letter: str
    spec: StreamSpec
    width: int
    run: int
    label: str
    is_fragment: bool
    rope: RopeSpec | None = None
    block: int = 0
    has_signs: bool = False

    @property
    def parts(self) -> int:
        """Parts of a head."""
        return self.spec.head_dim // self.width

    @property
    def channel(self) -> str:
        """Channels of part 0, a Python expression of int32 `[width]`."""
        element = f"tl.arange(0, {self.width})"
        if self.run == 1:
            return f"{element} * {self.parts}"
        if self.parts == 1 or self.width == self.run:
            return element
        return f"{element} % {self.run} + {element} // {self.run} * {self.run * self.parts}"

    @property
    def channels(self) -> str:
        """Channels of part 0 as a row, a Python expression of int32 `[1, width]`."""
        return (
            f"{self.channel}[None, :]" if self.run == self.width else f"({self.channel})[None, :]"
        )

    @property
    def is_ring(self) -> bool:
        """Whether newest tokens are kept exact."""
        return self.spec.capacity > 0

    @property
    def is_signed(self) -> bool:
        """Whether tiles hold tokens from before the new ones, with indices below zero."""
        return self.is_ring or self.is_fragment

    @property
    def is_rotated(self) -> bool:
        """Whether new tokens are turned before they are stored."""
        return bool(self.rope or self.block)

    @property
    def joins_codes(self) -> bool:
        """Whether codes of one tensor are packed with each other."""
        return self.spec.block > 1 and self.spec.bits < 8

    @property
    def has_extremes(self) -> bool:
        """Whether scales are found from the extremes of channels of a token."""
        return self.spec.has_scale and self.spec.axis == "token"

    @property
    def has_row(self) -> bool:
        """Whether there are exact buffers, by row of the session."""
        return bool(self.spec.sink or self.is_ring)

    @property
    def arguments(self) -> list[str]:
        """Arguments of device functions that read new tokens."""
        rope = ["cos", "sin"] if self.rope else []
        return [self.letter, f"{self.letter}_stride", *rope, *(["signs"] if self.has_signs else [])]

    @property
    def encoding(self) -> list[str]:
        """Arguments of device functions that encode new tokens too."""
        heads = [f"{self.letter}_head_stride"] if self.has_site_norm else []
        return [*self.arguments, *heads, *([self.book] if self.book else [])]

    @property
    def has_site_norm(self) -> bool:
        """Whether tokens are divided by their norm over all KV heads."""
        return self.spec.token_norm == "site"

    @property
    def book(self) -> str:
        """Name of the tensor of words, or empty if a code stands for one channel."""
        return f"{self.name}_book" if self.spec.block > 1 else ""

    @property
    def planes(self) -> list[str]:
        """Pools of the body, by name."""
        return [f"{self.name}_{plane.name}" for plane in self.spec.planes]

    @property
    def exact(self) -> list[str]:
        """Exact buffers, by name."""
        sink = [f"{self.name}_sink"] if self.spec.sink else []
        return sink + ([f"{self.name}_recent"] if self.is_ring else [])

    @property
    def buffers(self) -> list[str]:
        """Tensors of the cache that encoding reads or writes; a ring has its own sink writer."""
        exact = [f"{self.name}_recent"] if self.is_ring else self.exact
        return self.planes + exact

    @property
    def groups(self) -> list[list[int]]:
        """Parts that share a scale, group by group; single parts on the channel axis."""
        if self.spec.group == self.spec.head_dim and self.spec.axis == "token":
            return [list(range(self.parts))]
        size = self.spec.group // self.width if self.spec.axis == "token" else 1
        return [list(range(i, i + size)) for i in range(0, self.parts, size)]

    @property
    def stages(self) -> list[list[str]]:
        """Statements of each stage of the Hadamard, from neighbouring channels on."""
        count = self.block.bit_length() - 1 if self.block else 0
        return [self._stage(1 << i) for i in range(count)]

    def _stage(self, step: int) -> list[str]:
        """Return the stage that joins channels `step` apart: between parts, or inside each."""
        across = self.run * self.parts
        if self.run <= step < across:
            apart = step // self.run
            pairs = [(i, i + apart) for i in range(self.parts) if not i & apart]
            return [f"x{a}, x{b} = x{a} + x{b}, x{a} - x{b}" for a, b in pairs]
        inner = step if step < self.run else step // across * self.run
        return [f"x{i} = butterfly(x{i}, {inner})" for i in range(self.parts)]

    @property
    def packed(self) -> list[Packed]:
        """Bytes of a row of codes; the layout of `kvxform.codecs.packing`."""
        if self.spec.bits == 6:
            rest = self.spec.num_codes // 2
            return [Packed(0, "join_two(code0 & 15, 4)"), Packed(rest, "join_four(code0 >> 4, 2)")]
        if self.spec.block > 1:
            return [Packed(0, "join_two(code0, 4)" if self.spec.bits == 4 else "code0")]
        if self.spec.bits != 3:
            return self._pack(self.spec.bits, 0, joined_codes)
        low_bytes = self.spec.head_dim // 4
        low, high = functools.partial(joined_bits, "&", 3), functools.partial(joined_bits, ">>", 2)
        return self._pack(2, 0, low) + self._pack(1, low_bytes, high)

    def _pack(
        self, bits: int, first_byte: int, join: Callable[[list[str], int], str]
    ) -> list[Packed]:
        rows = self.parts * bits // 8  # parts of bytes
        packed = []
        for row in range(rows):
            codes = [f"code{row + i * rows}" for i in range(8 // bits)]
            packed.append(Packed(first_byte + row * self.width, join(codes, bits)))
        return packed

    @property
    def half(self) -> str:
        """The 16-bit halves of words that all parts make, a Python expression of int32."""
        return joined_codes([f"code{i}" for i in range(self.parts)], self.spec.bits)

    @property
    def midpoints(self) -> list[float]:
        """Bounds between neighbouring entries of the table."""
        table = self.spec.table
        return [(a + b) / 2 for a, b in itertools.pairwise(table)]

    @property
    def has_mirrored_table(self) -> bool:
        """Whether codes are found by magnitudes: a table without a scale, equal but for signs."""
        table = self.spec.table
        is_long = len(table) > 4 and not self.spec.has_scale and not self.book
        return is_long and fragment_levels.is_symmetric(table)

    @property
    def table_peak(self) -> float:
        """Largest magnitude in the table."""
        return max(abs(entry) for entry in self.spec.table)

    @property
    def tile_tokens(self) -> int | None:
        """Tokens of a tile where the format decides it, else None."""
        return self.spec.tokens_per_group if self.spec.axis == "channel" else None

    @property
    def flush_tokens(self) -> int:
        """Tokens of a tile that is encoded when one token is appended."""
        if self.tile_tokens is not None:
            return self.tile_tokens
        return min(FLUSH_TOKENS, 1 << (self.spec.chunk - 1).bit_length())

    @property
    def flush_tiles(self) -> int:
        """Tiles that are encoded at most when one token is appended."""
        return -(-self.spec.chunk // self.flush_tokens)


def joined_codes(codes: list[str], bits: int) -> str:
    """Return the integer with `codes` side by side; they are whole float32 numbers, as it is."""
    joined = codes[0]
    for i, code in enumerate(codes[1:], start=1):
        joined = f"tl.fma({code}, {2.0 ** (bits * i)}, {joined})"
    return f"as_integer({joined})"


def joined_bits(operator: str, operand: int, codes: list[str], bits: int) -> str:
    """Return the integer with `code operator operand` of codes side by side."""
    terms = [f"(as_integer({code}) {operator} {operand})" for code in codes]
    return " | ".join([terms[0], *(f"({term} << {bits * i})" for i, term in enumerate(terms) if i)])


def make_streams(spec: AppendSpec) -> tuple[StreamText, StreamText]:
    """Return what the templates need to know of K and of V."""
    key, value = spec.site.key, spec.site.value
    same = quantiser(key) == quantiser(value) or not (key.is_coded and value.is_coded)
    key_label, value_label = ("", "") if same else ("_key", "_value")
    is_fragment = spec.site.layout == "fragment"
    sizes = fragment_sizes if is_fragment else row_sizes
    k = StreamText("key", "k", key, *sizes(key), key_label, is_fragment)
    k = dataclasses.replace(k, rope=spec.rope, block=spec.key_block, has_signs=spec.has_signs)
    return k, StreamText("value", "v", value, *sizes(value), value_label, is_fragment)


def quantiser(stream: StreamSpec) -> tuple[object, ...]:
    """Return what the scales and codes of a group depend on, besides its values."""
    zero = stream.zero if stream.has_zero else ""
    bounds = (stream.clip, stream.include_zero)
    return (stream.bits, zero, stream.table, stream.block, stream.has_scale, *bounds)


def row_sizes(stream: StreamSpec) -> tuple[int, int]:
    """Return width and run of a part: the largest power of two that fits all that cuts rows."""
    if stream.block > 1:
        return stream.num_codes, 1
    widths = [stream.head_dim]
    if stream.is_coded:
        widths.append(stream.head_dim // PARTS_PER_BYTES[stream.bits])
        if stream.axis == "token":
            widths.append(stream.group)
    common = math.gcd(*widths)
    return common & -common, common & -common


def fragment_sizes(stream: StreamSpec) -> tuple[int, int]:
    """Return width and run of a part: the channels that have the same place in 16-bit halves."""
    codes_of_half = 16 // stream.bits
    return stream.head_dim // codes_of_half, fragment.BLOCK
