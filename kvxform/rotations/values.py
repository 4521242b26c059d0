"""A basis of V lives in the projections around it, at no cost at run time.

Attention is linear in V: softmax(S) (V R) R^T = softmax(S) V for every orthogonal R. So the rows of
W_v that make one KV head absorb R, and the columns of W_o that read the query heads of its group
absorb R^T.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from kvxform.codecs.basis import Basis
from kvxform.ir.program import AttentionSite, Program, Projection
from kvxform.pass_base import NoMatch, Rewriter

UNTIE = "untie it: give every layer that reads it a weight of its own"


def check_values(program: Program, site: AttentionSite, uses: Mapping[str, int]) -> NoMatch | None:
    """Return why no basis can be folded around the values of `site`, or None if one can.

    Legal where W_v and W_o are plain linear layers whose weights nothing else reads.

    Args:
        program: The program of the site.
        site: A site that owns its values.
        uses: Readers of each weight; see `ir.linear.weight_uses`.
    """
    layer = site.layer
    if site.payload == "latent":
        return NoMatch("values are part of the latent, which keys rotate", layer, done=True)
    outputs = [reader.o for reader in program.readers(layer)]
    if site.v is None:
        hint = "leave only views and splits between a linear layer and the values"
        return NoMatch("values are not made by a plain linear layer", layer, hint=hint)
    if None in outputs:
        hint = "leave only views between attention and one linear layer"
        return NoMatch("heads are not read by a plain linear layer", layer, hint=hint)
    read = [output.weight for output in outputs if output is not None]
    for name in filter(None, (site.v.weight, site.v.bias, *read)):
        if uses[name] != 1:
            reason = f"weight {name} is read in {uses[name]} places"
            return NoMatch(reason, layer, hint=UNTIE)
    if site.k is not None and share_rows(site, site.k, site.v):
        hint = "give keys and values rows of their own in the projection"
        return NoMatch("keys and values are made by the same weights", layer, hint=hint)
    return None


def check_basis(current: Basis, wanted: Basis, what: str, layer: int) -> NoMatch | None:
    """Return why `what` cannot go into basis `wanted` from `current`, or None if it can."""
    if current == wanted:
        return NoMatch("already rotated", layer, done=True)
    if current != Basis():
        reason = f"{what} are in basis {current}, and rotations do not stack"
        return NoMatch(reason, layer, hint=f"keep one rotation of {what} in the recipe")
    return None


def fold_values(rewriter: Rewriter, layer: int, basis: Basis) -> None:
    """Rotate W_v and its bias, un-rotate W_o of every reader, and record the basis.

    Args:
        rewriter: Changes the program.
        layer: Layer of a site that `check_values` had nothing against.
        basis: The basis; matrices of a dense one are among the weights.
    """
    program = rewriter.program
    site, matrices = program.site(layer), program.weights
    assert site.v is not None, "checked before"
    made = site.v.indices(site.num_kv_heads, site.v_head_dim)
    out_axis = 0 if site.v.layout == "out_in" else 1
    for name, axis in ((site.v.weight, out_axis), (site.v.bias, 0)):
        if name is not None:
            rotated = _rotate_heads(matrices[name], axis, made, basis, matrices)
            rewriter.set_weight(name, rotated)
    for reader in program.readers(layer):
        assert reader.o is not None, "checked before"
        read = reader.o.indices(reader.num_q_heads, reader.v_head_dim)
        in_axis = 1 if reader.o.layout == "out_in" else 0
        rotated = _rotate_heads(matrices[reader.o.weight], in_axis, read, basis, matrices)
        rewriter.set_weight(reader.o.weight, rotated)
        rewriter.set_basis(reader.layer, value=basis)


def share_rows(site: AttentionSite, k: Projection, v: Projection) -> bool:
    """Whether keys and values of `site` are made by the same entries of one weight."""
    if k.weight != v.weight:
        return False
    keys = k.indices(site.num_kv_heads, site.head_dim).flatten().tolist()
    values = v.indices(site.num_kv_heads, site.v_head_dim).flatten().tolist()
    return not set(keys).isdisjoint(values)


def _rotate_heads(
    weight: Tensor, axis: int, heads: Tensor, basis: Basis, matrices: Mapping[str, Tensor]
) -> Tensor:
    """Return a copy of `weight` whose heads on `axis`, indices `[H, D]`, are rotated."""
    index = heads.flatten().to(weight.device)
    rows = weight.index_select(axis, index).double().movedim(axis, -1)  # [..., H * D]
    split = rows.reshape(-1, *heads.shape).transpose(0, 1)  # [H, n, D]
    rotated = basis.rotate(split, matrices).transpose(0, 1).reshape(rows.shape)
    return weight.index_copy(axis, index, rotated.movedim(-1, axis).to(weight.dtype))
