"""`kvxform passes`: which passes there are, what they promise and what they take."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvxform.cli.lowerings import print_lowerings
from kvxform.cli.options import Json
from kvxform.cli.output import print_json, print_table

if TYPE_CHECKING:
    from kvxform.pass_base import GraphPass

Targets = Annotated[
    bool, typer.Option("--targets", help="List instead what each lowering can run.")
]


def run(targets: Targets = False, json: Json = False) -> None:
    """List the passes: name, contract, options and source of the method."""
    if targets:
        print_lowerings(json)
        return
    import kvxform.passes  # noqa: F401  (fills the registry)
    from kvxform.explain.pass_text import short_value
    from kvxform.pass_base import PASSES

    described = [describe(PASSES[name]) for name in sorted(PASSES)]
    if json:
        print_json(described)
        return
    rows = [
        (
            entry["name"],
            entry["contract"],
            ", ".join(f"{o['name']}={short_value(o['default'])}" for o in entry["options"]) or "-",
            entry["source"],
        )
        for entry in described
    ]
    print_table(("name", "contract", "options", "source"), rows)


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
