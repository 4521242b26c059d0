"""Types of graph values: dtype and shape, with symbolic sizes as text.

The symbols are `B` (batch), `S` (new tokens) and expressions of them such as `B*S`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

_SHORT = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b8",
    torch.complex64: "c64",
    torch.complex128: "c128",
}
_LONG = {short: dtype for dtype, short in _SHORT.items()}
_TENSOR = re.compile(r"^([a-z]+[0-9]+)\[(.*)\]$")


@dataclass(frozen=True)
class TensorType:
    """Dtype and shape of a tensor; a size is an int or the text of a symbolic expression."""

    dtype: torch.dtype
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        """Return the text form, for instance `f32[B, 9, S, 64]`."""
        return f"{_SHORT[self.dtype]}[{', '.join(str(n) for n in self.shape)}]"


@dataclass(frozen=True)
class SymType:
    """A run-time size, such as the batch size `B`."""

    expression: str

    def __str__(self) -> str:
        """Return the text form, for instance `sym(B)`."""
        return f"sym({self.expression})"


@dataclass(frozen=True)
class TupleType:
    """Several values returned by one operation."""

    items: tuple[TensorType | SymType, ...]

    def __str__(self) -> str:
        """Return the text form, items in parentheses."""
        return f"({', '.join(str(item) for item in self.items)})"


ValueType = TensorType | SymType | TupleType


def parse_type(text: str) -> ValueType:
    """Parse the text form of a type; the inverse of `str`.

    Raises:
        ValueError: If the text is not a type.
    """
    if text.startswith("(") and text.endswith(")"):
        items = tuple(parse_type(item) for item in _split(text[1:-1]))
        if any(isinstance(item, TupleType) for item in items):
            raise ValueError(f"nested tuple type: {text!r}")
        return TupleType(items)  # type: ignore[arg-type]
    if text.startswith("sym(") and text.endswith(")"):
        return SymType(text[4:-1])
    found = _TENSOR.match(text)
    if found is None or found[1] not in _LONG:
        raise ValueError(f"not a type: {text!r}")
    sizes = tuple(int(n) if n.lstrip("-").isdigit() else n for n in _split(found[2]))
    return TensorType(_LONG[found[1]], sizes)


def short_dtype(dtype: torch.dtype) -> str:
    """Return the short name of a dtype: `f32`, `bf16`, `i64`, ..."""
    return _SHORT[dtype]


def parse_dtype(text: str) -> torch.dtype:
    """Return the dtype with the short name `text`."""
    return _LONG[text]


def _split(text: str) -> list[str]:
    """Split at commas outside brackets."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "[(") - (char in "])")
        if char == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    tail = text[start:].strip()
    return [*parts, tail] if tail else parts
