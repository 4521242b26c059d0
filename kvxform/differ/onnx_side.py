"""ONNX as a side: how a file runs, and a program as the graph that it would be exported to."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from kvxform.diffing.numeric import Runs
from kvxform.diffing.outline_onnx import OnnxSide, export_side
from kvxform.ir.program import Program
from kvxform.order import PlannedPass
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.pipeline import apply_pass
from kvxform.recipe import PassStep
from kvxform.runtime.onnx_session import OnnxSession

CACHE_PASS = "insert-cache"


def package_logits(folder: Path) -> Runs:
    """Return what computes the logits `[B, S, vocab]` of a package, on empty caches."""
    session = OnnxSession(folder)

    def logits(input_ids: Tensor) -> Tensor:
        session.reset()
        return session.prefill(input_ids, all_logits=True)

    return logits


def as_exported(program: Program) -> OnnxSide:
    """Return the graph that a program would be exported to; a cache is inserted if it has none.

    Raises:
        CodegenError: KVX401 if it cannot be exported.
    """
    if program.plan is None:
        planned = PlannedPass(PassStep(CACHE_PASS), InsertCache())
        program, _ = apply_pass(program, planned)
    return export_side(program)
