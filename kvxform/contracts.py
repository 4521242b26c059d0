"""What a run has promised, and what was measured: contracts of passes, of the target, bounds."""

from __future__ import annotations

import dataclasses

from kvxform.errors import PassError, VerifyError
from kvxform.order import PlannedPass
from kvxform.recipe import Recipe
from kvxform.report import BoundRecord, LoweringRecord, PassRecord, Report
from kvxform.summary import cache_measured, measured
from kvxform.verify.prober import Prober, StageMeasure


def require_contract(
    planned: PlannedPass, record: PassRecord, stage: StageMeasure, prober: Prober
) -> PassRecord:
    """Compare a measured stage with the contract of its pass and return the filled record.

    Raises:
        PassError: KVX212 if the contract is broken.
        VerifyError: KVX502 if a cache is wrong.
    """
    numerics, tolerance = planned.graph_pass.numerics, prober.tolerance
    metric, bound = numerics.metric or "kl", numerics.bound
    if numerics.is_exact:
        lossy = ("kl", tolerance.lossy_bound(stage.cost))
        metric, bound = lossy if stage.is_lossy else ("relative", tolerance.logits)
    found = measured(stage.vs_before)
    value = getattr(found, metric)
    if bound is not None and not value <= bound:
        raise PassError(
            "KVX212",
            f"{metric} against the stage before must be at most {bound:.0e}"
            f" for an {numerics.exactness.value} pass",
            where=planned.name,
            got=f"{value:.2e}",
            at=planned.step.at,
        )
    if stage.state is not None:
        stage.state.require(tolerance, planned.name)
    return dataclasses.replace(
        record,
        vs_before=found,
        vs_source=measured(stage.vs_source),
        metric=metric,
        tolerance=bound,
        cache=cache_measured([stage.state]) if stage.state else None,
    )


def require_lowering(name: str, stage: StageMeasure, prober: Prober) -> LoweringRecord:
    """Compare the target with the eager lowering; both are the same program.

    Raises:
        VerifyError: KVX502 if logits or the state of the cache differ by more than rounding.
    """
    tolerance, found = prober.tolerance, measured(stage.vs_before)
    metric, bound = "relative", tolerance.logits
    if stage.is_lossy:
        metric, bound = "kl", tolerance.lossy_bound(stage.cost)
    value = getattr(found, metric)
    if not value <= bound:
        rule = f"{metric} of logits against the eager lowering must be at most {bound:.0e}"
        raise VerifyError("KVX502", rule, where=f"target {name}", got=f"{value:.2e}")
    assert stage.state is not None, "other lowerings need a cache"
    stage.state.require(tolerance, f"target {name}")
    return LoweringRecord(name, found, metric, bound, cache_measured([stage.state]))


def bound_records(recipe: Recipe, report: Report) -> tuple[BoundRecord, ...]:
    """Return the bounds of `recipe` beside what `report` says of them."""
    final = report.final
    values = {
        "max_kl": final.kl if final else None,
        "min_top1": final.top1 if final else None,
        "bits_per_value": report.bits_per_value,
    }
    limits = recipe.bounds.model_dump(exclude_none=True)
    return tuple(BoundRecord(name, limit, values[name]) for name, limit in limits.items())


def require_bounds(report: Report) -> None:
    """Raise VerifyError KVX501 if a bound of `report` is exceeded."""
    for bound in report.bounds:
        if bound.is_kept is False:
            side = "at least" if bound.is_lower else "at most"
            raise VerifyError(
                "KVX501",
                f"{bound.name} must be {side} {bound.limit:g}",
                where="bounds",
                got=f"{bound.measured:.4g}",
                hint="change the recipe or the bound",
            )
