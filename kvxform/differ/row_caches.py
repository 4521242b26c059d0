"""Caches of two sides of which one is an ONNX package, sequence by sequence.

Rows of a package go on together, so there is no schedule with pages that are used again: every
sequence is prefilled alone and then decoded.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvxform.diffing.caches import shaped_error
from kvxform.diffing.records import LayerDiff
from kvxform.diffing.symptoms import CacheDiff
from kvxform.verify.probe import Probe
from kvxform.verify.protocols import ModelLike, SessionLike

SCHEDULE = "prefill and decode, one sequence at a time"
STEPS = 2


def compare_rows(
    a: ModelLike, b: ModelLike, probe: Probe, pairs: Sequence[tuple[int, int]]
) -> CacheDiff:
    """Return what the caches hold after each sequence: errors by layer, and lengths.

    Args:
        a: The first side, with a cache.
        b: The second one, with a cache.
        probe: Sequences of more than two tokens.
        pairs: Layers that belong together, (layer of A, layer of B).
    """
    worst: dict[int, tuple[list[float | None], list[float | None]]] = {}
    complaints = []
    for row, length in enumerate(probe.lengths):
        first, second = (_fill(model, probe, row) for model in (a, b))
        for name, session in (("A", first), ("B", second)):
            held = list(session.sequence_lengths())
            if held != [length]:
                complaints.append(f"{name}: sequence lengths must be {[length]}, not {held}")
        for layer, other in pairs:
            mine, theirs = first.logical_cache(layer), second.logical_cache(other)
            keys, values = worst.setdefault(layer, ([], []))
            keys.append(shaped_error(theirs.k, mine.k))
            values.append(shaped_error(theirs.v, mine.v))
    layers = tuple(
        LayerDiff(layer, key=_largest(keys), value=_largest(values))
        for layer, (keys, values) in sorted(worst.items())
    )
    return CacheDiff(layers, tuple(dict.fromkeys(complaints)), (SCHEDULE,))


def _fill(model: ModelLike, probe: Probe, row: int) -> SessionLike:
    """Return a session that holds one sequence, its last tokens decoded."""
    length = probe.lengths[row]
    ids = probe.input_ids[row : row + 1, :length]
    session = model.new_session(max_batch_size=1, max_seq_len=length)
    start = max(length - STEPS, 1)
    session.prefill(ids[:, :start])
    for place in range(start, length):
        session.decode(ids[:, place])
    return session


def _largest(errors: Sequence[float | None]) -> float | None:
    """Return the largest error, or None if tensors of some sequence do not compare."""
    known = [error for error in errors if error is not None]
    return max(known) if known and len(known) == len(errors) else None
