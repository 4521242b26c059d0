"""Tables of the ONNX benchmarks, as Markdown; nothing here needs a runtime or a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from results import Row, format_table

BASELINE = "huggingface"
NAMES = {
    "huggingface": "Hugging Face, eager",
    "plain": "`torch.onnx.export`",
    "l1": "kvxform L1, float32 cache",
    "l3": "kvxform L3, float32 cache",
    "l3-int8": "kvxform L3, int8 cache",
    "l3-int4": "kvxform L3, int4 cache",
    "builder-fp32": "GenAI's builder, float32 cache",
    "builder-int8": "GenAI's builder, int8 cache",
    "builder-int4": "GenAI's builder, int4 cache",
    "genai-l3-int8": "kvxform L3, int8 cache, in GenAI",
}


def cpu_table(rows: Sequence[Row]) -> str:
    """Return tokens per second and memory of every model, and how often the baseline."""
    done = [row for row in rows if "contexts" in row]
    contexts = sorted({int(c) for row in done for c in row["contexts"]})
    prompts = [c for c in contexts if any("prefill" in at(row, c) for row in done)]
    base = next((row for row in done if row["name"] == BASELINE), None)
    header = [
        "",
        *(f"prefill {size(c)}" for c in prompts),
        *(f"decode {size(c)}" for c in contexts),
        *(f"peak MB {size(c)}" for c in contexts[-1:]),
        *(f"cache MB {size(c)}" for c in contexts[-1:]),
    ]
    lines = [
        [
            NAMES.get(row["name"], row["name"]),
            *(speed(row, base, c, "prefill") for c in prompts),
            *(speed(row, base, c, "decode") for c in contexts),
            *(megabytes(at(row, c), "peak") for c in contexts[-1:]),
            *(megabytes(at(row, c), "cache") for c in contexts[-1:]),
        ]
        for row in done
    ]
    failed = [(NAMES.get(r["name"], r["name"]), r["error"]) for r in rows if "error" in r]
    notes = "".join(f"\n\n{name}: {error}" for name, error in failed)
    return format_table(header, lines) + notes


def at(row: Row, context: int) -> Mapping[str, Any]:
    """Return what a row has at a context."""
    found: Mapping[str, Any] = row["contexts"].get(str(context), {})
    return found


def speed(row: Row, base: Row | None, context: int, what: str) -> str | None:
    """Return tokens per second, and how many times the baseline that is."""
    own = at(row, context).get(what)
    if own is None:
        return None
    other = at(base, context).get(what) if base is not None else None
    text = f"{own['median']:.{0 if own['median'] >= 100 else 1}f}"
    return text if other is None else f"{text} ({own['median'] / other['median']:.2f}x)"


def megabytes(found: Mapping[str, Any], what: str) -> str | None:
    """Return megabytes of one kind of memory."""
    value = found.get("memory", {}).get(what)
    return None if value is None else f"{value / 1e6:.0f}"


def size(tokens: int) -> str:
    """Return a length as it is said."""
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)
