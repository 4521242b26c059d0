"""Digests: what a model computes on fixed tokens, as a few numbers with a tolerance.

The model is run in float64 (see `widening`), so that two machines get the same numbers. They are
kept on a grid far coarser than the rounding that is left, and compared by a tolerance: builds by
other versions of torch may differ by the rounding of folded weights.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from kvxform.codegen.eager.lowering import EagerExecutable
from kvxform.ir.program import Program, default_positions
from kvxform.locks.sketches import Sketch, make_sketch
from kvxform.locks.widening import widen
from kvxform.recipe import Target
from kvxform.runtime.executables import make_executable
from kvxform.runtime.session import Session
from kvxform.verify.cache_state import is_lossy
from kvxform.verify.prober import first_encoded_length

TOKENS = (48, 17)  # ragged; longer where a plan encodes nothing before
_SEED = "kvxform lock"
_LOGIT_STEPS, _LAYER_STEPS = 16, 8
# Relative differences of two builds by dtype of the weights; weights are folded, then rounded.
_TOLERANCES = {
    torch.float64: 1e-7,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
_LOSSY = 2e-2  # single codes have moved
_STEPS_PER_TOLERANCE = 8


@dataclass(frozen=True)
class LayerDigest:
    """What one layer has cached, as the source model would hold it."""

    layer: int
    key: Sketch
    value: Sketch


@dataclass(frozen=True)
class Digest:
    """What a model computes on fixed tokens.

    Attributes:
        lengths: Tokens of each sequence.
        kind: `exact` or `lossy`: whether the cache loses precision.
        tolerance: Relative difference of two builds that is rounding.
        greedy: Likeliest next token at every position.
        logits: Logits at every position.
        layers: Every layer with a cache.
    """

    lengths: tuple[int, ...]
    kind: str
    tolerance: float
    greedy: tuple[int, ...]
    logits: Sketch
    layers: tuple[LayerDigest, ...] = ()

    @property
    def grid(self) -> float:
        """One step of the sketches."""
        return self.tolerance / _STEPS_PER_TOLERANCE


def make_digest(program: Program, lengths: tuple[int, ...] | None = None) -> Digest:
    """Run a program on fixed tokens.

    Args:
        program: With or without a cache.
        lengths: Tokens of each sequence; by default enough for every stream to encode some.
    """
    lengths = lengths or _choose_lengths(program)
    lossy = program.plan is not None and is_lossy(program.plan, program.dtype)
    tolerance = _TOLERANCES.get(program.dtype, _TOLERANCES[torch.float32])
    tolerance = max(tolerance, _LOSSY) if lossy else tolerance
    grid = tolerance / _STEPS_PER_TOLERANCE
    ids, mask = fixed_tokens(program.info.vocab_size, lengths)
    with torch.inference_mode():
        logits, caches = _run(widen(program), ids, mask)
    layers = tuple(
        LayerDigest(
            layer,
            make_sketch(k, f"key {layer}", _LAYER_STEPS, grid),
            make_sketch(v, f"value {layer}", _LAYER_STEPS, grid),
        )
        for layer, (k, v) in caches.items()
    )
    return Digest(
        lengths=lengths,
        kind="lossy" if lossy else "exact",
        tolerance=tolerance,
        greedy=tuple(logits.argmax(-1).tolist()),
        logits=make_sketch(logits, "logits", _LOGIT_STEPS, grid),
        layers=layers,
    )


def fixed_tokens(vocab_size: int, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return token ids and mask, int64 `[B, S]`, padded on the right."""
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    generator = random.Random(_SEED)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.tensor([generator.getrandbits(31) for _ in range(length)])
        mask[row, :length] = 1
    return ids % vocab_size, mask


def _choose_lengths(program: Program) -> tuple[int, ...]:
    needed = first_encoded_length(program.plan)
    longest = max(TOKENS[0], needed + needed // 4 + 8 if needed > 1 else 0)
    limit = program.info.context_length or longest
    return tuple(min(n, limit) for n in (longest, *TOKENS[1:]))


def _run(
    program: Program, ids: Tensor, mask: Tensor
) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor]]]:
    """Return logits `[positions, vocab]`, and K and V `[positions, Hk, D]` by layer."""
    real = mask.bool()
    if program.plan is None:
        return EagerExecutable(program)(ids, default_positions(ids))[real], {}
    session = Session(
        make_executable(program, Target()), max_batch_size=len(ids), max_seq_len=ids.shape[1]
    )
    logits = session.prefill(ids, mask, all_logits=True)[real]
    caches = {}
    for site in program.plan.sites:
        held = session.logical_cache(site.layer)
        caches[site.layer] = (_by_token(held.k), _by_token(held.v))
    return logits, caches


def _by_token(rows: tuple[Tensor, ...]) -> Tensor:
    """Return `[Hk, T, D]` of every row as `[tokens, Hk, D]`."""
    return torch.cat([row.transpose(0, 1) for row in rows]).double()
