"""What is minimised: errors of single attentions, then the divergence of the logits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kvxform.healing.blocks import cut_graph, find_blocks, tapped_graph, weights_behind
from kvxform.healing.running import Differentiable
from kvxform.ir.program import Program

Weights = Mapping[str, Tensor]


class LocalTask:
    """Outputs of attentions on the residual streams of the source, against its outputs.

    Source: layer-wise reconstruction as in CSKV, arXiv 2409.10593, section 2.2, at the output of
    the attention, where errors of K and V count as much as they matter.

    Args:
        program: What is healed.
        source: The source program, without a cache.
        trained: Names of the weights that are trained; other attentions are left out.
    """

    def __init__(self, program: Program, source: Program, trained: tuple[str, ...]) -> None:
        self.note = ""
        own, theirs = find_blocks(program, source), find_blocks(source)
        modules = [module for module in own if module in theirs]
        if program.facts["residual.basis"] != "identity":
            self.note = "attentions were not trained alone: the residual stream has another basis"
            modules = []
        blocks = [own[module] for module in modules]
        behind = weights_behind(cut_graph(program, blocks, [block.end for block in blocks]))
        chosen = [m for m, names in zip(modules, behind, strict=True) if names & set(trained)]
        self.layers = tuple(own[module].layer for module in chosen)
        if not chosen:
            self.note = self.note or "no attention that was trained could be compared alone"
            return
        self._cut = Differentiable(
            program, cut_graph(program, blocks, [own[m].end for m in chosen])
        )
        names = [theirs[m].start for m in modules] + [theirs[m].end for m in chosen]
        self._tapped = Differentiable(source, tapped_graph(source, names))
        self._inputs, self._source = len(modules), source

    def squares(self, weights: Weights, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return for every layer the summed squares of the error and of the source's output."""
        with torch.no_grad():
            found = self._tapped(self._source.weights, ids)
        streams, wanted = found[: self._inputs], found[self._inputs :]
        made = self._cut(weights, ids, *streams)
        return [
            ((y.float() - x.float()).square().sum(), x.float().square().sum())
            for y, x in zip(made, wanted, strict=True)
        ]

    def loss(self, weights: Weights, ids: Tensor) -> Tensor:
        """Return the mean over layers of the squared error as a share of the source's output."""
        shares = [error / size for error, size in self.squares(weights, ids)]
        return torch.stack(shares).mean()

    def errors(self, weights: Weights, rows: Tensor) -> list[float]:
        """Return the relative error of every layer over all windows, `rows` `[N, S]`."""
        if not self.layers:
            return []
        sums = torch.zeros(len(self.layers), 2, dtype=torch.float64)
        with torch.no_grad():
            for row in rows:
                pairs = self.squares(weights, row[None])
                sums += torch.stack([torch.stack(pair) for pair in pairs]).double().cpu()
        errors: list[float] = (sums[:, 0] / sums[:, 1]).sqrt().tolist()
        return errors


class LogitsTask:
    """Logits against those of the source.

    Args:
        program: What is healed.
        source: The source program.
    """

    def __init__(self, program: Program, source: Program) -> None:
        self._own, self._theirs = Differentiable(program), Differentiable(source)
        self._source = source

    def loss(self, weights: Weights, ids: Tensor) -> Tensor:
        """Return the mean KL(source || program) per token, in nats."""
        with torch.no_grad():
            wanted = self._theirs(self._source.weights, ids).float().log_softmax(-1)
        found = self._own(weights, ids).float().log_softmax(-1)
        return torch.nn.functional.kl_div(
            found.flatten(0, 1), wanted.flatten(0, 1), reduction="batchmean", log_target=True
        )
