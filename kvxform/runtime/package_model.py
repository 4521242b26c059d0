"""The eager form of an ONNX package, from the program and the weights inside it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from kvxform.atomic import is_artifact
from kvxform.errors import ArtifactError
from kvxform.runtime.model import OptimizedModel
from kvxform.runtime.onnx_files import DESCRIPTION, MODEL, REMAKE, check_package
from kvxform.runtime.onnx_program import PackageWeights, package_program


def is_package(folder: Path) -> bool:
    """Return whether a folder is an ONNX package of ours, and no artifact that holds one."""
    return all((folder / name).is_file() for name in (MODEL, DESCRIPTION)) and not is_artifact(
        folder
    )


def load_package_model(folder: Path) -> OptimizedModel:
    """Return the model that a package was made from; packed weights come unpacked.

    Args:
        folder: What `export_onnx` wrote.

    Raises:
        ArtifactError: KVX601, KVX602, KVX603 and KVX604 as `check_package`; KVX602 too if a weight
            that the program reads is not in the package.
    """
    import onnx_ir

    description = check_package(folder)
    program = package_program(onnx_ir.load(folder / MODEL), description)
    weights = program.weights
    assert isinstance(weights, PackageWeights), "the weights of a package"
    read = {str(node.target) for node in program.graph.nodes if node.op == "get_attr"}
    missing = sorted(name for name in read if not weights.holds(name))
    if missing:
        rule = "a package must have the values of every weight that its program reads"
        raise ArtifactError("KVX602", rule, where=MODEL, got=missing[0], hint=REMAKE)
    return OptimizedModel(dataclasses.replace(program, weights=weights.load()))
