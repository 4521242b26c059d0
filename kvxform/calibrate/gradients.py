"""Gradients of the next-token loss with respect to keys and values, for Fisher-weighted codecs.

Source: KVQuant, arXiv 2401.18079, section 3.3: the diagonal of the Fisher information matrix is
the expected squared gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import kvxform.ir.ops as kvx
from kvxform.calibrate.moments import Picks
from kvxform.ir.calibration import LayerStatistics
from kvxform.ir.program import Program
from kvxform.ir.watching import Watcher

STREAMS = ("k_pre", "k_post", "v")


def collect_gradients(
    program: Program, token_ids: Tensor, picks: Picks, layers: Mapping[int, LayerStatistics]
) -> dict[int, LayerStatistics]:
    """Return `layers` with the gradients at the samples of keys and values.

    Args:
        program: A program without a cache.
        token_ids: int64 `[windows, window]`, on the device of the program.
        picks: The sampled tokens.
        layers: What was collected before.
    """
    found: dict[tuple[int, str], list[Tensor]] = {}
    for row, tokens in enumerate(token_ids):
        positions = picks.positions[picks.slots(row)].to(tokens.device)
        for key, gradient in _window_gradients(program, tokens).items():
            found.setdefault(key, []).append(gradient[0][:, positions].float().cpu())
    owners = {site.layer: site.owner for site in program.sites}
    return {
        layer: dataclasses.replace(
            statistics,
            **{
                stream: dataclasses.replace(
                    getattr(statistics, stream),
                    gradients=torch.cat(found[owners[layer], stream], 1),
                )
                for stream in STREAMS
                if getattr(statistics, stream) is not None
            },
        )
        for layer, statistics in layers.items()
    }


def _window_gradients(program: Program, tokens: Tensor) -> dict[tuple[int, str], Tensor]:
    """Return the gradient of the summed cross entropy at every operand of one window."""
    tracer = _Tracer(program)
    with torch.enable_grad():
        logits = tracer.show(tokens)[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="sum")
    gradients = torch.autograd.grad(loss, list(tracer.operands.values()))
    return dict(zip(tracer.operands, gradients, strict=True))


class _Tracer(Watcher):
    """Remembers the keys and values of one window, with what torch needs to differentiate."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.to_module())
        self._owners = {site.layer: site.owner for site in program.sites}
        self.operands: dict[tuple[int, str], Tensor] = {}

    def seen(self, layer: int, stream: str, x: Tensor) -> None:
        if stream in STREAMS and self._owners[layer] == layer:
            x.requires_grad_(True)  # nothing before the first keys is differentiated
            self.operands[layer, stream] = x

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(kvx.DIFFERENTIABLE.get(target, target), args, kwargs)
