"""`kvxform eval`: one target's perplexity and KL divergence, or a table of many cache formats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvxform.cli.options import (
    CalibrationFile,
    Json,
    OptionalRecipe,
    ProtocolName,
    RunProvider,
    Target,
)
from kvxform.cli.output import print_json, print_table, progress_bar
from kvxform.cli.quality import TableRequest, run_table
from kvxform.cli.targets import check_source, need_tokenizer, open_target

TextFile = Annotated[
    Path | None,
    typer.Option("--text", help="UTF-8 file; default: help topics of the standard library."),
]
Window = Annotated[int, typer.Option("--window", help="Tokens of one window.")]
Windows = Annotated[int, typer.Option("--windows", help="Number of windows.")]
ProtocolOption = Annotated[
    ProtocolName, typer.Option("--protocol", help="One call per window, or token by token.")
]
Reference = Annotated[
    str | None, typer.Option("--reference", help="Source model to compare with, as MODEL.")
]
Recipes = Annotated[
    str | None,
    typer.Option("--recipes", help="Formats to compare in one table, with commas between; or all."),
]
DecodeWindow = Annotated[
    int, typer.Option("--decode-window", help="Table: tokens of a window decoded one by one.")
]
Passkey = Annotated[
    str, typer.Option("--passkey", help="Table: lengths of passkey prompts, commas between.")
]
Device = Annotated[str | None, typer.Option("--device", help="Table: where to run, as cuda.")]
Plot = Annotated[Path | None, typer.Option("--plot", help="Table: an SVG to write.")]


def run(
    target: Target,
    recipe: OptionalRecipe = None,
    text: TextFile = None,
    window: Window = 1024,
    windows: Windows = 6,
    protocol: ProtocolOption = ProtocolName.quantized_prefill,
    reference: Reference = None,
    recipes: Recipes = None,
    calibration: CalibrationFile = None,
    decode_window: DecodeWindow = 128,
    passkey: Passkey = "1024",
    device: Device = None,
    plot: Plot = None,
    provider: RunProvider = None,
    json: Json = False,
) -> None:
    """Measure perplexity on a text: of one target, or of many cache formats in one table."""
    if recipes is not None:
        options = (text, calibration, window, windows, decode_window, passkey, device, plot, json)
        run_table(TableRequest(check_source(target, recipe), recipes, *options))
        return
    from kvxform.evaluate.perplexity import evaluate
    from kvxform.evaluate.runners import make_runner
    from kvxform.texts import encode_text, read_text

    words = read_text(text)
    opened = open_target(target, recipe, calibration=calibration, provider=provider)
    token_ids = encode_text(need_tokenizer(opened.tokenizer, target), words)
    other = None if reference is None else make_runner(open_target(reference, None).model, window)
    with progress_bar("windows", windows) as advance:
        result = evaluate(
            make_runner(opened.model, window),
            token_ids,
            window=window,
            windows=windows,
            protocol=protocol.value,
            reference=other,
            progress=advance,
        )
    source = "help topics of the standard library" if text is None else str(text)
    data = {"target": target, "recipe": recipe, "text": source, **result.to_dict()}
    if json:
        print_json(data)
        return
    rows = [(key.replace("_", " "), _show(value)) for key, value in data.items()]
    print_table(("what", "value"), [row for row in rows if row[1]])


def _show(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if value > 0.01 else f"{value:.3g}"
    return "" if value is None else str(value)
