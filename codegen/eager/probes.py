"""Attention that new queries pay to the tokens of their chunk, for codecs that rank tokens.

See `kvxform.codecs.saliency` for what a score is. What is returned here is the part of it that the
queries of one step add to the tokens at hand; a store sums it up until a chunk is complete.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvxform.codecs.saliency import SaliencyCodec
from kvxform.codegen.eager.flush import RuleStep


def probe_scores(
    codec: SaliencyCodec, rule_step: RuleStep, stage: Tensor, q: Tensor, scale: float
) -> Tensor:
    """Return the attention that tokens at hand get from the probes among the new queries.

    Args:
        codec: Says which queries are probes.
        rule_step: Positions of the tokens at hand.
        stage: Exact keys at hand, `[B, n, Hk, D]`.
        q: New queries `[B, H, S, D]`, in the basis of the keys.
        scale: Factor of the scores.

    Returns:
        float64 `[B, n, Hk]`.
    """
    step = rule_step.step
    heads = stage.shape[2]
    found = torch.zeros(stage.shape[:3], dtype=torch.float64, device=stage.device)
    new = step.starts[:, None] + torch.arange(step.num_new, device=stage.device)
    body = new - rule_step.rule.sink
    is_place = torch.zeros(codec.chunk, dtype=torch.bool, device=stage.device)
    is_place[list(codec.probes)] = True
    is_probe = (body >= 0) & (new < step.ends[:, None]) & is_place[body % codec.chunk]  # [B, S]
    columns = is_probe.any(0).nonzero()[:, 0]
    if columns.numel() == 0:
        return found
    positions = rule_step.stage_positions  # [B, n]; -1 where there is no token
    stored = positions - rule_step.rule.sink
    first = body - body % codec.chunk  # first token of the chunk of each query
    mask = (stored[:, None] >= first[:, columns, None]) & (stored >= 0)[:, None]
    mask &= positions[:, None] <= new[:, columns, None]
    mask &= is_probe[:, columns, None]  # [B, P, n]
    probes = q[:, :, columns].double().unflatten(1, (heads, -1)).flatten(2, 3)
    keys = stage.transpose(1, 2).double()  # [B, Hk, n, D]
    scores = (scale * (probes @ keys.mT)).unflatten(2, (-1, len(columns)))  # [B, Hk, G, P, n]
    hidden = ~mask[:, None, None]
    weights = torch.softmax(scores.masked_fill(hidden, -math.inf), -1)
    weights = weights.masked_fill(hidden, 0.0)  # a row without probe is all hidden
    return weights.sum((2, 3)).transpose(1, 2)  # [B, n, Hk]
