"""Write the graph of a package: weights one after the other, in memory never more than one.

A weight that lies in a mapped file is read while it is written, and its pages are given back
before the next one; one that is stored in another form (transposed, quantised) is made when it is
its turn. So an export needs the memory of the largest weight, however many there are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx_ir as ir

from kvxform.ir.checksums import hash_file, sealed
from kvxform.ir.program import Program
from kvxform.ir.schema import canonical_json
from kvxform.ir.store import WeightStore

MODEL, DATA, DESCRIPTION = "model.onnx", "model.onnx.data", "kvxform.json"
GENAI = "genai_config.json"
EMBEDDED_BYTES = 1024  # smaller constants stay in the graph file, where shape inference reads them


def write_model(model: ir.Model, program: Program, folder: Path) -> None:
    """Write `model.onnx` and `model.onnx.data`.

    Args:
        model: The graph, with tensors that may be lazy.
        program: Whose weights they are made from.
        folder: Where to.
    """
    store = program.store
    if store is None:
        store = WeightStore(folder)
        store.adopt(program.weights.values())

    def give_back(_tensor: ir.TensorProtocol, _place: ir.external_data.CallbackInfo) -> None:
        store.trim()

    ir.save(
        model,
        folder / MODEL,
        external_data=DATA,
        size_threshold_bytes=EMBEDDED_BYTES,
        callback=give_back,
    )


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write plain data; equal data gives equal bytes."""
    path.write_bytes(canonical_json(data))


def write_description(folder: Path, data: dict[str, Any]) -> None:
    """Write `kvxform.json` beside files that are complete, with the hash of each.

    `genai_config.json` has none: it is where users set options of GenAI.
    """
    names = sorted(p.name for p in folder.iterdir() if p.name not in (GENAI, DESCRIPTION))
    files = {name: hash_file(folder / name) for name in names}
    write_json(folder / DESCRIPTION, sealed({**data, "files": files}))


def amend_description(folder: Path, **entries: Any) -> None:
    """Put further entries into the `kvxform.json` of a package."""
    path = folder / DESCRIPTION
    write_json(path, sealed({**json.loads(path.read_bytes()), **entries}))
