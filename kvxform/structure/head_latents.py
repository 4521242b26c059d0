"""KV heads that share one latent: only its first channels are cached, and every read undoes it.

The heads of a group are joined and turned into the basis of their principal components. As many
components are stored as one head has channels. Keys may be stored before RoPE, where they have more
in common: attention turns what it reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvxform.codecs.exact import ExactCodec
from kvxform.codecs.truncate import TruncateCodec
from kvxform.ir.fitting import stream_statistics
from kvxform.ir.program import AttentionSite, Program, projection_weights
from kvxform.ir.stream_plan import StreamPlan
from kvxform.pass_base import Loss, Match, NoMatch, Rewriter
from kvxform.rotations.at_read import turn_at_read
from kvxform.structure.components import Components, principal_components
from kvxform.structure.head_mixes import join_heads


def latent_match(program: Program, site: AttentionSite, groups: int) -> Match | NoMatch:
    """Return the bases of K and V of each group of heads of a site that owns its cache.

    Raises:
        PassError: KVX205 if RoPE turns a part of the keys that are cached before it.
    """
    if program.plan is None:
        hint = "put insert-cache and cache-prerope before it"
        return NoMatch("there is no cache whose reads could undo a latent", site.layer, hint=hint)
    bases: dict[str, Tensor] = {}
    losses: list[Loss] = []
    heads = torch.arange(site.num_kv_heads).view(groups, -1).tolist()
    for name, stream in program.plan.site(site.layer).streams.items():
        found = _components(program, site, name, stream, groups)
        bases[name] = torch.stack([own.basis for own in found])
        for own, group in zip(found, heads, strict=True):
            if program.calibration is not None:
                lost = own.lost(stream.head_dim, has_mean=False) / float(own.energy.sum())
                losses.append(Loss(site.layer, name, lost**0.5, tuple(group)))
    return Match(site.layer, data=bases, losses=tuple(losses))


def keep_latents(rewriter: Rewriter, layer: int, bases: Mapping[str, Any]) -> None:
    """Store the first components of each group of heads, and let every reader turn them back."""
    program = rewriter.program
    codec = ExactCodec(program.info.dtype)
    for reader in program.readers(layer):
        rewriter.mark_touched(projection_weights(reader.q, reader.k, reader.v, reader.o))
    for name, basis in bases.items():
        turn_at_read(rewriter, layer, name, basis, basis.mT.contiguous())
        for reader in program.readers(layer):
            assert program.plan is not None, "there is a cache"
            stream = program.plan.site(reader.layer).streams[name]
            heads = basis.shape[1] // stream.head_dim
            kept = TruncateCodec(stream.head_dim, stream.head_dim, heads, codec)
            planned = dataclasses.replace(
                stream,
                codec=kept.to_dict(),
                planes=kept.planes(stream.head_dim),
                calibration=program.calibration.name if program.calibration else None,
            )
            rewriter.update_site_plan(reader.layer, **{name: planned})


def _components(
    program: Program, site: AttentionSite, name: str, stream: StreamPlan, groups: int
) -> list[Components]:
    """Return the components of each group of heads; those of nothing in a dry run."""
    if program.calibration is None:
        return [Components.identity(site.num_kv_heads // groups * stream.head_dim)] * groups
    statistics = stream_statistics(program, site.layer, name, stream.rope)
    joined = join_heads(statistics.samples, groups)
    return [principal_components(x, centred=False) for x in joined]
