"""What `repro.py` of a repro folder runs: the saved part, its inputs, the steps."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors.torch import load_file, save_file
from torch import tensor

from kvxform.bisecting.outcomes import Limits, final_plan, run_passes, with_calibration
from kvxform.errors import KvxformError
from kvxform.ir.artifact import load_program, save_program
from kvxform.ir.program import Program
from kvxform.order import PlannedPass
from kvxform.pass_base import PASSES, GraphPass
from kvxform.recipe import build_pass, load_recipe
from kvxform.runtime.model import OptimizedModel
from kvxform.verify.probe import Probe
from kvxform.verify.prober import Prober

PROGRAM, INPUTS = "program", "inputs.safetensors"
FIXED = "KVX210"  # a pass that no longer applies does no harm


def save_case(folder: Path, program: Program, probe: Probe) -> None:
    """Write a program and its inputs into an existing folder."""
    (folder / PROGRAM).mkdir()
    save_program(program, folder / PROGRAM)
    inputs = {"input_ids": probe.input_ids.contiguous(), "lengths": tensor(probe.lengths)}
    save_file(inputs, folder / INPUTS)


def read_case(folder: Path) -> tuple[Program, Probe]:
    """Return what `save_case` wrote.

    Raises:
        ArtifactError: KVX601 missing, KVX602 damaged, KVX603 unsafe path, KVX604 other version.
    """
    inputs = load_file(folder / INPUTS)
    probe = Probe(inputs["input_ids"], tuple(inputs["lengths"].tolist()))
    return load_program(folder / PROGRAM), probe


def replay(program: Program, steps: Sequence[Any], limits: Limits, probe: Probe) -> str:
    """Return how the last of some passes fails on a program, or nothing if it is right.

    Args:
        program: A program without a cache.
        steps: Passes as recipes write them.
        limits: Bounds for the last one, beside its contract; see `outcomes.require_limits`.
        probe: Inputs.

    Raises:
        KvxformError: What keeps the last pass from being tried.
    """
    passes = plan_data(steps)
    program = with_calibration(program, passes)
    prober = Prober(program, OptimizedModel, final_plan(program, passes), probe)
    try:
        found = run_passes(program, passes, prober, limits)
    except KvxformError as error:
        if error.code == FIXED:
            return ""
        raise
    if found is None:
        return "a pass before the last one fails"
    return "" if found.failure is None else found.failure.text


def plan_data(steps: Sequence[Any]) -> list[PlannedPass]:
    """Return passes as recipes write them, built."""
    recipe = load_recipe({"version": 1, "name": "repro", "passes": list(steps)})
    return [PlannedPass(step, build_pass(step)) for step in recipe.passes]


def load_passes(place: str, folder: Path, step: Any) -> None:
    """Import a module, and let the pass of `step` be the one that it defines.

    Args:
        place: Name of an installed module, a .py file, or nothing if kvxform has the pass.
        folder: Where a relative file is looked for.
        step: The pass at fault, as recipes write it; other passes of the module are left alone.

    Raises:
        KvxformError: KVX801 if there is no such file, or no such pass in it.
    """
    if not place:
        return
    module = _run_file(folder / place) if place.endswith(".py") else importlib.import_module(place)
    name = step if isinstance(step, str) else next(iter(step))
    for value in list(vars(module).values()):
        is_own = isinstance(value, type) and value.__module__ == module.__name__
        if is_own and issubclass(value, GraphPass) and value.pass_name() == name:
            PASSES[name] = value
            return
    rule = f"the file must define the pass {name}"
    raise KvxformError("KVX801", rule, where="repro", got=place)


def _run_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        rule = "passes must come from a Python file"
        raise KvxformError("KVX801", rule, where="repro", got=str(path))
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module
