"""Compare two sides part by part: structure, plan, weights, figures, numbers."""

from __future__ import annotations

import dataclasses

from kvxform.differ.exports import compare_exports, graphs_of
from kvxform.differ.running import InputsLike, compare_texts, run_sides
from kvxform.differ.sides import Side, SideLike, Talk, open_side
from kvxform.diffing.align import align
from kvxform.diffing.diagnose import diagnose
from kvxform.diffing.metrics import compare_metrics
from kvxform.diffing.plans import compare_plans
from kvxform.diffing.recipes import compare_recipes, recipe_findings
from kvxform.diffing.records import DiffResult
from kvxform.diffing.structure import compare_outlines
from kvxform.diffing.thresholds import ThresholdsLike, check_thresholds, load_thresholds
from kvxform.diffing.weights import compare_weights
from kvxform.errors import KvxformError
from kvxform.locks.checking import compare_locks
from kvxform.locks.making import make_lock
from kvxform.locks.records import Lock
from kvxform.progress import ProgressDisplay
from kvxform.runtime.model import OptimizedModel


def diff(
    a: SideLike,
    b: SideLike,
    *,
    inputs: InputsLike = None,
    thresholds: ThresholdsLike = None,
    numeric: bool = True,
    generate: int = 0,
    progress: bool = True,
) -> DiffResult:
    """Say what differs between two models, graphs or builds, in which layers, and why.

    Operations are paired by what they are and where they come from, never by name. Neither side is
    changed.

    Args:
        a: `OptimizedModel`, `Program`, `nn.Module`, `ExportedProgram` or `Lock`; or the path of an
            artifact, an ONNX package or file, a .pt2 file or a lock; or a model as `optimize` takes
            it, alone or as `"MODEL@RECIPE"`.
        b: The same.
        inputs: What both are run on: token ids `[B, S]`, alone or with a mask; a text; by default
            text that A writes itself.
        thresholds: Limits by name, or a .yaml or .json file with them; docs/diff.md lists them.
        numeric: Run both.
        generate: Let both write this many tokens after the same prompt.
        progress: Show progress on stderr.

    Raises:
        KvxformError: KVX110 to KVX113 for thresholds, KVX820 for a side that is none, KVX822 for
            inputs that cannot be used, and whatever opening a side raises.
    """
    limits = load_thresholds(thresholds)
    with ProgressDisplay(progress) as display:
        display.talk("opening A")
        first = open_side(a, runs=numeric, talk=display.talk)
        display.talk("opening B")
        second = open_side(b, runs=numeric, talk=display.talk)
        if "lock" in (first.kind, second.kind):
            result = _compare_with_lock(first, second, numeric)
        else:
            result = _compare(first, second, inputs, numeric, generate, display.talk)
    return check_thresholds(result, limits)


def _compare(
    a: Side, b: Side, inputs: InputsLike, numeric: bool, generate: int, talk: Talk
) -> DiffResult:
    talk("comparing graphs")
    x, y = graphs_of(a, b)
    alignment = align(x.outline, y.outline)
    structure = compare_outlines(x.outline, y.outline, alignment)
    plan = compare_plans(x.outline, y.outline)
    metrics = compare_metrics(x.outline, y.outline)
    talk("comparing weights")
    weights = compare_weights(x.program, y.program, (x.outline, y.outline), alignment)
    exports = compare_exports(a, b, is_same=not (structure.nodes or structure.ports or plan))
    structure, weights = exports.join(structure, weights)
    numbers = None
    if numeric and a.model is not None and b.model is not None:
        talk("running both")
        pairs = [(i, j) for i, j in alignment.layers if i is not None and j is not None]
        numbers = run_sides(a, b, inputs, pairs)
        if generate:
            talk("writing text")
            numbers = dataclasses.replace(numbers, text=compare_texts(a, b, generate))
    recipe = compare_recipes(a.steps, b.steps)
    return DiffResult(
        a.summary,
        b.summary,
        structure,
        plan,
        weights,
        metrics,
        numbers,
        (*recipe_findings(recipe), *diagnose(structure, plan, weights, metrics, numbers)),
        recipe=recipe,
    )


def _compare_with_lock(a: Side, b: Side, numeric: bool) -> DiffResult:
    """Compare locks, or a lock with what the other side would be locked as."""
    locks = [side.lock for side in (a, b) if side.lock is not None]
    lengths = next((lock.digest.lengths for lock in locks if lock.digest is not None), None)
    first, second = (_lock_of(side, numeric, lengths) for side in (a, b))
    result = compare_locks(first, second)
    return dataclasses.replace(result, a=a.summary, b=b.summary)


def _lock_of(side: Side, numeric: bool, lengths: tuple[int, ...] | None) -> Lock:
    if side.lock is not None:
        return side.lock if numeric else dataclasses.replace(side.lock, digest=None)
    if side.program is None or side.whole is None:
        rule = "a lock is compared with a lock, or with a program that runs"
        raise KvxformError("KVX820", rule, where="diff", got=f"{side.kind} {side.name}")
    model = OptimizedModel(side.program)
    return make_lock(model, digest=numeric and lengths is not None, lengths=lengths)
