"""Bisect: the pass that breaks a recipe, the site where it does, a small graph that shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from kvxform.atomic import check_replaceable
from kvxform.bisecting.anchors import touched_layers
from kvxform.bisecting.changes import describe_changes
from kvxform.bisecting.culprits import BOUND, CulpritSearch, Group
from kvxform.bisecting.cutting import inputs_of, operations
from kvxform.bisecting.outcomes import LIMITS, Limits
from kvxform.bisecting.records import BisectResult, Culprit, Subgraph
from kvxform.bisecting.shrinking import Case, Shrinker
from kvxform.bisecting.stages import Broken, Talk, find_broken
from kvxform.bisecting.writing import is_shown_alone, write_repro
from kvxform.calibrate import CalibrationLike
from kvxform.capture import capture
from kvxform.errors import VerifyError, nearest_hint
from kvxform.ir.program import Program
from kvxform.ir.store import watching
from kvxform.progress import ProgressDisplay
from kvxform.recipe import Recipe, RecipeLike, load_recipe
from kvxform.runtime.model import OptimizedModel

BisectSource = Program | nn.Module | torch.export.ExportedProgram | str | Path


def bisect(
    model: BisectSource,
    recipe: RecipeLike,
    *,
    bound: Mapping[str, float] | None = None,
    out: str | Path | None = None,
    calibration: CalibrationLike = None,
    progress: bool = True,
) -> BisectResult:
    """Find the pass that breaks a recipe, then the site, then the smallest graph that shows it.

    A pass fails if it breaks its contract, leaves an invalid program or a wrong cache, breaks down,
    or exceeds a bound. Passes run by the eager lowering, whatever the target of the recipe is.

    Args:
        model: As for `optimize`, or a captured program; it is not changed.
        recipe: As for `optimize`.
        bound: Limits instead of those of the recipe: `max_kl`, `min_top1`, `max_relative` (largest
            difference of a logit from the source, over the largest logit).
        out: Folder for a script that shows the fault on its own; by default none is written.
        calibration: As for `optimize`.
        progress: Show progress on stderr.

    Raises:
        VerifyError: KVX511 for a bound that there is not.
        KvxformError: Those of `optimize` that say something of the model or the recipe.
    """
    wanted = load_recipe(recipe)
    limits = _limits(wanted, bound)
    folder = None if out is None else Path(out)
    if folder is not None:
        check_replaceable(folder)  # before the work, not after it
    with ProgressDisplay(progress) as display:
        program = _captured(model, display.talk)
        with watching(program.store):
            rows, broken = find_broken(
                program,
                wanted,
                limits,
                executor=OptimizedModel,
                calibration=calibration,
                talk=display.talk,
            )
            result = BisectResult(program.info.name, wanted.name, tuple(rows))
            if broken is None:
                return result
            return _Search(result, broken, limits, display.talk).run(folder)


@dataclass(frozen=True)
class _Search:
    """What is left to do once the pass is known."""

    result: BisectResult
    broken: Broken
    limits: Limits
    talk: Talk

    def run(self, folder: Path | None) -> BisectResult:
        broken = self.broken
        self.talk(f"sites of {broken.planned.name}")
        search = CulpritSearch(broken, self.limits, OptimizedModel)
        groups = search.find()
        result = replace(
            self.result,
            pass_name=broken.planned.name,
            step=broken.planned.step.to_data(),
            failure=broken.failure.text,
            matches=len(broken.matches),
            culprits=tuple(self._culprit(group) for group in groups),
        )
        self.talk("smallest graph")
        worst = groups[0] if groups else Group(())
        limits = self._local_limits(worst, search.healthy(groups))
        shrinker = Shrinker(broken, frozenset(worst.matches), limits, OptimizedModel)
        case = worst.case or shrinker.first()
        if case is None:
            return replace(result, note="no part of the model fails on its own")
        case = shrinker.shrink(case)
        result = replace(result, subgraph=_subgraph(case, broken.uncached))
        return result if folder is None else self._write(folder, result, case, limits)

    def _culprit(self, group: Group) -> Culprit:
        matches = [self.broken.matches[i] for i in group.matches]
        layers = sorted({match.layer for match in matches if match.layer is not None})
        layers = layers or sorted(touched_layers(self.broken, frozenset(group.matches)))
        nodes = {node.name: node for node in self.broken.before.graph.nodes}
        modules = [nodes[m.node].meta["module"] for m in matches if m.node in nodes]
        modules += [self.broken.before.site(layer).module for layer in layers]
        failure = None if group.trial is None else group.trial.failure
        if group.case is not None:
            failure = group.case.found.failure
        return Culprit(
            matches=group.matches,
            layers=tuple(layers),
            module=modules[0] if modules else "",
            failure="" if failure is None else failure.text,
            cost=None if group.trial is None else group.trial.cost,
        )

    def _local_limits(self, worst: Group, healthy: int | None) -> Limits:
        """Return what a part alone is held to where the whole model is held to a bound.

        Between the error of the site at fault and that of another one; half of the first without.
        """
        if self.broken.failure.code != BOUND:
            return {}
        error = self._error_alone(frozenset(worst.matches))
        usual = 0.0 if healthy is None else self._error_alone(frozenset({healthy}))
        between = (error * usual) ** 0.5
        return {"max_relative": between if 0 < usual < error else error / 2}

    def _error_alone(self, wanted: frozenset[int]) -> float:
        rounding = {"max_relative": self.broken.prober.tolerance.logits}
        case = Shrinker(self.broken, wanted, rounding, OptimizedModel).first()
        stage = None if case is None else case.found.stage
        return 0.0 if stage is None else stage.vs_source.relative

    def _write(
        self, folder: Path, result: BisectResult, case: Case, limits: Limits
    ) -> BisectResult:
        assert result.subgraph is not None, "there is a case"
        if not is_shown_alone(case, result.subgraph.steps, limits):
            return replace(result, note="the part is right again once it has been saved")
        write_repro(folder, result, case, limits)
        return replace(result, repro=folder)


def _captured(model: BisectSource, talk: Talk) -> Program:
    if isinstance(model, Program):
        return model
    return capture(str(model) if isinstance(model, Path) else model, progress=talk).program


def _limits(recipe: Recipe, bound: Mapping[str, float] | None) -> Limits:
    """Return the limits that apply; how many bits a value takes is for the plan to say."""
    if bound is None:
        found = recipe.bounds.model_dump(exclude_none=True, exclude={"bits_per_value"})
        return {name: float(limit) for name, limit in found.items()}
    for name in bound:
        if name not in LIMITS:
            rule = f"a bound must be one of {', '.join(LIMITS)}"
            hint = nearest_hint(name, LIMITS)
            raise VerifyError("KVX511", rule, where="bisect", got=repr(name), hint=hint)
    return dict(bound)


def _subgraph(case: Case, whole: Program) -> Subgraph:
    assert case.found.failure is not None, "a case fails"
    names = {node.name: node for node in whole.graph.nodes}
    steps = [planned.step.to_data() for planned in case.steps]
    return Subgraph(
        nodes=len(operations(case.program)),
        nodes_before=len(operations(whole)),
        inputs=tuple(_place(names[name]) for name in inputs_of(case.program)),
        output=_place(names[case.end]),
        steps=tuple(steps),
        tokens=sum(case.probe.lengths),
        failure=case.found.failure.text,
        changes=describe_changes(case),
    )


def _place(node: torch.fx.Node) -> str:
    """Return an operation for people: what it was in the source, and in which module."""
    words = (node.meta["origin"], node.meta["module"])
    return " in ".join(word for word in words if word) or node.name
