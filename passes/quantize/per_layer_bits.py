"""per-layer-bits: each layer gets the options of its codecs that its sensitivity asks for.

Legal once streams have codecs. Only the plan changes: `quantize-kv` says which codecs there are,
this pass changes their options layer by layer, within a budget. In a dry run over shapes, where
nothing can be measured, all layers get the largest formats that keep the budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from kvxform.errors import PassError, RecipeError
from kvxform.ir.facts import FactValue, Requirement
from kvxform.ir.program import Program
from kvxform.pass_base import GraphPass, Match, NoMatch, Numerics, Rewriter, approx, register_pass
from kvxform.sensitivity.deciding import (
    Assignment,
    Formats,
    codecs_of,
    decide_by_search,
    decide_exactly,
    size_of,
    smallest,
    uniform,
)
from kvxform.sensitivity.formats import stream_formats
from kvxform.sensitivity.measuring import Bench

WHERE = "per-layer-bits"
BITS = ({"bits": 8}, {"bits": 4}, {"bits": 2})


@register_pass
@dataclass(frozen=True)
class PerLayerBits(GraphPass):
    """Give each layer the codec options that its measured sensitivity asks for, within a budget.

    `exact` measures the KL divergence that each format of each stream causes alone, and solves the
    knapsack of their sums. `kvtuner` prunes pairs of formats by the error of attention outputs,
    groups layers that behave alike, and searches the groups with NSGA-II. Whatever is found is
    compared with all uniform choices within the budget, and the best one is taken.

    Attributes:
        budget: What K and V of all layers may take, metadata included.
        unit: What the budget is in; `bytes_per_token` are those of all layers together.
        key: Formats of keys: options that differ from those of quantize-kv, or whole codecs.
        value: The same for values.
        method: `exact` or `kvtuner`.
        objective: What kvtuner's search makes small: `kl`, or `error`, the summed errors of
            attention outputs, for which the model is not run.
        tokens: Tokens of the calibration text to measure on.
        window: Tokens of a sequence.
        trials: Choices that kvtuner looks at.
        seed: Seed of its search.
    """

    budget: float
    unit: Literal["bits_per_value", "bytes_per_token"] = "bits_per_value"
    key: Sequence[Mapping[str, Any]] = BITS
    value: Sequence[Mapping[str, Any]] = BITS
    method: Literal["exact", "kvtuner"] = "exact"
    objective: Literal["kl", "error"] = "kl"
    tokens: int = 512
    window: int = 256
    trials: int = 64
    seed: int = 0
    numerics: ClassVar[Numerics] = approx("kl")
    requires: ClassVar[tuple[Requirement, ...]] = (
        Requirement("cache.inserted", (True,), because="there would be no codecs to choose yet"),
    )
    invalidates: ClassVar[tuple[str, ...]] = ("read.simplified",)
    source: ClassVar[str] = "KVTuner, arXiv 2502.04420, sections 4 and 5"

    def __post_init__(self) -> None:
        """Check the options as far as that goes without a model."""
        if not self.key or not self.value:
            raise RecipeError("KVX107", "key and value must list formats", where=WHERE)
        for name in ("tokens", "window", "trials"):
            if getattr(self, name) < (1 if name == "trials" else 2):
                rule = f"{name} must be positive"
                raise RecipeError("KVX107", rule, where=WHERE, got=getattr(self, name))

    @property
    def needs_calibration(self) -> bool:
        """Formats are measured on the calibration text."""
        return True

    def ensures(self) -> Mapping[str, FactValue]:
        """State that layers differ."""
        return {"codecs.per_layer": True}

    def match(self, program: Program) -> list[Match | NoMatch]:
        """Match every site with a codec, once the choice for all of them has been made.

        Raises:
            RecipeError: KVX102 if a codec does not have an option of a format.
            PassError: KVX203 or KVX205 if a format does not fit, KVX205 if even the smallest
                formats exceed the budget.
        """
        if program.plan is None:
            return [NoMatch("there is no cache", hint="put insert-cache before it")]
        if program.facts["codecs.per_layer"]:
            return [NoMatch("layers have been given their formats", done=True)]
        formats = self._formats(program)
        if not formats:
            return [NoMatch("no stream has a codec", hint="put quantize-kv before it")]
        chosen = self._choose(program, formats)
        found: list[Match | NoMatch] = []
        for site in program.plan.sites:
            streams = {
                name: formats[site.owner, name][chosen[site.owner, name]].stream
                for name in site.streams
                if (site.owner, name) in formats
            }
            reason = "none of its streams has a codec"
            found.append(
                Match(site.layer, data=streams) if streams else NoMatch(reason, site.layer)
            )
        return found

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        """Put the chosen streams into the plan of one site."""
        assert match.layer is not None, "every match is at a site"
        rewriter.update_site_plan(match.layer, **match.data)

    def _formats(self, program: Program) -> Formats:
        """Return the formats of every stream that has a codec."""
        assert program.plan is not None, "match found a plan"
        options = {"key": self.key, "value": self.value}
        return {
            (site.layer, name): stream_formats(program, site, name, options[name], WHERE)
            for site in program.plan.owners
            for name, stream in site.streams.items()
            if stream.codec["codec"] != "none"
        }

    def _choose(self, program: Program, formats: Formats) -> Assignment:
        budget = self._budget(program, formats)
        alike = [a for a in uniform(formats) if size_of(formats, a) <= budget]
        if program.calibration is None:
            return max(alike, key=lambda a: size_of(formats, a), default=smallest(formats))
        bench = Bench(program, self._text(program.calibration.token_ids))
        if self.method == "exact":
            found = decide_exactly(bench, formats, budget)
        else:
            found = decide_by_search(
                bench,
                formats,
                budget,
                objective=self.objective,
                trials=self.trials,
                seed=self.seed,
            )
        return min((found, *alike), key=lambda a: bench.divergence(codecs_of(formats, a)))

    def _text(self, token_ids: Tensor) -> Tensor:
        """Return the windows to measure on, from the whole of the calibration text."""
        window = min(self.window, token_ids.shape[1])
        count = min(max(1, self.tokens // window), len(token_ids))
        rows = [len(token_ids) * i // count for i in range(count)]
        return token_ids[rows, :window]

    def _budget(self, program: Program, formats: Formats) -> float:
        """Return the bytes that the streams in `offers` may take, per token.

        Raises:
            PassError: KVX205 if their smallest formats take more.
        """
        plan = program.plan
        assert plan is not None, "match found a plan"
        total = self.budget
        if self.unit == "bits_per_value":
            total = self.budget * plan.values_per_token / 8
        fixed = sum(
            stream.body_bytes_per_token(site.num_kv_heads)
            for site in plan.owners
            for name, stream in site.streams.items()
            if (site.layer, name) not in formats
        )
        least = size_of(formats, smallest(formats))
        if least + fixed > total:
            bits = (least + fixed) * 8 / plan.values_per_token
            raise PassError(
                "KVX205",
                f"the budget must allow the smallest formats, {bits:.3f} bits per value",
                where=WHERE,
                got=f"{total * 8 / plan.values_per_token:.3f}",
            )
        return total - fixed + 1e-6 * total  # sums of sizes are rounded
