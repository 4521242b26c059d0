"""`kvxform optimize`: run a recipe on a model and write an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvxform.cli.options import (
    CalibrationFile,
    Json,
    Lowering,
    Model,
    Out,
    RecipeName,
    Verify,
    VerifyLevel,
)
from kvxform.cli.output import format_bytes, print_json, print_table, talk
from kvxform.cli.packages import (
    LevelName,
    Logits,
    Opset,
    Provider,
    Runtime,
    Weights,
    asked_for,
    say_step,
)
from kvxform.errors import KvxformError

if TYPE_CHECKING:
    from kvxform.recipe import Recipe
    from kvxform.report import Report

KvScalesFile = Annotated[
    Path | None,
    typer.Option(
        "--kv-scales",
        help="Static scales of K and V, a kv_cache_scale_file of GenAI; default: calibrated ones.",
    ),
]
Onnx = Annotated[bool, typer.Option("--onnx", help="Write an ONNX package too, into OUT/onnx.")]


def run(
    model: Model,
    recipe: RecipeName,
    out: Out,
    lowering: Lowering = None,
    onnx: Onnx = False,
    level: LevelName = None,
    opset: Opset = None,
    provider: Provider = None,
    runtime: Runtime = None,
    logits: Logits = None,
    weights: Weights = None,
    calibration: CalibrationFile = None,
    kv_scales: KvScalesFile = None,
    verify: VerifyLevel = Verify.probe,
    json: Json = False,
) -> None:
    """Rewrite a model by a recipe, verify it and write an artifact."""
    import kvxform
    from kvxform.atomic import check_replaceable

    check_replaceable(out)  # before the work, not after it
    given = asked_for(level, opset, provider, runtime, logits, weights)
    if given and not onnx:
        rule, got = "options of packages need --onnx", ", ".join(f"--{name}" for name in given)
        raise KvxformError("KVX801", rule, got=got, hint="add --onnx, or use export")
    asked = _asked_recipe(recipe, kv_scales, given)
    optimized = kvxform.optimize(
        model, asked, calibration=calibration, target=lowering, verify=verify.value
    )
    optimized.save(out)
    if optimized.report.needs_training:
        talk(f"kvxform: {optimized.report.training_hint(str(out), model)}")
    files = {"artifact": str(out), "report": str(out / "report.html")}
    if onnx:
        from kvxform.runtime.exporting import ExportCheck, recipe_options

        options = recipe_options(optimized).changed(**given)
        check: ExportCheck = "none" if verify is Verify.none else "probe"
        package = optimized.export_onnx(out / "onnx", options, verify=check, progress=say_step)
        files["onnx"] = str(package)
    data = {**summarize(optimized.report), "files": files}
    if json:
        print_json(data)
    else:
        print_table(("what", "value"), summary_rows(data))


def _asked_recipe(name: str, kv_scales: Path | None, package: dict[str, Any]) -> Recipe:
    """Return a recipe with the scales of a file, and options of a package if that is its target."""
    from kvxform.ir.kv_scales import read_kv_scales
    from kvxform.recipe import for_package, load_recipe
    from kvxform.recipe_scales import with_kv_scales

    recipe = load_recipe(name)
    if kv_scales is not None:
        recipe = with_kv_scales(recipe, read_kv_scales(kv_scales))
    is_for_onnx = package and recipe.target.lowering == "onnx"
    return for_package(recipe, package) if is_for_onnx else recipe


def summarize(report: Report) -> dict[str, Any]:
    """Return the main figures of a report as plain data."""
    final, plan = report.final, report.plan
    data: dict[str, Any] = {
        "model": report.source.name,
        "recipe": report.recipe["name"],
        "passes": [p.name for p in report.passes],
        "sites_raised": report.source.sites_raised,
        "sites_rejected": len(report.source.sites_rejected),
    }
    if report.calibration is not None:
        data["calibration"] = report.calibration
    if plan is not None:
        data["bytes_per_token_before"] = plan.kv_bytes_per_token_before
        data["bytes_per_token"] = plan.kv_bytes_per_token
        data["bits_per_value"] = plan.bits_per_value
    if final is not None:
        data |= {"max_abs": final.max_abs, "kl": final.kl, "top1_agreement": final.top1}
    return data


def summary_rows(data: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the figures of `summarize` as rows for people."""
    rejected = f", {data['sites_rejected']} rejected" if data["sites_rejected"] else ""
    rows = [
        ("model", data["model"]),
        ("recipe", data["recipe"]),
        ("passes", " ".join(data["passes"])),
        ("attention sites", f"{data['sites_raised']} raised{rejected}"),
    ]
    if "calibration" in data:
        rows.append(("calibrated on", data["calibration"]))
    if "bytes_per_token" in data:
        before, after = data["bytes_per_token_before"], data["bytes_per_token"]
        rows += [
            ("cache per token", f"{format_bytes(before)} (16 bit) -> {format_bytes(after)}"),
            ("true bits per value", f"{data['bits_per_value']:.2f}"),
        ]
    if "kl" in data:
        rows += [
            ("logits, max difference", f"{data['max_abs']:.2e} (probe inputs)"),
            ("KL to the source", f"{data['kl']:.2e} nats per token (probe inputs)"),
            ("same greedy token", f"{data['top1_agreement']:.1%} (probe inputs)"),
        ]
    return [*rows, *data["files"].items()]
