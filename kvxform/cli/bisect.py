"""`kvxform bisect`: the pass that breaks a recipe, the site, and a small graph that shows it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvxform.cli.options import CalibrationFile, Json, Model, RecipeName
from kvxform.cli.output import print_data, print_json, print_table
from kvxform.formats import plain_number

if TYPE_CHECKING:
    from kvxform.bisecting.records import BisectResult

EXIT_FOUND = 1
SHOWN = 5  # sites at fault that are listed
SHOWN_CHANGES = 10  # things that the pass changes

MaxKl = Annotated[
    float | None,
    typer.Option("--max-kl", help="Bound instead of those of the recipe: KL to the source, nats."),
]
MinTop1 = Annotated[
    float | None, typer.Option("--min-top1", help="The same: share of equal greedy tokens.")
]
MaxRelative = Annotated[
    float | None,
    typer.Option("--max-relative", help="The same: largest difference over the largest logit."),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Folder for a script that shows the fault on its own."),
]


def run(
    model: Model,
    recipe: RecipeName,
    out: Out = None,
    max_kl: MaxKl = None,
    min_top1: MinTop1 = None,
    max_relative: MaxRelative = None,
    calibration: CalibrationFile = None,
    json: Json = False,
) -> int:
    """Find the pass that breaks a recipe, the site where it does, and a graph that shows it."""
    import kvxform

    bounds = {"max_kl": max_kl, "min_top1": min_top1, "max_relative": max_relative}
    given = {name: limit for name, limit in bounds.items() if limit is not None}
    found = kvxform.bisect(model, recipe, bound=given or None, out=out, calibration=calibration)
    if json:
        print_json(found.to_data())
    else:
        _print(found)
    return 0 if found.is_clean else EXIT_FOUND


def _print(found: BisectResult) -> None:
    rows = [
        (
            stage.name,
            plain_number(stage.relative),
            plain_number(stage.kl),
            "FAILS" if stage.is_failing else "",
        )
        for stage in found.stages
    ]
    print_table(("pass", "logits vs before", "KL to source", ""), rows, right=(1, 2))
    print_data("")
    for line in report_lines(found):
        print_data(line)


def report_lines(found: BisectResult) -> list[str]:
    """Return what was found as lines for people."""
    if found.is_clean:
        return [f"No pass of {found.recipe} fails on {found.model}."]
    lines = [found.failure, found.where]
    for culprit in found.culprits[:SHOWN] if len(found.culprits) > 1 else ():
        place = culprit.module or f"match {culprit.matches[0]}"
        lines.append(f"  {place}: {culprit.failure or 'cannot be tried alone'}")
    if len(found.culprits) > SHOWN:
        lines.append(f"  and {len(found.culprits) - SHOWN} more")
    part = found.subgraph
    if part is not None:
        words = "operation shows" if part.nodes == 1 else "operations show"
        lines.append(f"{part.nodes} of {part.nodes_before} {words} it, at {part.output}.")
        lines += [f"  {change}" for change in part.changes[:SHOWN_CHANGES]]
        if len(part.changes) > SHOWN_CHANGES:
            lines.append(f"  and {len(part.changes) - SHOWN_CHANGES} more")
    if found.note:
        lines.append(f"Note: {found.note}.")
    if found.repro is not None:
        lines.append(f"Run it: python {found.repro / 'repro.py'}")
    return lines
