"""`kvxform lock`: write down what a build is, to be committed and checked in CI."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvxform.cli.options import CalibrationFile, Json, Lowering, OptionalRecipe, Verify
from kvxform.cli.output import print_json, talk

Source = Annotated[
    str, typer.Argument(metavar="SOURCE", help="Artifact folder, or a MODEL with --recipe.")
]
Out = Annotated[Path, typer.Option("--out", "-o", help="File to write.")]
Measured = Annotated[
    Verify, typer.Option("--verify", help="What is measured whenever the lock is checked.")
]


def run(
    source: Source,
    recipe: OptionalRecipe = None,
    out: Out = Path("kvxform.lock"),
    lowering: Lowering = None,
    calibration: CalibrationFile = None,
    verify: Measured = Verify.probe,
    json: Json = False,
) -> None:
    """Build a model and write its lock: graph, plan, contracts and a digest of its outputs."""
    from kvxform.locks.building import Builder, make_build
    from kvxform.locks.files import write_lock
    from kvxform.locks.making import make_lock

    build = make_build(
        source,
        recipe,
        out.parent,
        lowering=lowering,
        verify=verify.value,
        calibration=calibration,
    )
    lock = make_lock(Builder().build(build, out.parent), build=build)
    size = write_lock(lock, out)
    if json:
        print_json({"lock": str(out), "bytes": size, "model": lock.model, "recipe": lock.recipe})
    else:
        talk(f"kvxform: wrote {out}, {size} bytes; commit it, and check it: kvxform check {out}")
