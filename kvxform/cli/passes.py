"""`kvxform passes`: which passes there are, what they promise and what they take."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvxform.cli.lowerings import print_lowerings
from kvxform.cli.options import Json
from kvxform.cli.output import print_json, print_table, talk

if TYPE_CHECKING:
    from kvxform.pass_base import GraphPass

Targets = Annotated[
    bool, typer.Option("--targets", help="List instead what each lowering can run.")
]


def run(targets: Targets = False, json: Json = False) -> None:
    """List the passes: name, contract, options and source of the method.

    Those of installed packages too; one that cannot be loaded is named on stderr with the reason.
    """
    if targets:
        print_lowerings(json)
        return
    from kvxform.pass_lookup import OURS, find_pass, list_passes

    origins = list_passes()
    found = [describe(find_pass(each.name)) for each in origins if not each.error]
    named = {each.name: each for each in origins}
    broken = [dataclasses.asdict(each) for each in origins if each.error]
    for entry in found:
        entry["origin"] = named[entry["name"]].origin
    if json:
        print_json([*found, *broken])
        return
    heads = ["name", "contract", "options", "source"]
    rows = [_row(entry) for entry in found]
    if any(entry["origin"] != OURS for entry in found):  # only then is the column worth its width
        heads.append("from")
        rows = [[*row, e["origin"]] for row, e in zip(rows, found, strict=True)]
    print_table(heads, rows)
    for entry in broken:
        talk(entry["error"])


def _row(entry: dict[str, Any]) -> list[str]:
    """Return a line of the table for a pass that can be used."""
    from kvxform.explain.pass_text import short_value

    options = [f"{o['name']}={short_value(o['default'])}" for o in entry["options"]]
    return [entry["name"], entry["contract"], ", ".join(options) or "-", entry["source"]]


def describe(cls: type[GraphPass]) -> dict[str, Any]:
    """Return plain data about a pass."""
    from kvxform.explain.passes import default_of

    options = [
        {"name": f.name, "type": str(f.type), "default": default_of(f)}
        for f in dataclasses.fields(cls)
    ]
    return {
        "name": cls.pass_name(),
        "contract": cls.numerics.exactness.value,
        "metric": cls.numerics.metric,
        "bound": cls.numerics.bound,
        "about": " ".join((cls.__doc__ or "").split("\n\n")[0].split()),
        "options": options,
        "source": cls.source,
    }
