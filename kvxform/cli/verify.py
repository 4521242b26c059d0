"""`kvxform verify`: does the cache of a finished model hold what it must, however tokens arrive."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kvxform.cli.options import Json
from kvxform.cli.output import print_data, print_json, print_table

if TYPE_CHECKING:
    from kvxform.verify.results import Comparison, Verification

EXIT_NO = 1
Artifact = Annotated[
    str,
    typer.Argument(
        metavar="ARTIFACT", help="Folder that `kvxform optimize` wrote, or an ONNX package."
    ),
]
Source = Annotated[
    str | None,
    typer.Option("--source", help="The MODEL it was made from, to compare with that too."),
]
Schedules = Annotated[
    str | None,
    typer.Option(
        "--schedules", help="Keys with commas between, as decode,beam-fork; all by default."
    ),
]
Lowering = Annotated[
    str | None,
    typer.Option("--lowering", help="eager, triton or onnx; by default that of the recipe."),
]


def run(
    artifact: Artifact,
    source: Source = None,
    schedules: Schedules = None,
    lowering: Lowering = None,
    json: Json = False,
) -> int:
    """Check logits, cache, lengths and bytes of an artifact in every schedule."""
    from kvxform.verifying import verify_artifact

    keys = None if schedules is None else [key.strip() for key in schedules.split(",")]
    found = verify_artifact(artifact, source=source, schedules=keys, lowering=lowering)
    if json:
        print_json(found.to_data())
    else:
        _print(found)
    return 0 if found.is_fine else EXIT_NO


def _print(found: Verification) -> None:
    print_data(f"{found.name}, {found.lowering}, {found.dtype}, against {found.reference}")
    rows, last = [], ""
    for line in found.comparisons:
        rows.append(("" if line.schedule == last else line.schedule, *_cells(line)))
        last = line.schedule
    columns = ("schedule", "compared", "worst", "bound", "", "where")
    print_table(columns, rows, right=(2, 3))
    for key, reason in found.left_out.items():
        print_data(f"not run: {key}, {reason}")
    wrong = len(list(found.failures()))
    print_data(f"{wrong} of {len(rows)} comparisons failed" if wrong else "everything holds")


def _cells(line: Comparison) -> tuple[str, str, str, str, str]:
    worst = "" if line.error is None else f"{line.error:.1e}"
    bound = "" if line.bound is None else f"{line.bound:.0e}"
    if line.error is None and line.bound is None:
        bound = "equal"
    verdict = "FAILED" if not line.is_fine else "measured" if bound == "" else "ok"
    return line.compared, worst, bound, verdict, line.at
