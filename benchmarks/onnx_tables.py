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
    done = [row for row in rows if row.get("contexts")]
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


GPU_NAMES = {
    "l1-fp16": "L1 `Attention`, fp16",
    "l2-int4": "L2 `Attention` over unpacked bytes, int4",
    "l3-fp16": "L3 `GroupQueryAttention`, fp16",
    "l3-int8": "L3 `GroupQueryAttention`, int8",
    "l3-int4": "L3 `GroupQueryAttention`, int4",
    "l4-fp16": "L4 `PagedAttention`, fp16",
    "l4-int8": "L4 `PagedAttention`, int8",
    "l4-int4": "L4 `PagedAttention`, int4",
    "triton-fp16": "our Triton kernels, fp16",
    "triton-int8": "our Triton kernels, int8",
    "triton-int4": "our Triton kernels, int4",
}


def gpu_table(rows: Sequence[Row]) -> str:
    """Return microseconds of a decode step, a column for each shape."""
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    table: dict[str, dict[str, str]] = {}
    notes: dict[str, str] = {}
    for row in rows:
        name = GPU_NAMES.get(row["name"], row["name"])
        cells = table.setdefault(name, {})
        if "error" in row:
            notes.setdefault(name, row["error"])
            cells[row["shape"]] = "-"
        else:
            cells[row["shape"]] = f"{row['step_us']:.0f}"
    lines = [[name, *(cells.get(shape) for shape in shapes)] for name, cells in table.items()]
    said = "".join(f"\n\n{name}: {error}" for name, error in notes.items())
    return format_table(["us a step", *shapes], lines) + said


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


def parse_shape(shape: str) -> tuple[int, int]:
    """Return rows and tokens of `8x32k`."""
    rows, tokens = shape.split("x")
    thousands = tokens.endswith("k")
    return int(rows), int(tokens.removesuffix("k")) * (1024 if thousands else 1)
