"""Numbers as text: `format_*` for pages, `plain_*` for terminals and files, `rounded` for JSON."""

from __future__ import annotations

import math
from typing import Any

THIN = "\N{NARROW NO-BREAK SPACE}"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_LEAST, _MOST = 1e-3, 1e4  # numbers between them need no power of ten


def format_bytes(count: float) -> str:
    """Return a size: bytes below 64 KiB, then KiB, MiB, GiB with three digits."""
    if abs(count) < 64 * 1024:
        text = f"{count:,.0f}" if float(count).is_integer() else f"{count:,.1f}"
        return text.replace(",", THIN) + f"{THIN}B"
    power = min(int(math.log(abs(count), 1024)), 3)
    return f"{count / 1024**power:.3g}{THIN}{('B', 'KiB', 'MiB', 'GiB')[power]}"


def format_number(value: float | None) -> str:
    """Return three digits: `0.0123`, or `4.71 x 10^-7` in type below 1e-3."""
    if value is None:
        return "\N{EN DASH}"
    if not math.isfinite(value):
        return "∞" if value > 0 else str(value)
    if value == 0:
        return "0"
    if _LEAST <= abs(value) < _MOST:
        return f"{value:.3g}"
    digits, power = f"{value:.1e}".split("e")
    return f"{digits}{THIN}\N{MULTIPLICATION SIGN}{THIN}{power_of_ten(int(power))}"


def power_of_ten(power: int) -> str:
    """Return a power of ten: `1`, or `10^-7` in type."""
    return f"10{str(power).translate(_SUPERSCRIPTS)}" if power else "1"


def format_percent(value: float | None) -> str:
    """Return a share as a percentage: `4.2 %`."""
    if value is None:
        return "\N{EN DASH}"
    return f"{100 * value:.3g}{THIN}%"


def format_ratio(value: float) -> str:
    """Return how many times smaller or larger: `3.56`."""
    return f"{value:.2f}"


def plain_bytes(count: float) -> str:
    """Return `format_bytes` with plain spaces."""
    return format_bytes(count).replace(THIN, " ")


def plain_number(value: float | None) -> str:
    """Return three digits: `0.0123`, or `4.7e-07` below 1e-3; `-` for None."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    return f"{value:.3g}" if _LEAST <= abs(value) < _MOST else f"{value:.1e}"


def plain_count(value: float) -> str:
    """Return a whole number in groups of three digits: `23 040`."""
    return f"{value:,.0f}".replace(",", " ")


def plain_percent(value: float) -> str:
    """Return a share as a percentage; a share just below one is not rounded to it."""
    text = f"{100 * value:.3g}"
    return f"{'>99.9' if text == '100' and value < 1 else text} %"


def rounded(data: Any) -> Any:
    """Round every float to six significant digits, which is what measurements are good for.

    Whole numbers are counts and stay. Infinities and NaN become text: JSON has no numbers for them.
    """
    if isinstance(data, float):
        if not math.isfinite(data):
            return str(data)
        return data if data.is_integer() else float(f"{data:.6g}")
    if isinstance(data, dict):
        return {str(key): rounded(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [rounded(item) for item in data]
    return data


def plain_line(text: str) -> str:
    """Return text in one line without control characters, so that it is safe on a terminal."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)
