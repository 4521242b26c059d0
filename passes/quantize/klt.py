"""klt: keys and values are stored in a calibrated basis, with bits where they count most.

The basis runs over several KV heads, which share most of what they say, and makes components that
are not correlated. Errors are weighed with the gradient of the loss, so that one budget is shared
by all components of K and V of all layers. Nothing is stored of a token but codes, and the size of
V. New tokens are turned into the basis before they are appended, and turned back when they are
read: one product of `width` x `width` for each run of heads of a token. On top of `cache-prerope`,
keys are far more alike than after RoPE.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvxform.codecs.base import Codec
from kvxform.codecs.klt import GAIN_BITS, KltCodec
from kvxform.codecs.klt_trellis import TrellisKltCodec
from kvxform.codecs.trellis import POLYNOMIALS
from kvxform.errors import RecipeError
from kvxform.ir.facts import FactValue, Requirement
from kvxform.ir.fitting import stream_statistics
from kvxform.ir.plan import SitePlan
from kvxform.ir.program import Program
from kvxform.ir.stream_options import RegionOptions, StreamOptions
from kvxform.ir.stream_plan import StreamPlan
from kvxform.pass_base import GraphPass, Match, NoMatch, Numerics, Rewriter, approx, register_pass
from kvxform.rotations.at_read import AS_IN_THE_SOURCE, STREAMS, heads_together, turn_at_read
from kvxform.rotations.transform import Transform, fit_transform, share_bytes


@register_pass
@dataclass(frozen=True)
class Klt(GraphPass):
    """Store keys and values as components with bits of their own.

    Attributes:
        bits: Bits of an encoded value, mean of K and V of all layers; everything included.
        weighted: Weigh errors with gradients, and share the budget among all streams of all
            layers. Otherwise every stream of every layer has the same.
        key_gain: Store the size of the keys of a token, 4 bits for all heads.
        value_gain: The same for values.
        width: Largest number of channels that are turned together.
        ridge: How much to distrust gradients; see `fit_transform`.
        tails: Tables; see `KltCodec`.
        trellis: Bits of the register of codec `klt-trellis`, 2 or 3; 0 for codec `klt`.
        regions: Exact regions of both streams.
        key_regions: Options that differ for keys.
        value_regions: Options that differ for values.
    """

    bits: float
    weighted: bool = True
    key_gain: bool = False
    value_gain: bool = True
    width: int = 256
    ridge: float = 0.1
    tails: Literal["laplace", "normal"] = "laplace"
    trellis: Literal[0, 2, 3] = 0
    regions: RegionOptions | None = None
    key_regions: RegionOptions | None = None
    value_regions: RegionOptions | None = None
    numerics: ClassVar[Numerics] = approx("kl")
    requires: ClassVar[tuple[Requirement, ...]] = AS_IN_THE_SOURCE
    invalidates: ClassVar[tuple[str, ...]] = ("read.simplified",)
    source: ClassVar[str] = "transform coding, Cover and Thomas, section 10.3.3; own composition"

    def __post_init__(self) -> None:
        """Check the options on their own."""
        for name, is_fine, rule in (
            ("bits", 0 < self.bits <= 8, "must lie in (0, 8]"),
            ("width", self.width >= 2, "must be a number of channels, at least 2"),
            ("ridge", self.ridge > 0, "must be positive"),
            ("tails", self.tails in ("laplace", "normal"), "must be laplace or normal"),
            ("trellis", self.trellis in (0, *POLYNOMIALS), "must be 0, 2 or 3"),
        ):
            if not is_fine:
                got = repr(getattr(self, name))
                raise RecipeError("KVX107", f"{name} {rule}", where=self.pass_name(), got=got)

    def ensures(self) -> Mapping[str, FactValue]:
        """State codec and basis of both streams."""
        name = "klt-trellis" if self.trellis else "klt"
        return {"k.codec": name, "v.codec": name, "k.basis": "matrix", "v.basis": "matrix"}

    @property
    def needs_calibration(self) -> bool:
        """Always: the bases are those of what it collects."""
        return True

    @property
    def needs_fisher(self) -> bool:
        """Whether errors are weighed with gradients."""
        return self.weighted

    def match(self, program: Program) -> list[Match | NoMatch]:
        """Match every site that owns its cache; all share one budget.

        Raises:
            PassError: KVX205 if RoPE turns a part of the keys that are cached before it.
        """
        if program.plan is None:
            return [NoMatch("there is no cache", hint="put insert-cache before it")]
        found: list[Match | NoMatch] = []
        refusals = {site.layer: _refusal(site, self.ensures()) for site in program.plan.sites}
        owners = [site for site in program.plan.sites if refusals[site.layer] is None]
        rows = [(site, name) for site in owners for name in STREAMS]
        transforms = [self._transforms(program, site, name) for site, name in rows]
        codecs = self._codecs(rows, transforms) if rows else []
        data: dict[int, dict[str, tuple[list[Transform], Codec]]] = {s.layer: {} for s in owners}
        for (site, name), own, codec in zip(rows, transforms, codecs, strict=True):
            data[site.layer][name] = (own, codec)
        for layer, refusal in refusals.items():
            found.append(refusal or Match(layer, data=data[layer]))
        return found

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        """Turn what is appended, and let every reader turn it back."""
        assert match.layer is not None, "every match is at a site"
        half = program.info.dtype if program.dtype.itemsize == 2 else "float16"
        for name in STREAMS:
            transforms, codec = match.data[name]
            forward = torch.stack([own.forward for own in transforms])
            inverse = torch.stack([own.inverse for own in transforms])
            turn_at_read(rewriter, match.layer, name, forward, inverse)
            regions = StreamOptions(codec, self._region_options(name)).planned_regions(half)
            for reader in program.readers(match.layer):
                assert program.plan is not None, "there is a cache"
                stream = program.plan.site(reader.layer).streams[name]
                new = dataclasses.replace(
                    stream,
                    codec=codec.to_dict(),
                    planes=codec.planes(stream.head_dim),
                    regions=regions,
                    calibration=program.calibration.name if program.calibration else None,
                )
                rewriter.update_site_plan(reader.layer, **{name: new})

    def _transforms(self, program: Program, site: SitePlan, name: str) -> list[Transform]:
        """Return the transforms of one stream, one a run of heads; identities in a dry run."""
        stream = site.streams[name]
        heads = heads_together(site.num_kv_heads, self.width // stream.head_dim)
        runs, size = site.num_kv_heads // heads, heads * stream.head_dim
        if program.calibration is None:
            return [Transform.identity(size)] * runs
        statistics = stream_statistics(program, site.layer, name, stream.rope)
        body = statistics.positions >= self._region_options(name).get("sink", 0)

        def by_runs(x: Tensor) -> Tensor:  # [Hk, N, D] -> [runs, N, heads * D]
            split: Tensor = x[:, body].unflatten(0, (runs, heads))
            return split.transpose(1, 2).flatten(2)

        samples, gradients = by_runs(statistics.samples), statistics.gradients
        if not self.weighted:
            return [fit_transform(x, None, self.ridge) for x in samples]
        assert gradients is not None, "the pipeline has collected them"
        pairs = zip(samples, by_runs(gradients), strict=True)
        return [fit_transform(x, g, self.ridge) for x, g in pairs]

    def _codecs(
        self, rows: list[tuple[SitePlan, str]], transforms: list[list[Transform]]
    ) -> list[Codec]:
        """Return the codec of each row: its share of the budget, and its means."""
        costs = [torch.cat([part.cost for part in own]) for own in transforms]
        if not self.weighted:
            costs = [cost / cost.sum() for cost in costs]
        gains = [self.key_gain if name == "key" else self.value_gain for _, name in rows]
        overhead = [GAIN_BITS if gain else 0 for gain in gains]
        is_trellis = bool(self.trellis)
        budgets = [int(self.bits * len(cost) / 8) for cost in costs]
        if self.weighted:
            total = int(self.bits * sum(map(len, costs)) / 8)
            shared = share_bytes(costs, overhead, total, self.tails, trellis=is_trellis)
        else:
            shared = [
                share_bytes([cost], [bits], budget, self.tails, trellis=is_trellis)[0]
                for cost, bits, budget in zip(costs, overhead, budgets, strict=True)
            ]
        found: list[Codec] = []
        for (site, _), own, bits, gain in zip(rows, transforms, shared, gains, strict=True):
            shape = (site.num_kv_heads, -1)
            mean = torch.cat([part.mean for part in own]).float().view(shape)
            by_head = tuple(tuple(head) for head in bits.view(shape).tolist())
            means = tuple(tuple(head) for head in mean.tolist())
            options = (by_head, means, gain, self.tails)
            codec = TrellisKltCodec(*options, self.trellis) if is_trellis else KltCodec(*options)
            found.append(codec)
        return found

    def _region_options(self, name: str) -> RegionOptions:
        own = self.key_regions if name == "key" else self.value_regions
        return {**(self.regions or {}), **(own or {})}


def _refusal(site: SitePlan, facts: Mapping[str, FactValue]) -> NoMatch | None:
    """Return why a site is left alone, or None."""
    if site.key.codec["codec"] == facts["k.codec"]:
        return NoMatch("already stored so", site.layer, done=True)
    if site.owner != site.layer:
        return NoMatch(f"keys and values are those of layer {site.owner}", site.layer, done=True)
    if not isinstance(site.value, StreamPlan):
        hint = "leave out cache-latent, or use quantize-kv"
        return NoMatch("values are part of the latent", site.layer, hint=hint)
    return None
