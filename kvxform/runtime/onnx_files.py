"""Checks of an ONNX package on disk, before the runtime sees it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvxform.atomic import safe_join
from kvxform.errors import ArtifactError
from kvxform.ir.checksums import hash_file, is_sealed

if TYPE_CHECKING:
    import onnx_ir as ir

MODEL, DESCRIPTION = "model.onnx", "kvxform.json"
PACKAGE_VERSION = 2
MODEL_KEYS = {"vocab_size", "eos_token_ids", "pad_token_id", "context_length"}
REMAKE = "copy the folder again or make it again"


def check_package(folder: Path, *, is_edited: bool = False) -> dict[str, Any]:
    """Check that a package is whole and return its description.

    Args:
        folder: The package.
        is_edited: Whether files may be other than they were written, as long as they fit together.

    Raises:
        ArtifactError: KVX601 for missing, KVX602 for damaged files, KVX603 for a reference that
            leaves the folder, KVX604 for another version.
    """
    import onnx_ir  # brings sympy, most of a second

    description = _read_description(folder)
    path = _existing(folder, MODEL)
    if not is_edited:
        _check_seals(folder, description)
    try:
        model = onnx_ir.load(path)
        tensors = list(_external_tensors(model))
    except Exception as error:  # protobuf and onnx_ir have errors of many kinds
        raise _damaged(MODEL, "the file cannot be read") from error
    for tensor in tensors:
        location = str(tensor.location)
        size = _existing(folder, location).stat().st_size
        needed = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
        if size < needed:
            raise _damaged(location, f"{size} bytes where {needed} are needed")
    return description


def _check_seals(folder: Path, description: dict[str, Any]) -> None:
    """Check the hash of the description, and of all files that it names."""
    if not is_sealed(description) or not isinstance(description.get("files"), dict):
        raise _damaged(DESCRIPTION, "entries are not as they were written")
    for name, digest in description["files"].items():
        if hash_file(_existing(folder, name)) != digest:
            raise _damaged(name, "bytes are not as they were written")


def _external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """Yield every reference to another file, of initialisers and of constants in nodes."""
    from onnx_ir import ExternalTensor

    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ExternalTensor):
                yield value.const_value
        for node in graph:
            for attribute in node.attributes.values():
                if isinstance(attribute.value, ExternalTensor):
                    yield attribute.value


def _read_description(folder: Path) -> dict[str, Any]:
    try:
        data = json.loads(_existing(folder, DESCRIPTION).read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(DESCRIPTION, "no JSON") from error
    if not isinstance(data, dict) or not isinstance(data.get("version"), int):
        raise _damaged(DESCRIPTION, "no version")
    if data["version"] != PACKAGE_VERSION:
        raise ArtifactError(
            "KVX604",
            f"the version of a package must be {PACKAGE_VERSION}",
            where=DESCRIPTION,
            got=data["version"],
            hint="export the model again",
        )
    model, onnx = data.get("model"), data.get("onnx")
    if not isinstance(model, dict) or not isinstance(onnx, dict):
        raise _damaged(DESCRIPTION, "parts are missing")
    if not model.keys() >= MODEL_KEYS or not isinstance(onnx.get("padding"), bool):
        raise _damaged(DESCRIPTION, "entries are missing")
    return data


def _existing(folder: Path, name: str) -> Path:
    path = safe_join(folder, name)
    if not path.is_file():
        raise ArtifactError(
            "KVX601", f"an ONNX package must have {name}", got=str(folder), hint=REMAKE
        )
    return path


def _damaged(name: str, got: str) -> ArtifactError:
    return ArtifactError(
        "KVX602", "a file of an ONNX package must be whole", where=name, got=got, hint=REMAKE
    )
