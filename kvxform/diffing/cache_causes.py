"""What the symptoms of two caches mean: the fault that leaves such traces, in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kvxform.diffing.causes import STREAMS, Cause
from kvxform.diffing.symptoms import Symptom

SIDES = {"": "", "a": " in A", "b": " in B"}
PLANES = {"scale": "scales", "zero": "zero points", "codes": "codes", "norm": "norms"}
PLANE_RULES = {"scale": "scale", "zero": "zero-point", "codes": "codes"}
# Symptoms that follow where the model hands other things to its cache, or stores them otherwise.
FOLLOWS_INPUTS = frozenset({"inputs", "reads"})
FOLLOWS_PLAN = frozenset(
    {"sink", "recent", "plane-shifted", "plane-scaled", "plane", "codes", "decoded", "state"}
)


def cache_causes(
    symptoms: Iterable[Symptom], explained: frozenset[tuple[str, int | None]]
) -> Iterator[Cause]:
    """Yield causes that the caches show and that nothing else explains.

    Args:
        symptoms: What differs.
        explained: Rules of causes that are known by now, each with its layer.
    """
    for symptom in symptoms:
        rule, message = _describe(symptom)
        if not _is_explained(symptom, rule, explained):
            yield Cause(rule, "error", message + SIDES[symptom.side], symptom.layer)


def _is_explained(
    symptom: Symptom, rule: str, explained: frozenset[tuple[str, int | None]]
) -> bool:
    rules = {known for known, layer in explained if layer in (symptom.layer, None)}
    if rule in rules:
        return True
    if symptom.kind in FOLLOWS_PLAN | FOLLOWS_INPUTS and rules & {
        "codec",
        "dtype",
        "layer-owner",
        "plan",
        "recent",
        "sink",
    }:
        return True
    if symptom.kind == "scoring":
        return bool(rules & {"window", "attention-scale", "attention"})
    earlier = {known for known, layer in explained if layer is None or layer <= symptom.layer}
    return symptom.kind in FOLLOWS_INPUTS and bool(earlier)


def _describe(symptom: Symptom) -> tuple[str, str]:
    """Return the rule and the sentence of a symptom."""
    words = STREAMS.get(symptom.stream, "keys and values")
    what = f": {symptom.what}" if symptom.what else ""
    match symptom.kind:
        case "positions":
            where = "padded rows alone, so they count slots and not tokens"
            rows = f", {where}" if symptom.padded_only else ""
            return "positions", f"new tokens have other positions{rows}{what}"
        case "scoring":
            rule = "window" if "window" in symptom.what else "attention-scale"
            return rule, f"attention over the cache{what}"
        case "owner":
            return "layer-owner", f"the cache {symptom.what}"
        case "page-order":
            return "page-order", f"full pages have changed places{what}"
        case "token-order":
            return "token-order", f"stored tokens have changed places{what}"
        case "rewritten":
            return "encoded-again", f"stored {words} are encoded again by later steps{what}"
        case "sink":
            return "sink", f"{words} of the first tokens are lost{what}"
        case "recent":
            return "recent", f"{words} of the last tokens differ{what}"
        case "plane-shifted" | "plane-scaled" | "plane" | "codes":
            plane = PLANES.get(symptom.plane, symptom.plane)
            verb = "dropped" if symptom.kind == "plane-scaled" and not symptom.value else "other"
            rule = PLANE_RULES.get(symptom.plane, "plane")
            return rule, f"{verb} {plane} of {words}{what}"
        case "inputs":
            return "inputs", f"the model hands other {words} to its cache{what}"
        case "decoded":
            return "decoder", f"equal codes of {words} are read back as other values{what}"
        case "reads":
            return "reads", f"attention over an equal cache gives other outputs{what}"
        case _:
            return "cache-state", f"stored {words} differ{what}"
