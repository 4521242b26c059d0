"""What a cached model itself does with every sequence alone and in one piece.

Where the source model is not at hand, this is what all other ways to bring tokens into the cache
are compared with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvxform.ir.cache import watch_caches
from kvxform.verify.probe import Probe, SourceRun
from kvxform.verify.protocols import ModelLike
from kvxform.verify.replay import Replay
from kvxform.verify.schedules import Prefill

Held = dict[int, tuple[Tensor, Tensor]]  # K and V `[Hk, T, D]` by layer


def run_in_one_piece(model: ModelLike, sequences: Probe) -> SourceRun:
    """Run every sequence of a probe by itself through a new cache.

    Returns:
        Logits, and K and V as they are handed to the cache, in the basis of the source; as
        `run_source` has them of a model without a cache. Where no cache can be watched, what it
        holds instead.
    """
    runs = [_run_one(model, sequences, index) for index in range(len(sequences.lengths))]
    logits = _stack([logits.T for logits, _ in runs]).mT  # [B, S, vocab]
    keys, values, latents = dict[int, Tensor](), dict[int, Tensor](), dict[int, Tensor]()
    assert model.plan is not None, "the model has a cache"
    for layer in runs[0][1]:
        key = _stack([held[layer][0] for _, held in runs])
        value = _stack([held[layer][1] for _, held in runs])
        is_latent = model.plan.site(layer).payload == "latent"
        (latents if is_latent else keys)[layer] = key
        keys.setdefault(layer, key)
        values[layer] = value
    return SourceRun(logits, keys, values, latents)


@torch.inference_mode()
def _run_one(model: ModelLike, sequences: Probe, index: int) -> tuple[Tensor, Held]:
    """Return logits `[S, vocab]` of one sequence, and what is handed to its cache."""
    length = sequences.lengths[index]
    run = Replay(model, Probe(sequences.input_ids[index : index + 1, :length], (length,)))
    with watch_caches(run.shadow.watch):
        run.act(Prefill({0: length}, sequences={0: 0}, all_logits=True))
    logits = torch.stack([run.logits[0, position] for position in range(length)])
    return logits, {site.layer: _handed_in(run, site.layer) for site in run.plan.appending}


def _handed_in(run: Replay, layer: int) -> tuple[Tensor, Tensor]:
    logical = run.session.logical_cache(layer)
    if run.plan.layout.kind == "checkpoint":
        return logical.k[0], logical.v[0]
    stored = {
        name: run.shadow.in_source(layer, name, x)
        for name, x in run.shadow.stored(layer, 0).items()
    }
    return stored["key"], stored.get("value", logical.v[0])


def _stack(parts: Sequence[Tensor]) -> Tensor:
    """Return tensors `[..., T, D]` or `[..., T]` of several lengths T as one, zeros at the end."""
    axis = 1
    longest = max(x.shape[axis] for x in parts)
    out = parts[0].new_zeros(len(parts), *_with_length(parts[0], longest))
    for place, part in zip(out, parts, strict=True):
        place[:, : part.shape[axis]] = part
    return out


def _with_length(x: Tensor, length: int) -> tuple[int, ...]:
    return (x.shape[0], length, *x.shape[2:])
