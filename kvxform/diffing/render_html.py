"""A diff as one HTML page: a map of all layers that opens, error plots, changes by layers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvxform.diffing.blocks import (
    Block,
    PlanLine,
    blocks_of,
    fold_ports,
    group_findings,
    often,
    plan_lines,
)
from kvxform.diffing.digest import (
    LayerCell,
    figure_rows,
    layer_cells,
    layer_count,
    layer_words,
    ranked,
    side_words,
    sign_of,
    verdict,
)
from kvxform.diffing.error_plot import error_plot
from kvxform.diffing.folding import fold_changes
from kvxform.diffing.recipes import recipe_lines
from kvxform.diffing.records import DiffResult, NodeChange, WeightChange
from kvxform.formats import plain_line, plain_number, plain_percent
from kvxform.page import render_page

_HEAT = (1e-3, 0.03, 0.3)  # errors above rounding at which a tile takes the next colour


@dataclass(frozen=True)
class Tile:
    """A layer in the map: its cell, colour and all changes in it."""

    cell: LayerCell
    heat: int
    blocks: list[Block[NodeChange]]
    plan: list[PlanLine]
    weights: list[WeightChange]


def render_html(result: DiffResult) -> str:
    """Return a diff as one page that needs no other file and no script."""
    count = layer_count(result)
    numeric = result.numeric
    nodes = result.structure.nodes if result.structure else ()
    return render_page(
        "diff.html.jinja",
        result=result,
        verdict=verdict(result),
        sides=[(name, s, side_words(s)) for name, s in (("A", result.a), ("B", result.b))],
        findings=group_findings(ranked(result.findings)),
        recipe=recipe_lines(result.recipe),
        over={v.name: v.measured for v in result.violations},
        figures=figure_rows(result),
        tiles=[_tile(result, cell) for cell in layer_cells(result)],
        plot=error_plot(numeric.layers, numeric.tolerance) if numeric else None,
        graph=blocks_of(nodes),
        plan=[(block.layers, plan_lines(block)) for block in blocks_of(result.plan)],
        ports=fold_ports(result.structure.ports) if result.structure else [],
        weights=fold_changes(result.weights),
        where=lambda layers: layer_words(layers, count),
        sign=lambda change: sign_of([change]),
        line=plain_line,
        often=often,
        plain=plain_number,
        share=plain_percent,
    )


def _tile(result: DiffResult, cell: LayerCell) -> Tile:
    nodes: list[NodeChange] = [
        node
        for node in (result.structure.nodes if result.structure else ())
        if node.layer == cell.layer
    ]
    plan = [change for change in result.plan if change.layer == cell.layer]
    return Tile(
        cell=cell,
        heat=heat_of(cell.error, result.numeric.tolerance if result.numeric else 0.0),
        blocks=blocks_of(nodes),
        plan=[line for block in blocks_of(plan) for line in plan_lines(block)],
        weights=[change for change in result.weights if change.layer == cell.layer],
    )


def heat_of(error: float | None, rounding: float) -> int:
    """Return the colour of an error: 0 for none, 1 for rounding, 2 to 5 for more."""
    if error is None or error == 0:
        return 0
    if math.isnan(error):
        return len(_HEAT) + 2
    return 1 if error <= rounding else 2 + sum(error > limit for limit in _HEAT)
