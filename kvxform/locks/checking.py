"""Compare a model with its lock, or a lock with another one."""

from __future__ import annotations

from kvxform.diffing.align import align
from kvxform.diffing.diagnose import diagnose
from kvxform.diffing.metrics import compare_metrics
from kvxform.diffing.plans import compare_plans
from kvxform.diffing.recipes import StepData, compare_recipes, recipe_findings
from kvxform.diffing.records import (
    DiffResult,
    Finding,
    LayerDiff,
    NumericDiff,
    Severity,
    SideKind,
    SideSummary,
)
from kvxform.diffing.structure import compare_outlines
from kvxform.locks.contracts import BoundContract, PassContract, is_same_measure
from kvxform.locks.digests import Digest, LayerDigest
from kvxform.locks.making import make_lock
from kvxform.locks.records import Lock
from kvxform.locks.sketches import Sketch
from kvxform.runtime.model import OptimizedModel


def check_lock(
    lock: Lock, model: OptimizedModel, *, name: str = "lock", model_name: str = "build"
) -> DiffResult:
    """Compare a model with a lock.

    Args:
        lock: What it must be.
        model: What it is.
        name: What the result calls the lock.
        model_name: What the result calls the model.
    """
    lengths = None if lock.digest is None else lock.digest.lengths
    found = make_lock(model, digest=lengths is not None, lengths=lengths)
    return compare_locks(lock, found, name=name, other_name=model_name, other_kind="program")


def compare_locks(
    lock: Lock,
    other: Lock,
    *,
    name: str = "lock",
    other_name: str = "lock",
    other_kind: SideKind = "lock",
) -> DiffResult:
    """Compare two locks.

    Args:
        lock: What must be.
        other: What is.
        name: What the result calls the first.
        other_name: What the result calls the second.
        other_kind: What the second was made from.
    """
    a, b = lock.outline, other.outline
    structure = compare_outlines(a, b, align(a, b))
    plan, metrics = compare_plans(a, b), compare_metrics(a, b)
    numeric = compare_digests(lock.digest, other.digest)
    recipe = compare_recipes(_steps(lock.passes), _steps(other.passes))
    findings = (
        *recipe_findings(recipe),
        *diagnose(structure, plan, (), metrics, numeric),
        *_pass_findings(lock.passes, other.passes),
        *_bound_findings(lock.bounds, other.bounds),
        *_digest_findings(lock.digest, other.digest, numeric),
    )
    return DiffResult(
        a=_summary(lock, name, "lock"),
        b=_summary(other, other_name, other_kind),
        structure=structure,
        plan=plan,
        metrics=metrics,
        numeric=numeric,
        findings=findings,
        recipe=recipe,
    )


def _steps(passes: tuple[PassContract, ...]) -> list[StepData] | None:
    """Return passes as recipes write them; None where a side has no report."""
    return [{contract.name: contract.options} for contract in passes] or None


def compare_digests(a: Digest | None, b: Digest | None) -> NumericDiff | None:
    """Return what two digests say of K and V of every layer; None if they do not compare."""
    if a is None or b is None or a.lengths != b.lengths:
        return None
    tolerance, others = max(a.tolerance, b.tolerance), {d.layer: d for d in b.layers}
    layers = tuple(_layer(one, others.get(one.layer), a, b) for one in a.layers)
    parted = (x.layer for x in layers if _error(x) > tolerance)
    return NumericDiff(
        inputs=f"fixed tokens, {len(a.lengths)} sequences of {' and '.join(map(str, a.lengths))}; "
        "differences are estimated from digests",
        logits=None,
        tolerance=tolerance,
        layers=layers,
        first_layer=next(parted, None),
    )


def _layer(one: LayerDigest, two: LayerDigest | None, a: Digest, b: Digest) -> LayerDiff:
    if two is None:
        return LayerDiff(one.layer)
    return LayerDiff(
        one.layer,
        key=_distance(one.key, two.key, a, b),
        value=_distance(one.value, two.value, a, b),
    )


def _distance(one: Sketch, two: Sketch, a: Digest, b: Digest) -> float | None:
    """Return a relative difference; None if the sketches are of tensors of other shapes."""
    found = one.distance(two, a.grid, b.grid)
    return None if found is None else float(f"{found:.2g}")


def _digest_findings(
    a: Digest | None, b: Digest | None, numeric: NumericDiff | None
) -> list[Finding]:
    if a is None or b is None or numeric is None:
        return []
    distance = _distance(a.logits, b.logits, a, b)
    parted = [x.layer for x in numeric.layers if _error(x) > numeric.tolerance]
    found = []
    if parted:
        worst = max(_error(x) for x in numeric.layers)
        message = f"cached keys or values differ by up to {_share(worst)} on fixed tokens"
        found.append(Finding("digest-cache", "warning", message, tuple(parted)))
    if distance is None:
        message = f"logits have shape {list(b.logits.shape)} instead of {list(a.logits.shape)}"
        found.append(Finding("digest-logits", "warning", message))
    elif distance > numeric.tolerance:
        same = sum(x == y for x, y in zip(a.greedy, b.greedy, strict=True))
        message = (
            f"logits differ by about {_share(distance)} on fixed tokens; "
            f"the likeliest token is the same at {same} of {len(a.greedy)} positions"
        )
        found.append(Finding("digest-logits", "warning", message))
    return found


def _error(layer: LayerDiff) -> float:
    return max(layer.key or 0.0, layer.value or 0.0)


def _share(value: float) -> str:
    return f"{value:.1%}" if value >= 0.001 else f"{value:.1e}"


def _pass_findings(
    before: tuple[PassContract, ...], after: tuple[PassContract, ...]
) -> list[Finding]:
    """Return what passes that both sides have promise or cost otherwise."""
    later = {contract.name: contract for contract in after}
    pairs = [(one, later[one.name]) for one in before if one.name in later]
    found = []
    for one, two in pairs:
        for field in ("exactness", "matched"):
            was, now = getattr(one, field), getattr(two, field)
            if was != now:
                words = "applied at places" if field == "matched" else "declared"
                message = f"{one.name}: {words}: {was} -> {now}"
                found.append(Finding("contract-passes", "warning", message))
        if not is_same_measure(one.measured, two.measured):
            severity: Severity = "warning" if _grew(one.measured, two.measured) else "note"
            message = f"{one.name}: measured {_kl(one.measured)} -> {_kl(two.measured)}"
            found.append(Finding("contract-measured", severity, message))
    return found


def _grew(before: str, after: str) -> bool:
    return after != "rounding" and (before == "rounding" or float(after) > float(before))


def _kl(measured: str) -> str:
    return measured if measured == "rounding" else f"KL about {float(measured):g}"


def _bound_findings(
    before: tuple[BoundContract, ...], after: tuple[BoundContract, ...]
) -> list[Finding]:
    old, new = ({bound.name: bound for bound in side} for side in (before, after))
    found = []
    for name in dict.fromkeys([*old, *new]):
        was, now = (_bound_words(side.get(name)) for side in (old, new))
        if was != now:
            found.append(Finding("contract-bounds", "warning", f"bound {name}: {was} -> {now}"))
    return found


def _bound_words(bound: BoundContract | None) -> str:
    if bound is None:
        return "none"
    kept = {True: ", kept", False: ", exceeded", None: ""}[bound.kept]
    return f"{bound.limit:g}{kept}"


def _summary(lock: Lock, name: str, kind: SideKind) -> SideSummary:
    outline = lock.outline
    return SideSummary(name, kind, lock.model, lock.recipe, len(outline.sites), outline.operations)
