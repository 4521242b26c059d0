"""`kvxform plan`: what a recipe would do to the cache of a model, by arithmetic alone."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvxform.cli.options import Json, Lowering, Model, RecipeName
from kvxform.cli.output import format_bytes, plain_table, print_data, print_json

if TYPE_CHECKING:
    from kvxform.codecs.basis import Basis
    from kvxform.ir.plan import SitePlan
    from kvxform.ir.program import Program
    from kvxform.report import Report

Batch = Annotated[int, typer.Option("--batch", min=1, help="Sequences in the example.")]
Tokens = Annotated[int, typer.Option("--tokens", min=1, help="Cached tokens of each of them.")]


def run(
    model: Model,
    recipe: RecipeName,
    batch: Batch = 8,
    tokens: Tokens = 8192,
    lowering: Lowering = None,
    json: Json = False,
) -> None:
    """Print what a recipe would make of the cache; reads no weights once the model is known."""
    from kvxform.pipeline import plan_pipeline
    from kvxform.recipe import load_recipe, retarget

    loaded = load_recipe(recipe)
    if lowering is not None:
        loaded = retarget(loaded, lowering)
    program, report = plan_pipeline(captured_shapes(model), loaded)
    data = plan_data(program, report, batch, tokens)
    if json:
        print_json(data)
    else:
        print_data(plan_text(data))


def captured_shapes(model: str) -> Program:
    """Return the captured model, cached on disk; its weights may be shapes alone."""
    from kvxform.capture import capture
    from kvxform.ir.capture_cache import load_capture, save_capture
    from kvxform.progress import ProgressDisplay

    key = _source_key(model)
    program = load_capture(key) if key else None
    if program is None:
        with ProgressDisplay(True) as display:
            program = capture(model, progress=display.talk).program
        if key:
            save_capture(key, program)
    return program


def _source_key(model: str) -> str:
    """Return what a capture depends on: the model's files, our code and versions; else empty."""
    import kvxform
    from kvxform.capture.smollm2 import SMOLLM2, find_gguf

    path = find_gguf() if model == SMOLLM2 else Path(model).expanduser()
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    if not all(file.is_file() for file in files):
        return ""
    code = Path(kvxform.__file__).parent
    files += [path for name in ("capture", "ir") for path in sorted((code / name).glob("*.py"))]
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return json.dumps([model, stats, version("torch"), version("transformers")])


def plan_data(program: Program, report: Report, batch: int, tokens: int) -> dict[str, Any]:
    """Return the figures of a plan as plain data; bytes, bits and counts.

    Args:
        program: The rewritten program.
        report: Its report, not measured.
        batch: Sequences in the example.
        tokens: Cached tokens of each of them.
    """
    source, plan = report.source, program.plan
    passes = [
        {"name": p.name, "exactness": p.exactness, "matched": p.matched} for p in report.passes
    ]
    data: dict[str, Any] = {
        "model": source.name,
        "sites_raised": source.sites_raised,
        "sites_rejected": [{"module": m, "reason": r} for m, r in source.sites_rejected],
        "mixers": [{"module": m, "reason": r} for m, r in source.mixers],
        "geometries": _geometries(program),
        "passes": passes,
        "cache": None,
    }
    if plan is None:
        return data
    assert report.plan is not None, "it is a report of this plan"
    baseline = report.plan.kv_bytes_per_token_before
    read = report.plan.read_bytes_before / report.plan.cached_tokens
    data["cache"] = {
        "layout": str(plan.layout),
        "bytes_per_token": {"before": baseline, "after": plan.bytes_per_token},
        "bits_per_value": plan.bits_per_value,
        "batch": batch,
        "tokens": tokens,
        "total_bytes": {
            "before": baseline * batch * tokens,
            "after": plan.bytes_at([tokens] * batch, tokens),
        },
        "read_bytes_per_step": {
            "before": read * tokens,
            "after": plan.read_bytes_per_step(1, tokens),
        },
        "added_per_step": added_per_step(program),
        "extra_flops_per_token": plan.extra_flops_per_token(),
    }
    return data


def plan_text(data: dict[str, Any]) -> str:
    """Return the figures of a plan as text for people."""
    rejected = data["sites_rejected"]
    heads = "; ".join(data["geometries"])
    lines = [f"{data['sites_raised']} attention sites raised, {len(rejected)} rejected    {heads}"]
    lines += [f"  rejected: {site['module']}: {site['reason']}" for site in rejected]
    lines += [f"  not attention: {place['module']}: {place['reason']}" for place in data["mixers"]]
    cache = data["cache"]
    if cache is None:
        lines.append("no cache: the recipe has no insert-cache")
    else:
        lines += [_cost_table(cache), f"added per step: {cache['added_per_step']}"]
    for exactness, note in (
        ("exact", ""),
        ("approximate", " (measured after the pass)"),
        ("needs training", ""),
    ):
        names = [p["name"] for p in data["passes"] if p["exactness"] == exactness and p["matched"]]
        if names:
            lines.append(f"{exactness}: {' '.join(names)}{note}")
    return "\n".join(lines)


def _cost_table(cache: dict[str, Any]) -> str:
    length = _short_count(cache["tokens"])
    rows = []
    for label, key in (
        ("cache per token", "bytes_per_token"),
        (f"batch {cache['batch']} at {length}", "total_bytes"),
        (f"read per step ({length})", "read_bytes_per_step"),
    ):
        before, after = cache[key]["before"], cache[key]["after"]
        note = (
            f"{before / after:.2f}x smaller" if after <= before else f"{after / before:.2f}x larger"
        )
        if key == "bytes_per_token":
            note += f"    {cache['bits_per_value']:.2f} bits per value"
        rows.append((label, format_bytes(before), format_bytes(after), note))
    return plain_table(("", "before (16 bit)", "after", ""), rows, right=(1, 2))


def _geometries(program: Program) -> list[str]:
    """Return the head geometries of the sites in words, each once, in the order of layers."""
    words = (
        f"{s.num_q_heads} q heads / "
        + (
            f"one latent of {s.v_head_dim} + {s.head_dim - s.v_head_dim}"
            if s.payload == "latent"
            else f"{s.num_kv_heads} kv heads / d {s.head_dim}"
        )
        for s in program.sites
    )
    return list(dict.fromkeys(words))


def added_per_step(program: Program) -> str:
    """Return in words what the plan adds to a decode step."""
    plan = program.plan
    assert plan is not None, "only asked for a program with a cache"
    added = []
    for site in plan.sites:
        added += [
            f"one {stream.basis} on new {name[0]}, its inverse on every {name} that is read"
            for name, stream in site.streams.items()
            if stream.basis.inverse is not None
        ]
        if site.key.basis.inverse is None and site.key.basis.kind in ("hadamard", "matrix"):
            added.append(f"one {site.key.basis} on q and on new k")
        if site.key.makes_heads:
            added.append("K and V of all heads made from every input that is read")
        if site.key.rope == "pre":
            added.append("RoPE on every key that is read")
    if plan.layout.kind == "checkpoint":
        window = plan.layout.hot_window
        added.append(f"a prefill of all cached tokens but the last {window}, layer by layer")
    if any(_is_folded(plan.site(site.layer), site.v_basis) for site in program.sites):
        added.append("rotation of V folded into weights")
    return "; ".join(dict.fromkeys(added)) or "nothing"


def _is_folded(site: SitePlan, basis: Basis) -> bool:
    """Whether weights have absorbed the rotation of values."""
    value = site.streams.get("value")
    return basis.kind != "identity" and (value is None or value.basis.inverse is None)


def _short_count(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)
