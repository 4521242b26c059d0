"""share-kv-layers: layers read the keys and values of an earlier layer, and lose their own.

A reader attends to the keys (after RoPE) and values of its owner with its own queries and its own
output projection. Its W_k and W_v, their biases and norms are removed, and a cache holds the
owner's alone. Legal where reader and owner agree on KV heads, head_dim, RoPE, window and chunk;
exact where the keys and values of the reader were those of the owner all along. On other models
what it does has to be measured, and as a rule healed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import fx

from kvxform.errors import PassError, RecipeError
from kvxform.ir.facts import Requirement
from kvxform.ir.linear import ADDMM, LINEAR, PRODUCTS, weight_uses
from kvxform.ir.program import Program, projection_weights
from kvxform.pass_base import (
    Exactness,
    GraphPass,
    Loss,
    Match,
    NoMatch,
    Numerics,
    Rewriter,
    register_pass,
)
from kvxform.structure.narrowing import is_transpose, keep_queries
from kvxform.structure.owner_map import (
    as_owner_map,
    disagreement,
    every_nth,
    owners_of,
    read_owner_map,
    resolve,
)
from kvxform.structure.owner_search import SharingBench, in_order, search
from kvxform.structure.windows import spread_windows

WHERE = "share-kv-layers"


@register_pass
@dataclass(frozen=True)
class ShareKvLayers(GraphPass):
    """Let layers read the keys and values of earlier ones; only those owners have a cache.

    Attributes:
        planner: Who reads whom: `every-n`, the first of every `n` layers owns the cache of all of
            them; `search`, pairs by distance on the calibration text, each kept if the model stays
            similar; `explicit`, as `map` or `file` says.
        n: Layers to a cache, for `every-n`.
        share: Largest part of all layers that a search may make readers.
        threshold: A search keeps a pair if the mean cosine similarity of last hidden states with
            those of the model as it was is larger.
        order: Which pairs a search tries first: the most `dissimilar` or the most `similar`.
        tokens: Tokens of the calibration text to search on.
        window: Tokens of a sequence.
        map: Owner of each reader; a chain leads to its end. Layers left out stay as they are.
        file: The same in a JSON or YAML file, or a list with the owner of every layer.
    """

    planner: Literal["every-n", "search", "explicit"] = "every-n"
    n: int = 2
    share: float = 0.25
    threshold: float = 0.5
    order: Literal["dissimilar", "similar"] = "dissimilar"
    tokens: int = 2048
    window: int = 64
    map: Mapping[str, int] | None = None
    file: str | None = None
    numerics: ClassVar[Numerics] = Numerics(Exactness.NEEDS_TRAINING, "kl")
    requires: ClassVar[tuple[Requirement, ...]] = (
        Requirement(
            "cache.inserted", (False,), because="every layer would have its own cache already"
        ),
    )
    source: ClassVar[str] = (
        "Cross-Layer Attention, arXiv 2405.12981, section 2.2;"
        " KVSharer, arXiv 2410.18517, section 3"
    )

    def __post_init__(self) -> None:
        """Check the options as far as that goes without a model."""
        given = (self.map is not None) + (self.file is not None)
        if given != (self.planner == "explicit"):
            rule = "explicit needs either map or file, other planners neither"
            raise RecipeError("KVX107", rule, where=WHERE, got=f"planner {self.planner}")
        if self.map is not None:
            as_owner_map(self.map, WHERE)
        for name, least in (("n", 1), ("tokens", 2), ("window", 2)):
            if getattr(self, name) < least:
                rule = f"{name} must be at least {least}"
                raise RecipeError("KVX107", rule, where=WHERE, got=getattr(self, name))
        if not 0 <= self.share < 1:
            raise RecipeError("KVX107", "share must be from 0 to 1", where=WHERE, got=self.share)

    @property
    def needs_calibration(self) -> bool:
        """A search runs the model on a text."""
        return self.planner == "search"

    def match(self, program: Program) -> list[Match | NoMatch]:
        """Match every layer that gets another owner.

        Raises:
            RecipeError: KVX107 if the file is no map.
            PassError: KVX205 if the map does not fit the model: unknown layers, an owner after its
                reader, or layers that disagree about what is cached.
        """
        roots = self._roots(program)
        if self.planner == "search" and all(layer == owner for layer, owner in roots.items()):
            hint = "take a larger share, a lower threshold or the other order"
            return [NoMatch("the search found no layers to share", hint=hint)]
        found: list[Match | NoMatch] = []
        for site in program.sites:
            owner, node = roots[site.layer], program.attention_node(site.layer)
            if owner == site.owner:
                reads = "its own" if owner == site.layer else f"layer {owner}'s"
                found.append(NoMatch(f"keeps to {reads} keys and values", site.layer, done=True))
                continue
            _require_agreement(program, owner, site.layer)
            found.append(
                Match(
                    site.layer,
                    node.name,
                    {"owner": owner},
                    losses=_losses(program, owner, site.layer),
                    note=f"layer {site.layer} reads the cache of layer {owner}",
                )
            )
        return found

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        """Let one attention read the keys and values of another layer."""
        assert match.layer is not None, "every match is at a site"
        layer, owner = match.layer, match.data["owner"]
        node, source = rewriter.node(match.node), program.attention_node(owner)
        rewriter.set_args(node, (node.args[0], *source.args[1:3], *node.args[3:]))
        rewriter.remove_dead_calls()
        stored = program.site(owner)
        keep_queries(rewriter, layer)
        rewriter.update_site(layer, shared_with=owner, k=stored.k, v=stored.v, latent=None)
        rewriter.mark_touched(_own_weights(program, layer))
        rewriter.mark_touched(projection_weights(stored.k, stored.v))  # they serve both layers now

    def _roots(self, program: Program) -> dict[int, int]:
        """Return the owner of every layer."""
        present = owners_of(program.sites)
        layers = list(present)
        if self.planner == "search":
            return self._search(program, present)
        if self.planner == "every-n":
            wanted = every_nth(layers, self.n)
        elif self.file is not None:
            wanted = read_owner_map(self.file, layers, WHERE)
        else:
            assert self.map is not None, "checked with the options"
            wanted = as_owner_map(self.map, WHERE)
        return resolve(present, wanted, WHERE)

    def _search(self, program: Program, present: dict[int, int]) -> dict[int, int]:
        """Return what the search finds; in a dry run, as many readers as it may make at most."""
        readers = int(self.share * len(present))
        agreeing = [
            (a, b) for a in present for b in present if a < b and not disagreement(program, a, b)
        ]
        if program.calibration is None:
            late = sorted(agreeing, key=lambda pair: (-pair[1], -pair[0]))
            found = search(present, late, lambda _: 1.0, threshold=0.0, readers=readers)
            return dict(found.owners)
        text = spread_windows(program.calibration.token_ids, self.tokens, self.window)
        bench = SharingBench(program, text)
        distances = bench.distances()
        pairs = in_order(
            {pair: distances[pair] for pair in agreeing if pair in distances}, self.order
        )
        found = search(present, pairs, bench.similarity, threshold=self.threshold, readers=readers)
        return dict(found.owners)


def _require_agreement(program: Program, owner: int, reader: int) -> None:
    """Raise PassError KVX205 if two layers cannot share a cache."""
    problem = disagreement(program, owner, reader)
    if problem:
        raise PassError(
            "KVX205",
            "layers that share a cache must agree about what is in it",
            where=WHERE,
            got=problem,
            at=program.site(reader).module,
            hint="name readers and owners that agree: planner: explicit, map: {reader: owner}",
        )


def _losses(program: Program, owner: int, reader: int) -> tuple[Loss, ...]:
    """Return how far the owner's keys and values lie from the reader's, where there are samples."""
    if program.calibration is None:
        return ()
    layers, losses = program.calibration.layers, []
    for stream, name in (("key", "k_post"), ("value", "v")):
        own, other = (getattr(layers[layer], name).samples for layer in (reader, owner))
        losses.append(Loss(reader, stream, float((own - other).norm() / own.norm())))
    return tuple(losses)


def _own_weights(program: Program, layer: int) -> list[str]:
    """Return the weights of a reader's attention alone: those of its queries, and the output's."""
    uses = weight_uses(program)
    site, names = program.site(layer), set(_query_weights(program.attention_node(layer)))
    if site.o is not None:
        names |= {name for name in (site.o.weight, site.o.bias) if name is not None}
    weights = program.weights
    return sorted(n for n in names if uses[n] == 1 and weights[n].is_floating_point())


def _query_weights(attention: fx.Node) -> Iterator[str]:
    """Yield what makes the queries, from the last linear layers before them on."""
    waiting = [attention.args[0]]
    while waiting:
        node = waiting.pop()
        assert isinstance(node, fx.Node), "queries come from the graph"
        if node.op == "get_attr":
            yield str(node.target)
        elif node.target in (LINEAR, ADDMM, *PRODUCTS):
            inputs = [input_ for input_ in node.all_input_nodes if _is_weight(input_)]
            waiting += inputs
        else:
            waiting += node.all_input_nodes


def _is_weight(node: fx.Node) -> bool:
    """Whether a node is a weight, or one transposed."""
    return node.op == "get_attr" or (
        is_transpose(node) and node.all_input_nodes[0].op == "get_attr"
    )
