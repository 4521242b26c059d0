"""Scorecards as the rows of one table, sorted by true bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

HEADINGS = (
    "format", "bits", "bits at 1k", "perplexity", "change", "decoded", "KL", "top-1",
    "attention", "passkey", "KiB at 1k",
)  # fmt: skip
NUMBERS = tuple(range(1, len(HEADINGS)))  # columns aligned to the right
Card = Mapping[str, Any]


def table_rows(cards: Sequence[Card]) -> list[tuple[str, ...]]:
    """Return the cells of scorecards under `HEADINGS`, fewest true bits last; the source first.

    Args:
        cards: What `QualityRun.measure` returned; parts may be missing.
    """
    return [_cells(card) for card in sorted(cards, key=order)]


def order(card: Card) -> tuple[bool, float, str]:
    """Return the sort key of a scorecard."""
    footprint = card["footprint"]
    bits = 0.0 if footprint is None else -footprint["bits_short"]
    return footprint is not None, bits, card["name"]


def _cells(card: Card) -> tuple[str, ...]:
    footprint, prefill, decode = card["footprint"], card.get("prefill"), card.get("decode")
    attention = card.get("attention")
    compared = prefill or decode  # peers have no meaningful prefill
    return (
        card["name"],
        _number(footprint and footprint["bits_long"], ".2f"),
        _number(footprint and footprint["bits_short"], ".2f"),
        _number(prefill and prefill["perplexity"], ".3f"),
        _number(change(prefill), "+.2%"),
        _number(change(decode), "+.2%"),
        _number(compared and compared["kl"], ".4f"),
        _number(compared and compared["top1_agreement"], ".1%"),
        _number(attention and attention["mean"], ".5f"),
        passkey_cell(card.get("passkeys") or ()),
        _number(footprint and footprint["bytes_short"] / 1024, ".0f"),
    )


def change(result: Card | None) -> float | None:
    """Return the relative change of perplexity against the reference, or None."""
    if result is None or result["reference_perplexity"] is None:
        return None
    ratio: float = result["perplexity"] / result["reference_perplexity"]
    return ratio - 1


def passkey_cell(passkeys: Sequence[Card]) -> str:
    """Return the share of numbers that were found, by length: `1k 100%, 4k 60%`."""
    return ", ".join(f"{one['length'] / 1024:.3g}k {one['rate']:.0%}" for one in passkeys)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
