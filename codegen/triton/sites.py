"""Which kernels each attention site of a program needs, and what of the graph they take over.

A rotation that stands right before an append or an attention is done by the kernel: the decode
kernel has the query in registers anyway, and the append kernel the keys.

Where values are a view of the keys, kernels are given the keys twice: K and V are the same tensors,
so both are written alike, and the graph rotates keys.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from torch import fx

import kvxform.ir.ops as kvx
from kvxform.codegen.triton import fragment, prefill_hopper
from kvxform.codegen.triton.spec import (
    AppendSpec,
    DecodeSpec,
    GatherSpec,
    KernelSpec,
    PrefillSpec,
    SiteSpec,
)
from kvxform.ir.plan import CachePlan, SitePlan
from kvxform.ir.program import Program
from kvxform.ir.stream_plan import KeyView

FOLDED_BLOCKS = (16, 32, 64, 128, 256)  # Hadamard blocks that kernels can apply
CONTIGUOUS_PAGE = 64  # tokens; see `page_tokens`


@dataclass(frozen=True)
class FoldedHadamard:
    """A `kvx::hadamard` node that a kernel does instead.

    Attributes:
        node: Name of the node in the graph.
        block: Channels rotated together.
        signs: Key of the signs `[D]` in `Program.weights`, or None.
    """

    node: str
    block: int
    signs: str | None


@dataclass(frozen=True)
class SiteKernels:
    """The kernels of one attention site.

    Attributes:
        layer: The site.
        owner: Layer whose cache it reads.
        append: Writes new K and V; None at a site that reads the cache of another.
        decode: One new query a sequence.
        gather: Cache to dense K and V, for prefill.
        prefill: Many new queries.
        key_hadamard: What `append` does for the graph, or None.
        query_hadamard: What `decode` and `prefill` do for the graph, or None.
    """

    layer: int
    owner: int
    append: AppendSpec | None
    decode: DecodeSpec
    gather: GatherSpec
    prefill: PrefillSpec
    key_hadamard: FoldedHadamard | None = None
    query_hadamard: FoldedHadamard | None = None

    @property
    def by_kind(self) -> dict[str, KernelSpec]:
        """The specs by kind of kernel."""
        specs = (self.append, self.decode, self.gather, self.prefill)
        return {spec.kind: spec for spec in specs if spec is not None}


def kernel_specs(program: Program) -> dict[int, SiteKernels]:
    """Return the kernels of every site by layer.

    Args:
        program: A program with a cache that `capability` has accepted.
    """
    assert program.plan is not None, "checked by `capability`"
    size = page_tokens(program.plan)
    dtype = program.info.dtype
    return {
        plan.layer: _site_kernels(program, plan, site_spec(plan, size, dtype))
        for plan in program.plan.sites
    }


def page_tokens(plan: CachePlan) -> int:
    """Return tokens a page; a contiguous cache is pages of which those of a row are neighbours."""
    if plan.layout.kind == "paged":
        return plan.layout.page_size
    return math.lcm(CONTIGUOUS_PAGE, plan.granule())


def site_spec(plan: SitePlan, page_size: int, dtype: str) -> SiteSpec:
    """Return the storage of a site: fragments where they can hold K and V, else rows."""
    if isinstance(plan.value, KeyView):
        return SiteSpec.of(dataclasses.replace(plan, value=plan.key), page_size, "rows", dtype)
    spec = SiteSpec.of(plan, page_size, "fragment", dtype)
    if fragment.reason_against(spec) is None:
        return spec
    return SiteSpec.of(plan, page_size, "rows", dtype)


def _site_kernels(program: Program, plan: SitePlan, site: SiteSpec) -> SiteKernels:
    attention = program.attention_node(plan.layer)
    append = program.append_node(plan.layer)
    is_view = isinstance(plan.value, KeyView)
    key = None if append is None or is_view else _hadamard_before(append)
    query = _hadamard_before(attention)
    options = _scoring_options(attention)
    options |= {"query_block": _block(query), "has_signs": _signs(query)}
    return SiteKernels(
        plan.layer,
        plan.owner,
        None if append is None else AppendSpec(site, key_block=_block(key), has_signs=_signs(key)),
        DecodeSpec(site, **options),
        GatherSpec(site),
        prefill_spec(site, **options),
        key,
        query,
    )


def prefill_spec(site: SiteSpec, **options: Any) -> PrefillSpec:
    """Return the prefill over what `gather` makes of a site; `options` are those of queries.

    It is for Hopper where that kernel can express it; see `for_any_device`.
    """
    key, value = site.key, site.value
    spec = PrefillSpec(
        site.num_q_heads,
        site.num_kv_heads,
        key.head_dim,
        value.head_dim,
        site.dtype,
        key_sink=key.sink,
        key_keep=key.keep,
        key_chunk=key.chunk,
        value_sink=value.sink,
        value_keep=value.keep,
        value_chunk=value.chunk,
        **options,
    )
    return dataclasses.replace(spec, for_hopper=prefill_hopper.reason_against(spec) is None)


def for_any_device(site: SiteKernels) -> SiteKernels:
    """Return the kernels of a site without those that only Hopper can run."""
    return dataclasses.replace(site, prefill=dataclasses.replace(site.prefill, for_hopper=False))


def _scoring_options(attention: fx.Node) -> dict[str, Any]:
    given = attention.kwargs
    return {
        "window": given.get("window"),
        "chunk": given.get("chunk"),
        "softcap": given.get("softcap"),
        "has_sink_logits": given.get("sink_logits") is not None,
        "has_alibi": given.get("alibi_slopes") is not None,
    }


def _hadamard_before(user: fx.Node) -> FoldedHadamard | None:
    """Return the rotation that makes the first operand of `user` and nothing else, or None."""
    node = user.args[0]
    assert isinstance(node, fx.Node), "operands of attention are nodes"
    if node.target is not kvx.HADAMARD or len(node.users) != 1:
        return None
    block, signs = node.kwargs["block"], node.kwargs.get("signs")
    if block not in FOLDED_BLOCKS or (isinstance(signs, fx.Node) and signs.op != "get_attr"):
        return None
    assert isinstance(block, int), "a number in the schema"
    return FoldedHadamard(
        node.name, block, str(signs.target) if isinstance(signs, fx.Node) else None
    )


def _block(rotation: FoldedHadamard | None) -> int:
    return 0 if rotation is None else rotation.block


def _signs(rotation: FoldedHadamard | None) -> bool:
    return rotation is not None and rotation.signs is not None
