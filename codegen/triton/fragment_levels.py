"""Machine code that looks up levels: packed codes to float16, without memory.

`prmt` picks four of eight bytes by four nibbles, so registers are tables. Levels are multiplied by
`UNIT` first: they are coordinates of unit vectors, and norms times weights stay float16 that way.
"""

from __future__ import annotations

import struct

from kvxform.codegen.triton.spec import StreamSpec

UNIT = 8.0
BITS = (2, 4)


def is_symmetric(table: tuple[float, ...]) -> bool:
    """Whether the upper half of a table is the lower one with other signs."""
    return all(a == -b for a, b in zip(table, reversed(table), strict=True))


def unpack_lines(stream: StreamSpec) -> tuple[int, list[str]]:
    """Return how many outputs `unpack` has, and its lines of PTX.

    The two words after the outputs hold codes as `fragment` says. Output j of a word is a pair of
    float16: code j of the low and of the high 16 bits.
    """
    outputs = 32 // stream.bits
    make = _two_bits if stream.bits == 2 else _four_bits
    lines = []
    for word in range(2):
        lines += make(stream.table, word * outputs // 2, f"${outputs + word}")
    return outputs, lines


def _two_bits(table: tuple[float, ...], first: int, word: str) -> list[str]:
    """Return lines for 16 codes: a byte of nibbles c and c + 4 picks both bytes of entry c."""
    low, high = _bytes(table)
    lines = [f"prmt.b32 t0, {word}, 0, 0x3120;"]  # codes 0 to 3 of both halves, then 4 to 7
    for j in range(8):
        shift = 2 * j if j < 4 else 8 + 2 * j
        source = "t1" if shift else "t0"
        lines += [f"shr.b32 t1, t0, {shift};"] if shift else []
        lines += [
            f"and.b32 t1, {source}, 0x0303;",
            "mad.lo.u32 t1, t1, 0x11, 0x4040;",
            f"prmt.b32 ${first + j}, {_hex(low)}, {_hex(high)}, t1;",
        ]
    return lines


def _four_bits(table: tuple[float, ...], first: int, word: str) -> list[str]:
    """Return lines for 8 codes: the place in the upper half of the table, then the sign."""
    low, high = _bytes(table[8:])
    tables = {"p": low, "q": high}
    lines = [
        f"not.b32 t0, {word};",
        "and.b32 t0, t0, 0x88888888;",  # codes below zero
        "shr.b32 t1, t0, 3;",
        "sub.u32 t1, t0, t1;",  # 7 for each of these: their order is reversed
        f"lop3.b32 t1, {word}, 0x77777777, t1, 0x6A;",
        "prmt.b32 t1, t1, 0, 0x3120;",  # codes 0 and 1 of both halves, then 2 and 3
        "shr.b32 t2, t1, 16;",
    ]
    for name, content in tables.items():
        pair = f"{_hex(content[:4])}, {_hex(content[4:])}"
        lines += [f"prmt.b32 {name}0, {pair}, t1;", f"prmt.b32 {name}1, {pair}, t2;"]
    for j in range(4):
        output, shift, selector = f"${first + j}", 12 - 4 * j, ("0x6240", "0x7351")[j % 2]
        lines += [f"shl.b32 t3, t0, {shift};"] if shift else []
        lines += [
            f"prmt.b32 {output}, p{j // 2}, q{j // 2}, {selector};",
            f"lop3.b32 {output}, {output}, {'t3' if shift else 't0'}, 0x80008000, 0x78;",
        ]
    return lines


def _bytes(levels: tuple[float, ...]) -> tuple[bytes, bytes]:
    """Return the low and the high bytes of levels in float16."""
    packed = struct.pack(f"<{len(levels)}e", *(level * UNIT for level in levels))
    return packed[::2], packed[1::2]


def _hex(content: bytes) -> str:
    return f"0x{int.from_bytes(content, 'little'):08X}"
