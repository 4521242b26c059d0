"""`kvxform passes`: which passes there are, what they promise and what they take."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from kvxform.cli.options import Json
from kvxform.cli.output import print_json, print_table

if TYPE_CHECKING:
    from kvxform.pass_base import GraphPass


def run(json: Json = False) -> None:
    """List the passes: name, contract, options and source of the method."""
    import kvxform.passes  # noqa: F401  (fills the registry)
    from kvxform.pass_base import PASSES

    described = [describe(PASSES[name]) for name in sorted(PASSES)]
    if json:
        print_json(described)
        return
    rows = [
        (
            entry["name"],
            entry["contract"],
            ", ".join(f"{o['name']}={_short(o['default'])}" for o in entry["options"]) or "-",
            entry["source"],
        )
        for entry in described
    ]
    print_table(("name", "contract", "options", "source"), rows)


def describe(cls: type[GraphPass]) -> dict[str, Any]:
    """Return plain data about a pass."""
    options = [
        {"name": f.name, "type": str(f.type), "default": _plain_default(f)}
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


def _plain_default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        value = field.default
    if value is dataclasses.MISSING:
        return "required"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value


def _short(default: Any) -> str:
    """Return a default as recipes write it."""
    if default is None:
        return "auto"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, dict):
        inner = ", ".join(f"{key}: {_short(value)}" for key, value in default.items())
        return f"{{{inner}}}"
    return str(default)
