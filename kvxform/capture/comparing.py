"""The last proof: a captured program gives the logits of its source."""

from __future__ import annotations

import torch

from kvxform.capture.exporting import ExportedReference, LogitsOnly
from kvxform.capture.probing import TOLERANCE, error
from kvxform.capture.structure import literals, op_name
from kvxform.errors import CaptureError
from kvxform.ir.program import Program, default_positions
from kvxform.ir.rounding import rounding_dtype

_TRIALS = ((2, 7, 0), (1, 1, 0), (3, 11, 5))  # batch, length and first position
_LONGEST_CHUNK = 1024  # numbers above are sizes of something else


def compare(program: Program, reference: LogitsOnly | ExportedReference) -> float:
    """Return the largest absolute difference of logits between a program and its source.

    Raises:
        CaptureError: KVX304 if it is more than the dtype explains.
    """
    module, rows = program.to_module(), embedding_rows(program)
    coarse = rounding_dtype(program)
    generator, worst = torch.Generator().manual_seed(0), 0.0
    device = next((w.device for w in program.weights.values()), torch.device("cpu"))
    for *shape, start in (*_TRIALS, *_long_trials(program)):
        input_ids = torch.randint(0, rows, shape, generator=generator).to(device)
        positions = default_positions(input_ids) + (start if reference.takes_positions else 0)
        with torch.no_grad():
            want = reference(input_ids, positions)
            try:
                got = module(input_ids, positions)
            except RuntimeError:  # sizes that do not fit
                got = want.new_empty(0)
        relative = error(got, want)
        if relative > 10 * TOLERANCE.get(coarse, TOLERANCE[torch.float32]):
            raise CaptureError(
                "KVX304",
                "the captured program must give the logits of the source",
                where="capture",
                got=f"a relative difference of {relative:.1e} at batch and length {shape}",
            )
        worst = max(worst, float((got - want).abs().max()))
    return worst


def _long_trials(program: Program) -> list[tuple[int, int, int]]:
    length = longest_trial(program)
    return [] if length is None else [(1, length, 0)]


def longest_trial(program: Program) -> int | None:
    """Return a length beyond any chunk of the mixers that are not attention, or None without them.

    State-space layers work in chunks. A trace of fewer tokens than a chunk may hold for one chunk
    only, and no probe looks into such a layer.
    """
    if all(r.kind != "mixer" for r in program.rejected):
        return None
    shortest = _TRIALS[0][1]
    sizes = [n for _, n in literals(program.graph.nodes, int) if shortest < n <= _LONGEST_CHUNK]
    length = 2 * max(sizes, default=shortest) + 3
    return min(length, program.info.context_length or length)


def embedding_rows(program: Program) -> int:
    """Return how many token ids the model knows."""
    for node in program.graph.nodes:
        if op_name(node) == "embedding" and node.args[1] is not program.placeholder("position_ids"):
            return int(program.weights[str(node.args[0].target)].shape[0])
    return program.info.vocab_size
