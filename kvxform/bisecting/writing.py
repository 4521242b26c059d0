"""A folder that shows a fault without the rest of the model and without the recipe."""

from __future__ import annotations

import importlib.metadata
import inspect
import pprint
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from kvxform.atomic import atomic_folder
from kvxform.bisecting.changes import given_program
from kvxform.bisecting.outcomes import Limits
from kvxform.bisecting.records import BisectResult
from kvxform.bisecting.replaying import read_case, replay, save_case
from kvxform.bisecting.shrinking import Case
from kvxform.ir.schema import canonical_json
from kvxform.ir.text import format_program
from kvxform.pass_base import GraphPass

COPY = "passes_at_fault.py"


def is_shown_alone(case: Case, steps: Sequence[Any], limits: Limits) -> bool:
    """Whether a case still fails once it has been saved and read again."""
    with tempfile.TemporaryDirectory() as folder:
        save_case(Path(folder), case.program, case.probe)
        program, probe = read_case(Path(folder))
        return bool(replay(program, steps, limits, probe))


def write_repro(folder: Path, result: BisectResult, case: Case, limits: Limits) -> None:
    """Write a case with a script that runs it.

    Args:
        folder: Where to; see `atomic_folder`.
        result: What was found, with a subgraph.
        case: The part and its steps.
        limits: Bounds beside the contract, for the part.

    Raises:
        ArtifactError: KVX601 if `folder` holds something else.
    """
    place, source = pass_place(type(case.steps[-1].graph_pass))
    files = {"before.txt": format_program(given_program(case))}
    if case.found.program is not None:
        files["after.txt"] = format_program(case.found.program)
    if source is not None:
        files[COPY] = source
    values = {
        "result": result,
        "has_after": "after.txt" in files,
        "place": place,
        "limits": dict(limits),
    }
    files["repro.py"] = _render("repro.py.jinja", values)
    files["README.md"] = _render("README.md.jinja", values)
    with atomic_folder(folder) as temporary:
        save_case(temporary, case.program, case.probe)
        for name, text in files.items():
            (temporary / name).write_text(text, encoding="utf-8")
        data = {name: value for name, value in result.to_data().items() if name != "repro"}
        (temporary / "kvxform.json").write_bytes(canonical_json(data))


def pass_place(cls: type[GraphPass]) -> tuple[str, str | None]:
    """Return where `repro.py` finds a pass, and the text of the file if it needs a copy.

    Passes of kvxform need nothing, and those of an installed package are imported by name.
    """
    root = cls.__module__.split(".")[0]
    if root == "kvxform":
        return "", None
    if root in importlib.metadata.packages_distributions():
        return cls.__module__, None
    file = inspect.getsourcefile(cls)
    assert file is not None, "a class that is no built-in has a file"
    return COPY, Path(file).read_text(encoding="utf-8")


def _render(template: str, values: dict[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kvxform.bisecting", "."),
        autoescape=False,  # no HTML
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["python"] = lambda value: pprint.pformat(value, width=90, sort_dicts=False)
    return environment.get_template(template).render(**values)
