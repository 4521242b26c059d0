"""Small programs of `kvxform.testing`, and what tests need to rewrite and run them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from kvxform.ir.cache import make_handle
from kvxform.ir.program import Program, default_positions
from kvxform.ir.scoring import Scoring, attend
from kvxform.ir.verify import verify_program
from kvxform.pass_base import GraphPass, Match, NoMatch, Rewriter
from kvxform.testing.builder import BATCH as BATCH
from kvxform.testing.builder import SYMBOLS as SYMBOLS
from kvxform.testing.builder import TOKENS as TOKENS
from kvxform.testing.builder import Builder as Builder
from kvxform.testing.builder import aten as aten
from kvxform.testing.latent import LATENT as LATENT
from kvxform.testing.latent import OWN as OWN
from kvxform.testing.latent import SHARED as SHARED
from kvxform.testing.latent import VALUES as VALUES
from kvxform.testing.programs import gpt2_program as gpt2_program
from kvxform.testing.programs import latent_program as latent_program
from kvxform.testing.programs import llama_program as llama_program


class DenseCache:
    """The simplest cache: K and V of each layer as they come, one length for all rows.

    Without V, values are the keys, cut by whoever reads them.
    """

    def __init__(self) -> None:
        self.stored: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, k: Tensor, v: Tensor | None) -> None:
        v = k if v is None else v
        if layer in self.stored:
            old_k, old_v = self.stored[layer]
            k, v = torch.cat([old_k, k], 2), torch.cat([old_v, v], 2)
        self.stored[layer] = (k, v)

    def attend(self, layer: int, q: Tensor, positions: Tensor, scoring: Scoring) -> Tensor:
        k, v = self.stored[layer]
        read = scoring.key_read
        if read is not None:
            table = None if read.inv_freq is None else read.table(k.shape[2], k.dtype)
            k = read.apply(k, 0, table)
        v = scoring.read_values(v)
        past = torch.arange(k.shape[2]).expand(k.shape[0], -1)
        mask = scoring.span.sees(positions, past)
        return attend(q, k, v, mask, scoring, bias=scoring.bias(positions, past))


def apply(graph_pass: GraphPass, program: Program) -> tuple[Program, list[Match | NoMatch]]:
    """Return a rewritten clone, checked by the verifier, and what `match` found."""
    found = graph_pass.match(program)
    clone = program.clone()
    rewriter = Rewriter(clone, graph_pass.pass_name(), graph_pass.numerics)
    for match in found:
        if isinstance(match, Match):
            graph_pass.rewrite(clone, match, rewriter)
    rewriter.finish()
    if rewriter.modified:
        clone.facts = clone.facts.updated(graph_pass.ensures(), graph_pass.invalidates)
    verify_program(clone)
    return clone, found


def fired(found: list[Match | NoMatch]) -> int:
    """Return the number of matches."""
    return sum(isinstance(match, Match) for match in found)


def reasons(found: list[Match | NoMatch]) -> list[str]:
    """Return the reasons of all near misses."""
    return [match.reason for match in found if isinstance(match, NoMatch)]


def token_ids(program: Program, batch: int = 2, tokens: int = 9, seed: int = 0) -> Tensor:
    """Return random token ids, int64 `[batch, tokens]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, program.info.vocab_size, (batch, tokens), generator=generator)


def run(program: Program, input_ids: Tensor, steps: list[int] | None = None) -> Tensor:
    """Return the logits of all positions; a cached program is fed in chunks of `steps` tokens."""
    module = program.to_module()
    positions = default_positions(input_ids)
    if not program.is_cached:
        return module(input_ids, positions)
    cache = DenseCache()
    handle = make_handle(cache)
    chunks = steps or [input_ids.shape[1]]
    parts = zip(input_ids.split(chunks, 1), positions.split(chunks, 1), strict=True)
    return torch.cat([module(ids, at, handle) for ids, at in parts], 1)


def to_meta(program: Program) -> Program:
    """Return a clone whose weights have shapes but no values, as dry runs see it."""
    clone = dataclasses.replace(program.clone(), calibration=None)
    clone.weights = {name: weight.to("meta") for name, weight in clone.weights.items()}
    return clone


def snapshot(program: Program) -> tuple[Any, ...]:
    """Return everything a pass could change, for comparing before and after."""
    weights = {name: (id(w), w.clone()) for name, w in program.weights.items()}
    graph = [(n.op, n.name, str(n.target), str(n.args), str(n.kwargs)) for n in program.graph.nodes]
    return graph, weights, program.sites, program.plan


def assert_untouched(program: Program, before: tuple[Any, ...]) -> None:
    """Assert that `program` is as it was when `before` was taken."""
    graph, weights, sites, plan = snapshot(program)
    assert graph == before[0]
    assert weights.keys() == before[1].keys()
    for name, (identity, value) in weights.items():
        assert identity == before[1][name][0]
        assert value.is_meta or torch.equal(value, before[1][name][1])
    assert (sites, plan) == before[2:]
