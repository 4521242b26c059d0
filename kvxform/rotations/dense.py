"""Streams in dense bases: one matrix for each KV head, found by whatever means.

A pass that finds such bases matches each stream of each site on its own. K is rotated in the graph,
V inside of the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from kvxform.codecs.basis import Basis
from kvxform.ir.program import AttentionSite, Program
from kvxform.pass_base import Match, NoMatch, Rewriter
from kvxform.rotations.keys import dense_turn, set_matrices, turn_keys
from kvxform.rotations.values import check_basis, check_values, fold_values


def dense_basis(pass_name: str, stream: str, owner: int) -> Basis:
    """Return the basis of one stream of the layer `owner`; its weight is named after the pass."""
    return Basis("matrix", weight=f"{pass_name.replace('-', '_')}.{stream}_{owner}")


def check_dense_keys(site: AttentionSite, basis: Basis) -> NoMatch | None:
    """Return why the keys of `site` cannot go into a dense basis, or None if they can."""
    if site.payload == "latent":
        hint = "use rotate-qk, which keeps the parts of a latent apart"
        return NoMatch("keys are latents", site.layer, hint=hint)
    return check_basis(site.k_basis, basis, "keys", site.layer)


def check_dense_values(
    program: Program, site: AttentionSite, basis: Basis, uses: Mapping[str, int]
) -> NoMatch | None:
    """Return why the values of `site` cannot go into a dense basis, or None if they can."""
    if site.shared_with is not None:
        problem = check_dense_values(program, program.site(site.owner), basis, uses)
        is_done = problem is None or problem.done
        return NoMatch(f"values are those of layer {site.owner}", site.layer, done=is_done)
    problem = check_values(program, site, uses)
    return problem or check_basis(site.v_basis, basis, "values", site.layer)


def rotation_match(site: AttentionSite, stream: str, basis: Basis, matrices: Tensor) -> Match:
    """Return a match of `stream` (`key` or `value`); `matrices` are `[Hk, D, D]`."""
    return Match(site.layer, data={"stream": stream, "basis": basis, "matrices": matrices})


def rotate_stream(rewriter: Rewriter, match: Match) -> None:
    """Rotate one stream of one site, as `rotation_match` says, and record the basis."""
    assert match.layer is not None, "every match is at a site"
    basis: Basis = match.data["basis"]
    assert basis.weight is not None, "it is dense"
    if basis.weight not in rewriter.program.weights:
        set_matrices(rewriter, basis.weight, match.data["matrices"])
    if match.data["stream"] == "value":
        fold_values(rewriter, match.layer, basis)
        return
    turn = dense_turn(rewriter, basis.weight)
    turn_keys(rewriter, match.layer, turn, turn)
    rewriter.set_basis(match.layer, key=basis)


def both_or_none(streams: Iterable[Sequence[Match | NoMatch]]) -> list[Match | NoMatch]:
    """Return what was found of all streams, without any match if one stream has none.

    A pass states the basis of each stream that it was asked for, so it must not leave one out.
    """
    found = [list(stream) for stream in streams]
    blocked = any(_is_blocked(stream) for stream in found)
    because = "another stream that was asked for cannot be rotated"
    return [
        NoMatch(because, f.layer, hint="ask for one stream alone") if is_lost else f
        for stream in found
        for f in stream
        for is_lost in [blocked and isinstance(f, Match)]
    ]


def _is_blocked(stream: Sequence[Match | NoMatch]) -> bool:
    return bool(stream) and all(isinstance(f, NoMatch) and not f.done for f in stream)
