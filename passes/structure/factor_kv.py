"""factor-kv: keys and values of a layer are cached as a few features of all its heads.

The heads of a layer are joined to one vector and turned into a basis whose components matter less
and less; the first ones are stored, at full precision or as codes, and attention turns back what
it reads. The last tokens stay exact. Keys are turned before RoPE if `cache-prerope` ran: after
RoPE they have far less in common. Where heads are not joined, the inverse of the basis of V
lives in W_o and reading costs nothing; queries of other heads would need other inverses.

Projections stay as they are: exact tokens need whole keys and values, so no compute is saved.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from kvxform.codecs.base import Codec
from kvxform.codecs.exact import ExactCodec
from kvxform.codecs.integer import DEFAULT_TOKENS, IntCodec
from kvxform.codecs.packing import BITS, channel_multiple
from kvxform.codecs.truncate import TruncateCodec
from kvxform.errors import RecipeError
from kvxform.ir.facts import FactValue, Requirement
from kvxform.ir.fitting import stream_statistics
from kvxform.ir.linear import weight_uses
from kvxform.ir.program import AttentionSite, Program, projection_weights
from kvxform.ir.stream_plan import Regions, StreamPlan
from kvxform.pass_base import (
    GraphPass,
    Loss,
    Match,
    NoMatch,
    Numerics,
    Rewriter,
    approx,
    register_pass,
)
from kvxform.rotations.at_read import AS_IN_THE_SOURCE, STREAMS, heads_together, turn_at_read
from kvxform.rotations.dense import dense_basis
from kvxform.rotations.keys import set_matrices
from kvxform.rotations.values import check_values, fold_values
from kvxform.structure.components import (
    Components,
    activation_components,
    principal_components,
)

CHANNELS = 32  # channels of a group of V


@register_pass
@dataclass(frozen=True)
class FactorKv(GraphPass):
    """Cache a few features of the keys and values of all heads of a layer.

    Attributes:
        k_density: Share of the channels of all KV heads that is kept of K; None leaves K alone.
        v_density: The same for V.
        init: Where bases come from: `pca` of K and V themselves, or `asvd` of their projections.
        bits: Bits of a feature, K per channel in groups of 32 tokens and V per token; None for
            features of `dtype`.
        recent: Last tokens that stay exact.
        sink: First tokens that stay exact.
        mean: Let what is left out come back as its mean rather than as zero. That is exact for
            more tokens, and ruins the first ones, whose K and V are far from it.
        width: Largest number of channels that are joined; a head at least.
        dtype: Stored dtype of exact tokens and features; that of a 16-bit model, or float16.
    """

    k_density: float | None = 0.5
    v_density: float | None = 0.5
    init: Literal["pca", "asvd"] = "pca"
    bits: int | None = None
    recent: int = 32
    sink: int = 0
    mean: bool = False
    width: int = 1024
    dtype: str | None = None
    numerics: ClassVar[Numerics] = approx("kl")
    requires: ClassVar[tuple[Requirement, ...]] = AS_IN_THE_SOURCE
    invalidates: ClassVar[tuple[str, ...]] = ("read.simplified",)
    source: ClassVar[str] = "CSKV, arXiv 2409.10593"

    def __post_init__(self) -> None:
        """Check the options on their own."""
        densities = [d for d in (self.k_density, self.v_density) if d is not None]
        shares = all(0 < d <= 1 for d in densities) and bool(densities)
        counts = [isinstance(n, int) and n >= 0 for n in (self.recent, self.sink)]
        for is_fine, rule, got in (
            (shares, "densities must lie in (0, 1], and one must be given", densities),
            (self.init in ("pca", "asvd"), "init must be pca or asvd", self.init),
            (self.bits in (None, *BITS), "bits must be 2, 3, 4 or 8", self.bits),
            (all(counts), "recent and sink must be numbers of tokens", (self.recent, self.sink)),
            (self.width >= 1, "width must be a number of channels", self.width),
        ):
            if not is_fine:
                raise RecipeError("KVX107", rule, where=self.pass_name(), got=repr(got))

    def ensures(self) -> Mapping[str, FactValue]:
        """State codec and basis of the streams that are factored."""
        return {
            f"{name[0]}.{fact}": value
            for name in self._streams()
            for fact, value in (("codec", TruncateCodec.name), ("basis", "matrix"))
        }

    @property
    def needs_calibration(self) -> bool:
        """Always: for bases, or for the means and the losses in them."""
        return True

    def match(self, program: Program) -> list[Match | NoMatch]:
        """Match every site that owns its cache.

        Raises:
            PassError: KVX205 if RoPE turns a part of the keys that are cached before it.
        """
        if program.plan is None:
            return [NoMatch("there is no cache", hint="put insert-cache before it")]
        uses = weight_uses(program)
        return [self._check(program, site, uses) for site in program.sites]

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        """Turn what is appended, store the first components, and undo it for every reader."""
        assert match.layer is not None, "every match is at a site"
        assert program.plan is not None, "there is a cache"
        dtype = _stored_dtype(self.dtype, program)
        regions = Regions(self.sink, self.recent, "sliding", dtype)
        for name in match.data["codecs"]:
            matrices, codec = match.data["bases"][name], match.data["codecs"][name]
            if name in match.data["folded"]:
                basis = dense_basis(self.pass_name(), name, match.layer)
                assert basis.weight is not None, "it is dense"
                set_matrices(rewriter, basis.weight, matrices)
                fold_values(rewriter, match.layer, basis)
            else:
                turn_at_read(rewriter, match.layer, name, matrices, matrices.mT.contiguous())
            for reader in program.readers(match.layer):
                stream = program.plan.site(reader.layer).streams[name]
                new = dataclasses.replace(
                    stream,
                    codec=codec.to_dict(),
                    planes=codec.planes(stream.head_dim),
                    tokens_per_group=codec.tokens_per_group,
                    regions=regions,
                    calibration=program.calibration.name if program.calibration else None,
                )
                rewriter.update_site_plan(reader.layer, **{name: new})
        for reader in program.readers(match.layer):
            rewriter.mark_touched(projection_weights(reader.q, reader.k, reader.v, reader.o))

    def _check(self, program: Program, site: AttentionSite, uses: Counter[str]) -> Match | NoMatch:
        assert program.plan is not None, "checked before"
        plan, layer = program.plan.site(site.layer), site.layer
        names = [name for name in self._streams() if name in plan.streams]
        if any(plan.streams[name].codec["codec"] == TruncateCodec.name for name in names):
            return NoMatch("already stored so", layer, done=True)
        if site.shared_with is not None:
            return NoMatch(f"keys and values are those of layer {site.owner}", layer, done=True)
        if not isinstance(plan.value, StreamPlan):
            hint = "leave out cache-latent"
            return NoMatch("a latent is factored as it is", layer, hint=hint)
        problem = self._against_weights(program, site, names)
        if problem is not None:
            return problem
        streams = {name: plan.streams[name] for name in names}
        found = {name: self._components(program, site, name, s) for name, s in streams.items()}
        dtype = _stored_dtype(self.dtype, program)
        codecs = {name: self._codec(name, s, found[name], dtype) for name, s in streams.items()}
        is_folded = "value" in codecs and codecs["value"].heads == 1
        folded = ["value"] if is_folded and check_values(program, site, uses) is None else []
        bases = {name: torch.stack([c.basis for c in own]) for name, own in found.items()}
        losses = [
            loss
            for name in names
            if program.calibration is not None
            for loss in self._losses(layer, name, found[name], codecs[name])
        ]
        data = {"bases": bases, "codecs": codecs, "folded": folded}
        note = "the basis of V lives in W_o" if folded else ""
        return Match(layer, data=data, losses=tuple(losses), note=note)

    def _streams(self) -> list[str]:
        pairs = zip(STREAMS, (self.k_density, self.v_density), strict=True)
        return [name for name, density in pairs if density is not None]

    def _against_weights(
        self, program: Program, site: AttentionSite, names: list[str]
    ) -> NoMatch | None:
        """Return why bases cannot come from the projections, if they are to."""
        if self.init == "pca":
            return None
        hint = "use init: pca"
        facts = program.facts
        if facts["norms_fused"] or facts["residual.basis"] != "identity":
            reason = "projections are no longer those that the statistics are of"
            return NoMatch(reason, site.layer, hint=f"put it before fuse-norms, or {hint}")
        inputs = program.calibration.inputs if program.calibration else None
        for name in names:
            projection = site.k if name == "key" else site.v
            if projection is None or (inputs is not None and projection.weight not in inputs):
                reason = f"{name}s are not the output of a plain linear layer"
                return NoMatch(reason, site.layer, hint=hint)
        return None

    def _components(
        self, program: Program, site: AttentionSite, name: str, stream: StreamPlan
    ) -> list[Components]:
        """Return the components of each run of heads; those of nothing in a dry run."""
        heads = heads_together(site.num_kv_heads, self.width // stream.head_dim)
        runs, size = site.num_kv_heads // heads, heads * stream.head_dim
        if program.calibration is None:
            return [Components.identity(size)] * runs
        statistics = stream_statistics(program, site.layer, name, stream.rope)
        body = statistics.positions >= self.sink
        samples = statistics.samples[:, body].unflatten(0, (runs, heads))
        joined = samples.transpose(1, 2).flatten(2)  # [runs, N, heads * D]
        if self.init == "pca":
            return [principal_components(x, centred=self.mean) for x in joined]
        projection = site.k if name == "key" else site.v
        assert projection is not None, "checked before"
        weight = program.weights[projection.weight]
        weight = weight if projection.layout == "out_in" else weight.T
        rows = projection.indices(site.num_kv_heads, stream.head_dim).view(runs, size)
        magnitude = program.calibration.inputs[projection.weight]
        pairs = zip(rows, joined, strict=True)
        return [activation_components(weight[own].cpu(), magnitude, x) for own, x in pairs]

    def _codec(
        self, name: str, stream: StreamPlan, found: list[Components], dtype: str
    ) -> TruncateCodec:
        """Return how the first components are stored."""
        density = self.k_density if name == "key" else self.v_density
        assert density is not None, "only streams that are factored"
        size = len(found[0].basis)
        step = 1 if self.bits is None else channel_multiple(self.bits)
        rank = min(size, max(step, round(density * size / step) * step))
        heads = size // stream.head_dim
        inner = ExactCodec(dtype) if self.bits is None else _int_codec(name, self.bits, rank)
        codec = TruncateCodec(rank, stream.head_dim, heads, inner)
        if not self.mean or not codec.missing:
            return codec
        fill = tuple(tuple(own.mean[rank:].float().tolist()) for own in found)
        return dataclasses.replace(codec, fill=fill)

    def _losses(
        self, layer: int, name: str, found: list[Components], codec: TruncateCodec
    ) -> list[Loss]:
        """Return the share of the norm of K or V that each run of heads loses to its rank."""
        losses = []
        for run, own in enumerate(found):
            lost = own.lost(codec.rank, has_mean=bool(codec.fill))
            error = (lost / max(float(own.energy.sum()), 1e-300)) ** 0.5
            heads = tuple(range(run * codec.heads, (run + 1) * codec.heads))
            losses.append(Loss(layer, name, error, heads if len(found) > 1 else ()))
        return losses


def _int_codec(name: str, bits: int, rank: int) -> Codec:
    """Return KIVI's codes of features: K per channel, V per token."""
    if name == "key":
        return IntCodec(bits, axis="channel", group=DEFAULT_TOKENS, zero="float")
    return IntCodec(bits, group=CHANNELS if rank % CHANNELS == 0 else None, zero="float")


def _stored_dtype(asked: str | None, program: Program) -> str:
    """Return the dtype of exact tokens and of features that are not codes."""
    return asked or (program.info.dtype if program.dtype.itemsize == 2 else "float16")
