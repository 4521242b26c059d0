"""`kvxform.json`: everything that a package was made from, but for values of weights.

`program` is as in the `program.json` of an artifact. There, `stored` of a weight names the
initialiser that holds it; `.T` at its end means that it is stored transposed, `.int4` and the like
that it is packed, in three initialisers. `folded` has the values of weights that are in no
initialiser, since other constants were made from them. `onnx` is the form, which the runner reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from kvxform.codecs.base import dtype_name
from kvxform.codegen.onnx.builder import TRANSPOSED
from kvxform.codegen.onnx.capability import takes_padding
from kvxform.codegen.onnx.forms import Form
from kvxform.codegen.onnx.nbits import PARTS
from kvxform.codegen.onnx.weights import WeightStore
from kvxform.ir.artifact import encode_program
from kvxform.ir.program import Program
from kvxform.pass_base import PASSES

PACKAGE_VERSION = 2


def describe(model: ir.Model, program: Program, recipe: Any, form: Form) -> dict[str, Any]:
    """Return the content of `kvxform.json`, but for the hashes of the other files.

    Args:
        model: The graph.
        program: What it was made from.
        recipe: A `kvxform.recipe.Recipe`, or None.
        form: What the package is.
    """
    assert program.plan is not None, "checked"
    info = dataclasses.asdict(program.info)
    info |= {"name": model_name(program), "tokenizer_path": None}  # no places on this machine
    table = _weight_table(program, WeightStore.of(program, form.weights))
    return {
        "version": PACKAGE_VERSION,
        "model": info,
        "passes": list(program.passes),
        "facts": program.facts.changed(),
        "recipe": None if recipe is None else recipe.to_data(),
        "seeds": {} if recipe is None else _seeds(recipe),
        "plan": program.plan.to_json(),
        "sites": [{"layer": s.layer, "module": s.module} for s in program.sites],
        "program": {**encode_program(program), "info": info, "weights": table},
        "folded": _folded(model, program, table),
        "rejected": [dataclasses.asdict(r) for r in program.rejected],
        "onnx": {
            **dataclasses.asdict(form),
            "ir_version": model.ir_version,
            "padding": takes_padding(program.plan),
        },
    }


def model_name(program: Program) -> str:
    """Return the name of the model; of a path only its last part, for files must not differ."""
    return Path(program.info.name).name


def _seeds(recipe: Any) -> dict[str, Any]:
    """Return the seed of every step that has one, also where the recipe leaves it to the pass."""
    calibration = getattr(recipe, "calibration", None)
    seeds: dict[str, Any] = {} if calibration is None else {"calibration": calibration.seed}
    for place, step in enumerate(recipe.passes):
        fields = getattr(PASSES.get(step.name), "__dataclass_fields__", {})
        if "seed" in fields:
            seeds[f"{place}:{step.name}"] = step.options.get("seed", fields["seed"].default)
    return seeds


def _weight_table(program: Program, store: WeightStore) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "dtype": dtype_name(weight.dtype),
            "shape": list(weight.shape),
            "stored": store.name(name) + _suffix(store, name),
        }
        for name, weight in program.weights.items()
    }


def _suffix(store: WeightStore, name: str) -> str:
    """Return the end of the name of an initialiser that says how a weight is stored."""
    packing = store.packing(name)
    if packing is not None:
        return packing.suffix
    return TRANSPOSED if store.is_transposed(name) else ""


def _folded(
    model: ir.Model, program: Program, table: Mapping[str, Mapping[str, Any]]
) -> dict[str, list[float]]:
    stored = {name.removesuffix(f".{PARTS[0]}") for name in model.graph.initializers}
    read = {str(node.target) for node in program.graph.nodes if node.op == "get_attr"}
    missing = sorted(name for name in read if table[name]["stored"] not in stored)
    return {name: program.weights[name].double().flatten().tolist() for name in missing}
