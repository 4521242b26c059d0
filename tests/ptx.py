"""Instructions of PTX, one at a time, on 32-bit registers: what inline assembly computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

ALL_BITS = 0xFFFFFFFF


def run_instruction(line: str, registers: dict[str, int]) -> None:
    """Run one instruction without its semicolon; operands are registers or numbers."""
    name, _, rest = line.partition(" ")
    target, *texts = [operand.strip() for operand in rest.split(",")]
    if name == ".reg":
        return
    values = [registers[t] if t in registers else int(t, 0) for t in texts]
    registers[target] = OPERATIONS[name](*values) & ALL_BITS


def _permute(low: int, high: int, selector: int) -> int:
    octets = low.to_bytes(4, "little") + high.to_bytes(4, "little")
    places = [selector >> (4 * i) & 15 for i in range(4)]
    assert max(places) < 8, "bit 3 of a selector repeats a sign"
    return int.from_bytes(bytes(octets[place] for place in places), "little")


def _look_up(a: int, b: int, c: int, table: int) -> int:
    places = [(a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1) for i in range(32)]
    return sum((table >> place & 1) << i for i, place in enumerate(places))


OPERATIONS: dict[str, Callable[..., int]] = {
    "and.b32": lambda a, b: a & b,
    "not.b32": lambda a: ~a,
    "shl.b32": lambda a, b: a << b,
    "shr.b32": lambda a, b: a >> b,
    "sub.u32": lambda a, b: a - b,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "prmt.b32": _permute,
    "lop3.b32": _look_up,
}


def run_lines(lines: Sequence[str], registers: dict[str, int]) -> None:
    """Run lines that end in semicolons."""
    for line in lines:
        run_instruction(line.rstrip(";"), registers)
