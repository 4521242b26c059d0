"""Collects statistics of every attention site while the source program reads a text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

import kvxform.ir.ops as kvx
from kvxform.calibrate.gradients import collect_gradients
from kvxform.calibrate.moments import Picks, StreamMoments, pick_tokens, sample_limit
from kvxform.ir.calibration import Calibration, LayerStatistics
from kvxform.ir.fitting import turned_channels
from kvxform.ir.linear import as_linear
from kvxform.ir.program import AttentionSite, Program
from kvxform.ir.watching import Watcher, column_weights

Progress = Callable[[int, int], None]  # windows done, windows in all


def collect(
    program: Program,
    token_ids: Tensor,
    *,
    name: str,
    seed: int = 0,
    fisher: bool = False,
    progress: Progress | None = None,
) -> Calibration:
    """Run `program` over windows of text and return what its attentions saw.

    Memory is bounded: one window of activations, the moments, and samples up to
    `moments.SAMPLE_BYTES`. Equal arguments give equal statistics.

    Args:
        program: A program without a cache, as capture made it, on any device.
        token_ids: The text, int64 `[windows, window]`; each row is a sequence of its own.
        name: What it is, for reports.
        seed: Seed of the choice of samples.
        fisher: Collect gradients at the samples too, at the cost of a backward pass.
        progress: Called after each window.
    """
    windows, window = token_ids.shape
    picks = pick_tokens(windows, window, sample_limit(program.sites), seed)
    device = next(iter(program.weights.values())).device
    collector = _Collector(program, picks)
    with torch.no_grad():
        for row in range(windows):
            collector.read(token_ids[row].to(device), row)
            if progress is not None:
                progress(row + 1, windows)
    layers, inputs = collector.finish(), collector.inputs()
    if fisher:
        layers = collect_gradients(program, token_ids.to(device), picks, layers)
    return Calibration(name, token_ids.cpu(), layers, inputs)


class _Collector(Watcher):
    """Adds every window to the moments of all streams."""

    def __init__(self, program: Program, picks: Picks) -> None:
        super().__init__(_without_tail(program.to_module()))
        self._sites = {site.layer: site for site in program.sites}
        self._picks, self._row, self._windows = picks, 0, 0
        self._streams: dict[tuple[int, str], StreamMoments] = {}
        self._weighted: dict[int, Tensor] = {}
        self._envelopes: dict[int, Tensor] = {}
        weights = {p.weight for site in program.sites for p in (site.k, site.v) if p is not None}
        self._linears = {
            node: (call, x)
            for node in self.graph.nodes
            for x in node.all_input_nodes
            for call in [as_linear(node, x)]
            if call is not None and call.weight in weights
        }
        self._magnitudes: dict[str, Tensor] = {}

    def read(self, token_ids: Tensor, row: int) -> None:
        self._row = row
        self._windows += 1
        self.show(token_ids)

    def seen(self, layer: int, stream: str, x: Tensor) -> None:
        site = self._sites[layer]
        if stream[0] != "q" and site.owner != layer:
            return  # the same keys and values as at their owner
        if (layer, stream) not in self._streams:
            heads, dim = x.shape[1], x.shape[-1]
            self._streams[layer, stream] = StreamMoments(heads, dim, self._picks, x.device)
        self._streams[layer, stream].add(x[0], self._row)
        if stream == "k_post":
            reach = largest_reach(site, x[0].float())
            before = self._envelopes.get(layer, reach)
            self._envelopes[layer] = torch.maximum(before, reach)

    def run_node(self, n: fx.Node) -> Any:
        if n in self._linears:
            self._add_input(n)
        if n.target is kvx.ATTENTION:
            (q, k, v, positions), options = self.fetch_args_kwargs_from_env(n)
            weights = column_weights(q, k, positions, **options)
            wide = v[0].double()
            gram = (wide * weights[..., None]).mT @ wide
            layer = options["layer"]
            self._weighted[layer] = self._weighted.get(layer, torch.zeros_like(gram)) + gram
        return super().run_node(n)

    def _add_input(self, node: fx.Node) -> None:
        call, x = self._linears[node]
        magnitude = self.env[x].abs().flatten(0, -2).mean(0, dtype=torch.float64)
        before = self._magnitudes.get(call.weight)
        self._magnitudes[call.weight] = magnitude if before is None else before + magnitude

    def inputs(self) -> dict[str, Tensor]:
        """Return E[|x|] of what K and V are projected from, by weight."""
        return {name: (x / self._windows).cpu() for name, x in self._magnitudes.items()}

    def finish(self) -> dict[int, LayerStatistics]:
        """Return the statistics of every layer."""
        streams = {key: moments.finish() for key, moments in self._streams.items()}
        return {
            layer: LayerStatistics(
                k_post=streams[site.owner, "k_post"],
                v=streams[site.owner, "v"],
                q_post=streams[layer, "q_post"],
                v_weighted=(self._weighted[layer] / self._windows).cpu(),
                envelope=self._envelopes[site.owner].cpu(),
                k_pre=streams.get((site.owner, "k_pre")),
                q_pre=streams.get((layer, "q_pre")),
            )
            for layer, site in self._sites.items()
        }


def largest_reach(site: AttentionSite, keys: Tensor) -> Tensor:
    """Return the largest magnitude that each channel of `keys` can have at any position.

    Args:
        site: Where the keys are read; says which channels RoPE turns, and in which pairs.
        keys: Keys after RoPE, `[Hk, S, D]`; the radius of a pair does not depend on the position.

    Returns:
        `[Hk, D]`.
    """
    reach = keys.abs().amax(1)
    if site.rope is None:
        return reach
    turned = turned_channels(site)
    pairs = keys[..., turned].unflatten(-1, (-1, 2) if site.rope.interleaved else (2, -1))
    axis = -1 if site.rope.interleaved else -2
    radius = pairs.square().sum(axis, keepdim=True).amax(1).sqrt()
    reach[..., turned] = radius.expand(-1, *pairs.shape[2:]).flatten(-2)
    return reach


def _without_tail(module: fx.GraphModule) -> fx.GraphModule:
    """Remove what no attention needs: the last MLP and the logits, which are wide."""
    attentions = [n for n in module.graph.nodes if n.target is kvx.ATTENTION]
    (output,) = (n for n in module.graph.nodes if n.op == "output")
    output.args = (tuple(attentions),)
    module.graph.eliminate_dead_code()
    return module
