"""The kernels of a program as files: one for each distinct spec, and an index that names them.

They are for people to read. What runs is always emitted anew; the copies in an artifact are only
compared with it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
from importlib import metadata
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from kvxform.atomic import atomic_folder
from kvxform.codegen.triton.capability import check_program
from kvxform.codegen.triton.emit import emit, triton_version
from kvxform.codegen.triton.sites import kernel_specs
from kvxform.errors import ArtifactError
from kvxform.ir.program import Program
from kvxform.ir.schema import canonical_json

INDEX = "kvxform.json"  # the name by which `atomic_folder` knows an output of ours
FOLDER = "kernels"  # of an artifact


class _Index(BaseModel):
    """What of an index is read again."""

    model_config = ConfigDict(strict=True)
    made_with: dict[str, str]


def kernel_files(program: Program, *, interpret: bool = False) -> dict[str, str]:
    """Return the text of every kernel of a program by file name, and the index.

    Args:
        program: A program with a cache.
        interpret: As for `emit`.

    Raises:
        CodegenError: KVX401 if this lowering cannot run the plan.
    """
    check_program(program)
    assert program.plan is not None, "checked by `capability`"
    files: dict[str, str] = {}
    sites: dict[str, dict[str, Any]] = {}  # those that share all files are one entry
    for layer, site in kernel_specs(program).items():
        sources = {kind: emit(spec, interpret=interpret) for kind, spec in site.by_kind.items()}
        files.update({f"{source.name}.py": source.text for source in sources.values()})
        names = {kind: f"{source.name}.py" for kind, source in sources.items()}
        spec = site.gather.site
        entry = {"layout": spec.layout, "bytes_per_token": spec.bytes_per_token, "files": names}
        sites.setdefault(str(names), {**entry, "layers": []})["layers"].append(layer)
    index = {
        "made_with": made_with(),
        "bytes_per_token": program.plan.bytes_per_token,
        "sites": list(sites.values()),
    }
    return dict(sorted(files.items())) | {INDEX: canonical_json(index).decode()}


def write_kernels(program: Program, folder: Path, *, interpret: bool = False) -> list[Path]:
    """Write the kernels of a program into a folder, which is replaced as a whole.

    Returns:
        Paths of the files, the index last.

    Raises:
        CodegenError: KVX401 if this lowering cannot run the plan.
        ArtifactError: KVX601 if `folder` holds something else.
    """
    files = kernel_files(program, interpret=interpret)
    with atomic_folder(folder) as temporary:
        for name, text in files.items():
            (temporary / name).write_text(text, encoding="utf-8")
    return [folder / name for name in files]


def artifact_kernels(program: Program) -> dict[str, str]:
    """Return the files of `kernel_files` under their paths in an artifact."""
    return {f"{FOLDER}/{name}": text for name, text in kernel_files(program).items()}


def check_kernels(program: Program, folder: Path) -> None:
    """Compare the kernels in the artifact `folder`, if any, with those that would run.

    Kernels that another version of kvxform, Triton or ruff has made are not compared.

    Raises:
        ArtifactError: KVX602 if one differs, is missing, or belongs to no site.
    """
    saved = folder / FOLDER
    if not saved.is_dir() or _made_with(saved / INDEX) != made_with():
        return
    expected = kernel_files(program)
    found = {path.name: path.read_bytes() for path in saved.iterdir() if path.is_file()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name, "").encode() != found.get(name, b""):
            raise ArtifactError(
                "KVX602",
                "kernels in an artifact must be those that its plan gives",
                where=f"{FOLDER}/{name}",
                hint="save the model again; to change a kernel, change the recipe",
            )


def _made_with(index: Path) -> dict[str, str]:
    try:
        return _Index.model_validate_json(index.read_bytes()).made_with
    except (OSError, ValidationError) as error:
        raise ArtifactError(
            "KVX602", "an artifact with kernels must have their index", where=f"{FOLDER}/{INDEX}"
        ) from error


def made_with() -> dict[str, str]:
    """Return versions of all that the text of a kernel depends on, besides its spec."""
    versions = {name: metadata.version(name) for name in ("kvxform", "ruff")}
    return {**versions, "triton": triton_version(), "generator": _generator_hash()}


@functools.cache
def _generator_hash() -> str:
    """Return a hash of the sources of this package, templates included."""
    digest = hashlib.sha256()
    package = importlib.resources.files("kvxform.codegen.triton")
    for file in (*_files(package, ".py"), *_files(package / "templates", ".jinja")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _files(folder: Traversable, ending: str) -> list[Traversable]:
    found = [item for item in folder.iterdir() if item.name.endswith(ending)]
    return sorted(found, key=lambda item: item.name)
