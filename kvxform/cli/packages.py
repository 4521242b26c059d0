"""Options of ONNX packages on the command line, and the table of levels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvxform.cli.output import talk

if TYPE_CHECKING:
    from kvxform.ir.program import Program
    from kvxform.onnx_options import OnnxOptions

LevelName = Annotated[
    str | None,
    typer.Option("--level", help="L0 to L5; default: that of the recipe, or the best legal one."),
]
Opset = Annotated[
    int | None, typer.Option("--opset", help="Opset of the package, 18 to 25; default: by level.")
]
Provider = Annotated[
    str | None,
    typer.Option("--provider", help="cpu or cuda, for which the package is made; default: cpu."),
]
Runtime = Annotated[
    str | None,
    typer.Option("--runtime", help="ONNX Runtime that the package must run in; default: 1.31."),
]
Logits = Annotated[
    str | None,
    typer.Option("--logits", help="all new tokens, or the last of each row; default: all."),
]
Weights = Annotated[
    str | None,
    typer.Option("--weights", help="source, or int4 for matrices of 4 bits; default: source."),
]
Levels = Annotated[
    bool, typer.Option("--levels", help="Print which levels are legal and why; write nothing.")
]


def asked_for(
    level: str | None,
    opset: int | None,
    provider: str | None,
    runtime: str | None,
    logits: str | None,
    weights: str | None,
) -> dict[str, Any]:
    """Return the options of a package that were given, checked before any work.

    Raises:
        CodegenError: KVX403 for a value that means nothing.
    """
    every = {
        "level": level,
        "opset": opset,
        "provider": provider,
        "runtime": runtime,
        "logits": logits,
        "weights": weights,
    }
    given = {name: value for name, value in every.items() if value is not None}
    if given:
        from kvxform.codegen.onnx.forms import OnnxOptions, check_options

        check_options(OnnxOptions().changed(**given))
    return given


def say_step(step: str) -> None:
    """Tell what an export does now."""
    talk(f"kvxform: {step}")


def level_table(program: Program, options: OnnxOptions) -> dict[str, Any]:
    """Return every level with the reason against it, and the form that an export would have.

    Raises:
        CodegenError: KVX401 if no level can express the program.
    """
    import dataclasses

    from kvxform.codegen.onnx.capability import check_plan
    from kvxform.codegen.onnx.forms import check_options, choose_form, legal_levels
    from kvxform.codegen.onnx.levels import LEVELS

    check_options(options)
    check_plan(program, options.provider)
    reasons = legal_levels(program, options)
    rows = [
        {"level": level, "about": LEVELS[level].about, "legal": reason is None, "reason": reason}
        for level, reason in reasons
    ]
    is_legal = any(row["legal"] for row in rows if options.level in (None, row["level"]))
    form = dataclasses.asdict(choose_form(program, options)) if is_legal else None
    return {"levels": rows, "form": form}


def level_rows(table: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the table as rows for people."""
    chosen = (table["form"] or {}).get("level")
    words = {True: "yes", False: "no: "}
    return [
        (
            row["level"],
            row["about"],
            words[row["legal"]] + (row["reason"] or "") + (", taken" * (row["level"] == chosen)),
        )
        for row in table["levels"]
    ]
