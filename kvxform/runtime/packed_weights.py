"""What an int4 package is compared with: a model of the same weights, products of the same kind.

Weights of few bits are other weights than those of the program, and products on the CPU round their
activations to 8 bits. To find a fault of the graph behind that, the eager side gets the unpacked
weights, and the package a copy whose products take activations as they are.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kvxform.codegen.onnx.forms import Form
from kvxform.runtime.onnx_files import MODEL

if TYPE_CHECKING:
    from kvxform.runtime.model import OptimizedModel

LEVEL = "accuracy_level"


@contextlib.contextmanager
def comparable(
    model: OptimizedModel, package: Path, form: Form, *, is_unpacked: bool = False
) -> Iterator[tuple[OptimizedModel, Path]]:
    """Yield a model and a folder that must be alike if `package` is `model`.

    Args:
        model: What the package was made from.
        package: Its folder.
        form: What it is.
        is_unpacked: Whether the weights of the model are the unpacked ones already.
    """
    if form.weights == "source":
        yield model, package
        return
    from kvxform.codegen.onnx.weights import unpacked_program
    from kvxform.runtime.model import OptimizedModel

    program = model.program if is_unpacked else unpacked_program(model.program)
    leader = OptimizedModel(program, report=model.report)
    with tempfile.TemporaryDirectory(dir=package) as place:
        folder = Path(place)
        for path in sorted(p for p in package.iterdir() if p.is_file()):
            _put(path, folder)
        (folder / MODEL).unlink()
        _write_exact(package / MODEL, folder / MODEL)
        yield leader, folder


def _put(path: Path, folder: Path) -> None:
    """Give a folder a file of another one, without a copy where the file system can."""
    try:
        os.link(path, folder / path.name)
    except OSError:
        shutil.copyfile(path, folder / path.name)


def _write_exact(source: Path, target: Path) -> None:
    """Copy a graph; its products take activations in the dtype of the model."""
    import onnx

    model = onnx.load(str(source), load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == LEVEL:
                attribute.i = 0
    target.write_bytes(model.SerializeToString())
