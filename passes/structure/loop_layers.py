"""loop-layers: a window of layers runs K times, each time as one small step.

A window F of layers moves the residual stream from h to F(h). Applied twice as it is, it moves h
too far. So each loop takes a share of the way, h <- h + eta (F(h) - h): with eta = 1 / K these are
K forward Euler steps of the way that F goes in one. Nothing is trained; the cost is K - 1 times the
work of the window, and the cache of the window as often if every loop keeps its own.

Legal where one value alone, the residual stream, enters and leaves the window.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import fx

import kvxform.ir.ops as kvx
from kvxform.errors import PassError, RecipeError
from kvxform.ir.facts import Requirement
from kvxform.ir.layers import check_layers, named_layers
from kvxform.ir.program import AttentionSite, Program
from kvxform.ir.stream_cuts import layer_inputs, token_values
from kvxform.pass_base import GraphPass, Match, NoMatch, Numerics, Rewriter, approx, register_pass

WHERE = "loop-layers"
ADD = torch.ops.aten.add.Tensor
SUB = torch.ops.aten.sub.Tensor
MUL = torch.ops.aten.mul.Tensor
HINT = "choose a window whose layers share nothing with others but the residual stream"


@register_pass
@dataclass(frozen=True)
class LoopLayers(GraphPass):
    """Run a window of layers several times, in damped steps; one window of a model.

    Attributes:
        layers: The window, one run of layers such as `8-15`; the middle third by default.
        loops: How often it runs, K.
        mode: `block` loops the whole window, `layer` each of its layers alone.
        eta: Share of the way that a loop goes; 1 / K by default.
        cache: `each` loop has a cache of its own, or all of them read that of the `first`. That of
            the `last` is refused, see `__post_init__`.
    """

    layers: str | None = None
    loops: int = 2
    mode: Literal["block", "layer"] = "block"
    eta: float | None = None
    cache: Literal["each", "first", "last"] = "each"
    numerics: ClassVar[Numerics] = approx("kl")
    requires: ClassVar[tuple[Requirement, ...]] = (
        Requirement(
            "cache.inserted", (False,), because="each loop is a layer with its own place in a cache"
        ),
    )
    source: ClassVar[str] = "Training-Free Looped Transformers, arXiv 2605.23872"

    def __post_init__(self) -> None:
        """Check the options as far as that goes without a model.

        Raises:
            RecipeError: KVX107. One cache with what the last loop leaves in it is refused: an
                earlier loop of token t would need the last loop of token t - 1, so a prompt could
                only be read one token at a time, and any other way would depend on its chunks.
        """
        if self.layers is not None:
            check_layers(self.layers, WHERE)
        if self.loops < 1:
            raise RecipeError("KVX107", "loops must be at least 1", where=WHERE, got=self.loops)
        if self.eta is not None and not 0 < self.eta <= 1:
            rule = "eta must be above 0 and at most 1"
            raise RecipeError("KVX107", rule, where=WHERE, got=self.eta)
        if self.cache == "last":
            rule = "a loop must not read what later loops of earlier tokens leave behind"
            hint = "use cache: first, which costs as little, or cache: each"
            raise RecipeError("KVX107", rule, where=WHERE, got="cache: last", hint=hint)

    @property
    def step(self) -> float:
        """Share of the way that a loop goes."""
        return 1 / self.loops if self.eta is None else self.eta

    def match(self, program: Program) -> list[Match | NoMatch]:
        """Match the window, or each of its layers, the last one first.

        Raises:
            PassError: KVX205 if the model does not have such layers, or they are not one run.
        """
        inputs = layer_inputs(program)
        window = self._window(program)
        if any(WHERE in node.meta.get("via", ()) for node in program.graph.nodes):
            return [NoMatch("layers loop already", window[0], done=True)]
        if self.loops == 1 and self.step == 1:
            return [NoMatch("one loop is the model itself", window[0], done=True)]
        runs = [window] if self.mode == "block" else [[layer] for layer in reversed(window)]
        return [_check(inputs, run) for run in runs]

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        """Repeat one run of layers, and number the layers anew."""
        run = match.data["layers"]
        start, end = rewriter.node(match.data["input"]), rewriter.node(match.node)
        body, readers = _between(program, start, end), list(end.users)
        added = (self.loops - 1) * len(run)
        for site in program.sites[::-1]:
            if site.layer > run[-1]:
                node = program.attention_node(site.layer)
                rewriter.set_args(node, layer=site.layer + added)
        h = self._damped(rewriter, end, start, end)
        for loop in range(1, self.loops):
            known = self._shared(body, start, h)
            f = _copy(rewriter, body, known, after=h, shift=loop * len(run))
            h = self._damped(rewriter, f, h, f)
        for reader in readers:
            reader.replace_input_with(end, h)
        rewriter.set_sites(_repeated(program.sites, run, self.loops, self.cache == "first"))

    def _window(self, program: Program) -> list[int]:
        layers = [site.layer for site in program.sites]
        if self.layers is None:
            third = len(layers) // 3
            return layers[third : len(layers) - third]
        window = list(named_layers(self.layers, layers, WHERE))
        if window != layers[layers.index(window[0]) :][: len(window)]:
            rule = "a window must be one run of layers"
            raise PassError("KVX205", rule, where=WHERE, got=self.layers)
        return window

    def _damped(self, rewriter: Rewriter, after: fx.Node, h: fx.Node, f: fx.Node) -> fx.Node:
        """Return `h + step (f - h)`."""
        if self.step == 1:
            return f
        type_ = f.meta["type"]
        way = rewriter.call_after(after, SUB, (f, h), type_=type_)
        part = rewriter.call_after(way, MUL, (way, self.step), type_=type_)
        return rewriter.call_after(part, ADD, (h, part), type_=type_)

    def _shared(
        self, body: Sequence[fx.Node], start: fx.Node, h: fx.Node
    ) -> dict[fx.Node, fx.Node]:
        """Return what copies read in the place of nodes of the run that are not copied."""
        known = {start: h}
        if self.cache == "first":
            attentions = [node for node in body if node.target is kvx.ATTENTION]
            operands = [node.args[i] for node in attentions for i in (1, 2)]
            known |= {node: node for node in operands if isinstance(node, fx.Node)}
        return known


def _check(inputs: Mapping[int, fx.Node], run: Sequence[int]) -> Match | NoMatch:
    layer, behind = run[0], run[-1] + 1
    if layer not in inputs:
        reason = f"more than one value goes into layer {layer}"
        return NoMatch(reason, layer, hint=HINT)
    if behind not in inputs:
        reason = f"more than one value, or none that is a sum, leaves layer {behind - 1}"
        return NoMatch(reason, layer, hint=HINT)
    start, end = inputs[layer], inputs[behind]
    if start.meta["type"] != end.meta["type"]:
        reason = f"what leaves layer {behind - 1} is not of the type of what goes into {layer}"
        return NoMatch(reason, layer, end.name)
    return Match(layer, end.name, {"layers": list(run), "input": start.name})


def _between(program: Program, start: fx.Node, end: fx.Node) -> list[fx.Node]:
    """Return the nodes that `end` is made with from `start`; sizes are read, not copied."""
    nodes = list(token_values(program))
    return nodes[nodes.index(start) + 1 : nodes.index(end) + 1]


def _copy(
    rewriter: Rewriter,
    body: Sequence[fx.Node],
    known: dict[fx.Node, fx.Node],
    *,
    after: fx.Node,
    shift: int,
) -> fx.Node:
    """Copy `body` to behind `after`, with nodes of `known` replaced, and return the last copy.

    Copies of attention are `shift` layers further on.
    """
    for node in body:
        if node in known:
            continue
        args, kwargs = _with(node.args, known), dict(_with(node.kwargs, known))
        if node.target is kvx.ATTENTION:
            kwargs["layer"] += shift
        assert callable(node.target), "values are made by calls"
        type_ = node.meta["type"]
        after = rewriter.call_after(after, node.target, args, kwargs, type_=type_, like=node)
        known[node] = after
    return after


def _with(values: Any, known: Mapping[fx.Node, fx.Node]) -> Any:
    """Return arguments of a call with nodes of `known` replaced."""
    return fx.node.map_arg(values, lambda node: known.get(node, node))


def _repeated(
    sites: Sequence[AttentionSite], run: Sequence[int], loops: int, shared: bool
) -> tuple[AttentionSite, ...]:
    """Return the sites with those of `run` once for each loop, in graph order."""
    width, added = len(run), (loops - 1) * len(run)
    own = [site for site in sites if site.layer in run]
    copies = [
        _moved(site, loop * width, site.owner if shared else None)
        for loop in range(1, loops)
        for site in own
    ]
    before = [site for site in sites if site.layer < run[0]]
    behind = [_moved(site, added, None) for site in sites if site.layer > run[-1]]
    return (*before, *own, *copies, *behind)


def _moved(site: AttentionSite, shift: int, owner: int | None) -> AttentionSite:
    """Return `site` as a later layer that reads `owner`, or whose owner moves with it."""
    if owner is None and site.shared_with is not None:
        owner = site.shared_with + shift
    return dataclasses.replace(site, layer=site.layer + shift, shared_with=owner)
