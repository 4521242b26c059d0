"""Thresholds: how far two sides may be apart.

A file of them is YAML or JSON, one limit a line::

    max_kl: 0.01
    min_top1: 0.98
    max_kv_bytes_per_token_growth: 0

A limit that cannot be measured is an error, so that no check passes because nothing was compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from kvxform.diffing.metrics import NAMES
from kvxform.diffing.records import DiffResult, Violation
from kvxform.errors import KvxformError, RecipeError, nearest_hint
from kvxform.recipe_text import SourceMap, read_recipe_file

Limits = Mapping[str, float]
ThresholdsLike = Limits | str | Path | None
Measure = Callable[[DiffResult], float | None]

_HINTS = {
    "numeric": "run the diff with numbers, on two sides that run",
    "structure": "compare two sides that have a graph",
    "weights": "compare two sides that have weights, not a lock",
    "metric": "compare two sides that have a cache plan",
}


def load_thresholds(source: ThresholdsLike) -> dict[str, float]:
    """Return limits by name, in the order in which they were given.

    Args:
        source: Limits by name, the path of a .yaml or .json file with them, or None for no limits.

    Raises:
        KvxformError: KVX110 for a file that cannot be read, KVX111 for an unknown name, KVX112 for
            a limit that is no number.
    """
    if source is None:
        return {}
    if isinstance(source, str | Path):
        data, places = _read(Path(source))
    else:
        data, places = dict(source), SourceMap()
    for name, limit in data.items():
        at = places.at((name,))
        if name not in MEASURES:
            hint = nearest_hint(str(name), MEASURES)
            raise _error("KVX111", "a threshold must be one that is known", repr(name), at, hint)
        if isinstance(limit, bool) or not isinstance(limit, int | float) or limit != limit:
            raise _error("KVX112", f"the limit of {name} must be a number", repr(limit), at)
    return {name: float(limit) for name, limit in data.items()}


def check_thresholds(result: DiffResult, limits: Limits) -> DiffResult:
    """Return the result with the limits and those of them that are exceeded.

    Raises:
        KvxformError: KVX113 if the diff did not measure what a limit is about.
    """
    violations = []
    for name, limit in limits.items():
        measured = MEASURES[name](result)
        if measured is None:
            kind = _kind_of(name)
            rule = f"what {name} limits must be measured"
            raise _error("KVX113", rule, "no measurement", "", _HINTS[kind])
        is_held = measured >= limit if name.startswith("min_") else measured <= limit
        if not is_held:  # also when the measurement is no number
            violations.append(Violation(name, limit, measured))
    return dataclasses.replace(
        result, thresholds=tuple(limits.items()), violations=tuple(violations)
    )


def _read(path: Path) -> tuple[dict[Any, Any], SourceMap]:
    try:
        data, places = read_recipe_file(path)
    except RecipeError as error:
        rule = "a thresholds file must be YAML or JSON that can be read"
        raise _error("KVX110", rule, error.got or str(path), error.at) from error
    if not isinstance(data, dict):
        rule = "a thresholds file must hold limits by name"
        raise _error("KVX110", rule, type(data).__name__, path.name, "write `max_kl: 0.01`")
    return data, places


def _error(code: str, rule: str, got: object, at: str, hint: str = "") -> KvxformError:
    return KvxformError(code, rule, where="thresholds", got=got, at=at, hint=hint)


def _of_logits(field: str) -> Measure:
    def measure(result: DiffResult) -> float | None:
        if result.numeric is None or result.numeric.logits is None:
            return None
        return float(getattr(result.numeric.logits, field))

    return measure


def _of_layers(field: str) -> Measure:
    def measure(result: DiffResult) -> float | None:
        layers = () if result.numeric is None else result.numeric.layers
        return _largest(getattr(layer, field) for layer in layers)

    return measure


def _complaints(result: DiffResult) -> float | None:
    return None if result.numeric is None else float(len(result.numeric.complaints))


def _largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _of_nodes(kind: str | None) -> Measure:
    def measure(result: DiffResult) -> float | None:
        if result.structure is None:
            return None
        return float(sum(kind in (None, node.kind) for node in result.structure.nodes))

    return measure


def _plan_changes(result: DiffResult) -> float:
    return float(len(result.plan))


def _weights_changed(result: DiffResult) -> float | None:
    has_weights = "lock" not in (result.a.kind, result.b.kind)
    return float(len(result.weights)) if has_weights else None


def _errors(result: DiffResult) -> float:
    return float(sum(finding.severity == "error" for finding in result.findings))


def _metric(name: str) -> Measure:
    return lambda result: next((m.after for m in result.metrics if m.name == name), None)


def _growth(name: str) -> Measure:
    def measure(result: DiffResult) -> float | None:
        for metric in result.metrics:
            if metric.name == name and metric.before is not None and metric.after is not None:
                before, after = metric.before, metric.after
                return 0.0 if before == after else after / before - 1 if before else float("inf")
        return None

    return measure


MEASURES: dict[str, Measure] = {
    "max_kl": _of_logits("kl"),
    "max_abs": _of_logits("max_abs"),
    "max_relative": _of_logits("relative"),
    "min_top1": _of_logits("top1"),
    "max_hidden": _of_layers("hidden"),
    "max_key": _of_layers("key"),
    "max_value": _of_layers("value"),
    "max_codes": _of_layers("codes"),
    "max_complaints": _complaints,
    "max_nodes_changed": _of_nodes(None),
    "max_nodes_added": _of_nodes("added"),
    "max_nodes_removed": _of_nodes("removed"),
    "max_plan_changes": _plan_changes,
    "max_weights_changed": _weights_changed,
    "max_errors": _errors,
    **{f"max_{name}": _metric(name) for name in NAMES},
    **{f"max_{name}_growth": _growth(name) for name in NAMES},
}


def _kind_of(name: str) -> str:
    """Return the part of a diff that measures a threshold."""
    if name.startswith("max_nodes"):
        return "structure"
    if name == "max_weights_changed":
        return "weights"
    return "metric" if any(metric in name for metric in NAMES) else "numeric"
