"""Programs against ONNX files: is a file what its program exports to?

A package says which program it was exported from. That program is compared like any other, so that
changes are in the words of the dialect. No trust is put into it: the file is compared, operation by
operation, with the graph that the program would be exported to now, in the form of the file.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvxform.differ.sides import Side
from kvxform.diffing.align import align
from kvxform.diffing.outline import Outline
from kvxform.diffing.records import StructureDiff, WeightChange
from kvxform.diffing.structure import compare_outlines
from kvxform.diffing.weights import compare_weights
from kvxform.ir.program import Program
from kvxform.order import PlannedPass
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.pipeline import apply_pass
from kvxform.recipe import PassStep

if TYPE_CHECKING:
    from kvxform.codegen.onnx.forms import OnnxOptions
    from kvxform.diffing.outline_onnx import OnnxSide

CACHE_PASS = "insert-cache"


@dataclass(frozen=True)
class Graph:
    """A graph and what has its weights."""

    outline: Outline
    program: Program


@dataclass(frozen=True)
class ExportDiff:
    """What differs between files and exports, beyond what differs between the programs."""

    structures: tuple[StructureDiff, ...] = ()
    weights: tuple[WeightChange, ...] = ()

    def join(
        self, structure: StructureDiff, weights: tuple[WeightChange, ...]
    ) -> tuple[StructureDiff, tuple[WeightChange, ...]]:
        """Return the diff of the programs with these changes added."""
        joined = dataclasses.replace(
            structure,
            nodes=(*structure.nodes, *(n for s in self.structures for n in s.nodes)),
            ports=(*structure.ports, *(p for s in self.structures for p in s.ports)),
            histogram=(*structure.histogram, *(c for s in self.structures for c in s.histogram)),
        )
        return joined, tuple(dict.fromkeys((*weights, *self.weights)))


def graphs_of(a: Side, b: Side) -> tuple[Graph, Graph]:
    """Return both graphs in one form: the dialect, or ONNX if one side has no program.

    Raises:
        CodegenError: KVX401 if a program is to be compared with a file that is no package, and
            cannot be exported.
    """
    if a.program is not None and b.program is not None:
        return Graph(a.outline, a.program), Graph(b.outline, b.program)
    return _as_graph(_as_onnx(a)), _as_graph(_as_onnx(b))


def compare_exports(a: Side, b: Side, *, is_same: bool) -> ExportDiff:
    """Compare the files of packages with what their programs export to.

    Args:
        a: The first side.
        b: The second one.
        is_same: Whether the programs have the same graph and plan. If so, file is compared with
            file, or with the export of the other side; otherwise each with its own program.
    """
    if a.program is None or b.program is None or (a.onnx is None and b.onnx is None):
        return ExportDiff()
    if is_same:
        return _compare(_as_onnx(a, _form(b)), _as_onnx(b, _form(a)))
    found = [
        _compare(_export(side.exportable(), _form(side)), side.onnx)
        for side in (a, b)
        if side.onnx is not None
    ]
    return ExportDiff(
        tuple(s for part in found for s in part.structures),
        tuple(w for part in found for w in part.weights),
    )


def _compare(a: OnnxSide, b: OnnxSide) -> ExportDiff:
    alignment = align(a.outline, b.outline)
    structure = compare_outlines(a.outline, b.outline, alignment)
    weights = compare_weights(a.weights, b.weights, (a.outline, b.outline), alignment)
    return ExportDiff((structure,), weights)


def _as_onnx(side: Side, options: OnnxOptions | None = None) -> OnnxSide:
    """Return the ONNX graph of a side: its file, or what its program would be exported to."""
    if side.onnx is not None:
        return side.onnx
    program = side.exportable()
    if program.plan is None:
        planned = PlannedPass(PassStep(CACHE_PASS), InsertCache())
        program, _ = apply_pass(program, planned)
    return _export(program, options)


def _form(side: Side) -> OnnxOptions | None:
    """Return what gives a package of the form of a side; None if it is no package."""
    return None if side.onnx is None else side.onnx.options


def _export(program: Program, options: OnnxOptions | None) -> OnnxSide:
    from kvxform.diffing.outline_onnx import exported_side  # slow to import

    return exported_side(program, options)


def _as_graph(side: OnnxSide) -> Graph:
    return Graph(side.outline, side.weights)
