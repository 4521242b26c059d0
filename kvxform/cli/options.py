"""Options that several verbs share."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer


class Verify(enum.StrEnum):
    """How much is measured while optimising."""

    none = "none"
    probe = "probe"
    full = "full"


class ProtocolName(enum.StrEnum):
    """How perplexity is measured; docs/cli.md says what each means."""

    quantized_prefill = "quantized-prefill"
    decode = "decode"


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="smollm2-135m, a Hugging Face folder, a .gguf file or FILE.py:FUNCTION.",
    ),
]
Target = Annotated[
    str, typer.Argument(metavar="TARGET", help="Artifact folder, ONNX package folder, or a MODEL.")
]
Exportable = Annotated[
    str, typer.Argument(metavar="TARGET", help="Artifact folder, or a MODEL with --recipe.")
]
RecipeName = Annotated[
    str, typer.Option("--recipe", "-r", help="Bundled name, or a .yaml or .json file.")
]
OptionalRecipe = Annotated[
    str | None,
    typer.Option("--recipe", "-r", help="Recipe, where TARGET is a MODEL."),
]
Lowering = Annotated[
    str | None,
    typer.Option("--lowering", help="eager, triton or onnx, instead of that of the recipe."),
]
RunProvider = Annotated[
    str | None,
    typer.Option("--provider", help="cpu or cuda, for a package; default: what it was made for."),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write; replaced as a whole.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
VerifyLevel = Annotated[
    Verify, typer.Option("--verify", help="What is measured against the source model.")
]
CalibrationFile = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        help="Text that passes take statistics from; default: help topics of the library.",
    ),
]
