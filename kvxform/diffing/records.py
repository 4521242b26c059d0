"""Everything that a diff says, as plain data; `to_data` and `from_data` are inverses.

A diff has parts (structure, plan, weights, numeric), each with all it saw, and findings: what a
reader must know, most important first, each with the layers it is about and one sentence of cause.
Names of nodes and weights are for people to read; nothing is compared by name.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import TypeAdapter

from kvxform.diffing.symptoms import Symptom

NodeChangeKind = Literal["added", "removed", "retyped", "rewired", "changed"]
Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)  # worst first
SideKind = Literal["artifact", "program", "module", "onnx", "pt2", "lock"]


@dataclass(frozen=True)
class SideSummary:
    """One of the two things that are compared.

    Attributes:
        name: What the user called it.
        kind: What it is.
        model: Name of the model.
        recipe: Name of the recipe, or empty.
        layers: Number of layers with attention.
        nodes: Operations in its graph.
    """

    name: str
    kind: SideKind
    model: str = ""
    recipe: str = ""
    layers: int = 0
    nodes: int = 0


@dataclass(frozen=True)
class NodeChange:
    """One operation that is not the same on both sides.

    Attributes:
        kind: `changed` means other attributes, `retyped` another dtype or shape, `rewired` other
            operands.
        layer: Its layer, or None outside of layers.
        op: Its operation.
        what: What differs in words, for instance `scale 0.125 -> 1.0`.
        before: Its line in A, without names of nodes; empty if it was added.
        after: Its line in B, likewise.
        module: Path of the source module.
        origin: What it was in the source, with source line.
        via: Passes that made or changed it, oldest first: in B, or in A if it was removed.
        calls: Of an ONNX operation, the operations of the dialect whose work it does, likewise.
    """

    kind: NodeChangeKind
    layer: int | None
    op: str
    what: str
    before: str = ""
    after: str = ""
    module: str = ""
    origin: str = ""
    via: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()


@dataclass(frozen=True)
class PortChange:
    """An input, output or cache plane that differs; `before` or `after` is empty if it is new."""

    kind: Literal["input", "output", "cache"]
    name: str
    before: str
    after: str


@dataclass(frozen=True)
class CountChange:
    """An entry of a histogram of operations that differs."""

    op: str
    before: int
    after: int


@dataclass(frozen=True)
class StructureDiff:
    """What differs between two graphs.

    Attributes:
        nodes: Operations that differ, in the order of the graph.
        ports: Signature: inputs, outputs, caches.
        histogram: Numbers of operations that differ.
        renamed: Nodes, weights and modules that only have another name: no change.
        moved: Nodes that only come from elsewhere, by source line, origin or passes: no change.
        layers_added: Layers of B that A has not; their operations are among `nodes` too.
        layers_removed: Layers of A that B has not.
    """

    nodes: tuple[NodeChange, ...] = ()
    ports: tuple[PortChange, ...] = ()
    histogram: tuple[CountChange, ...] = ()
    renamed: int = 0
    moved: int = 0
    layers_added: tuple[int, ...] = ()
    layers_removed: tuple[int, ...] = ()


@dataclass(frozen=True)
class RecipeChange:
    """A pass that is not the same in both recipes.

    Attributes:
        kind: `moved` means at another place, `changed` another value of one option.
        name: Recipe name of the pass.
        option: Path of the option, for instance `key.bits`; empty unless changed.
        before: Options of a pass that was removed, its place if it moved, or the value of the
            option; empty if that is not given.
        after: The same in B.
    """

    kind: Literal["added", "removed", "moved", "changed"]
    name: str
    option: str = ""
    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class PlanChange:
    """A field of the cache plan or of a site that differs.

    Attributes:
        layer: Layer, or None for the whole plan.
        stream: `key`, `value`, or empty.
        field: Path of the field, for instance `codec.bits`, `regions.sink`, `owner`.
        before: Value in A as text.
        after: Value in B as text.
    """

    layer: int | None
    stream: str
    field: str
    before: str
    after: str


@dataclass(frozen=True)
class WeightChange:
    """A weight whose values differ. Found by its place in the graph, not by its name.

    Attributes:
        layer: Its layer, or None outside of layers.
        role: What it is: `q`, `k`, `v`, `o`, `inv_freq`, or the path of its module.
        cause: `values`, `rows permuted`, `columns permuted`, `scaled`, `negated`, `dtype`, `shape`.
        relative: Root mean square of the difference over that of A; infinite for another shape.
        detail: More in words, for instance `theta 10000 -> 500000`.
    """

    layer: int | None
    role: str
    cause: str
    relative: float
    detail: str = ""


@dataclass(frozen=True)
class MetricChange:
    """A figure of the whole model. `before` or `after` is None where a side cannot tell.

    Attributes:
        name: `kv_bytes_per_token`, `bits_per_value`, `read_bytes`, `flops_per_token`, `parameters`,
            `parameter_bytes`.
        before: In A.
        after: In B.
    """

    name: str
    before: float | None
    after: float | None

    @property
    def is_equal(self) -> bool:
        """Whether both sides tell and agree."""
        return self.before is not None and self.before == self.after


@dataclass(frozen=True)
class LogitsDiff:
    """Logits of B against those of A, over all positions that count; as `report.Measured`."""

    max_abs: float
    relative: float
    kl: float
    top1: float


@dataclass(frozen=True)
class LayerDiff:
    """One layer on the same inputs; errors are root mean squares over those of A.

    Attributes:
        layer: Layer index.
        hidden: What the layer leaves in the residual stream; None if it cannot be compared.
        key: Logical keys in the cache; None likewise.
        value: Logical values in the cache.
        codes: Share of stored codes that differ; None if the codecs are not the same.
    """

    layer: int
    hidden: float | None = None
    key: float | None = None
    value: float | None = None
    codes: float | None = None


@dataclass(frozen=True)
class TextDiff:
    """What both sides write after the same prompt, and after how many tokens they part."""

    prompt: str
    before: str
    after: str
    parted_at: int | None


@dataclass(frozen=True)
class NumericDiff:
    """Both sides run on the same inputs.

    Attributes:
        inputs: What they were, in words.
        logits: Logits, or None if a side has none.
        tolerance: Relative difference of logits that is rounding, for the wider dtype of both.
        layers: Every layer.
        first_layer: First layer in which they part by more than rounding, or None.
        schedules: Cache schedules that ran on both.
        complaints: Lengths, bytes or states of the cache that differ, as sentences.
        text: Generated text, or None.
        kl_tolerance: Mean KL divergence that is rounding where codes may move by it, else 0.
        symptoms: What differs in the cache of a layer once all that comes before it is the same.
    """

    inputs: str
    logits: LogitsDiff | None
    tolerance: float
    layers: tuple[LayerDiff, ...] = ()
    first_layer: int | None = None
    schedules: tuple[str, ...] = ()
    complaints: tuple[str, ...] = ()
    text: TextDiff | None = None
    kl_tolerance: float = 0.0
    symptoms: tuple[Symptom, ...] = ()

    @property
    def is_rounding(self) -> bool:
        """Whether logits differ by no more than rounding; true without logits."""
        found = self.logits
        if found is None or found.relative <= self.tolerance:
            return True
        return self.kl_tolerance > 0.0 and found.kl <= self.kl_tolerance


@dataclass(frozen=True)
class Finding:
    """What a reader must know.

    Attributes:
        rule: Stable name in kebab case, for instance `rope-frequencies`, `window`, `page-order`.
        severity: `error` for a fault, `warning` for a change of results, `note` for no change.
        message: One sentence of cause, without the layers and without a full stop.
        layers: Layers it is about; empty for the whole model.
        origin: Source line, or empty.
    """

    rule: str
    severity: Severity
    message: str
    layers: tuple[int, ...] = ()
    origin: str = ""


@dataclass(frozen=True)
class Violation:
    """A threshold that is exceeded."""

    name: str
    limit: float
    measured: float


@dataclass(frozen=True)
class DiffResult:
    """Everything that is known about two sides; holds no time, date or path of this machine.

    Attributes:
        a: The first side.
        b: The second side.
        structure: Graphs; None if a side has none.
        plan: Cache plans and geometry of sites.
        weights: Values of weights.
        metrics: Figures of the whole model, equal ones too.
        numeric: Both run; None if not asked for or not possible.
        recipe: Passes of the recipes; empty if a side has none.
        findings: What a reader must know, most important first.
        thresholds: Limits that were given, by name.
        violations: Limits that are exceeded.
    """

    a: SideSummary
    b: SideSummary
    structure: StructureDiff | None = None
    plan: tuple[PlanChange, ...] = ()
    weights: tuple[WeightChange, ...] = ()
    metrics: tuple[MetricChange, ...] = ()
    numeric: NumericDiff | None = None
    findings: tuple[Finding, ...] = ()
    thresholds: tuple[tuple[str, float], ...] = ()
    violations: tuple[Violation, ...] = ()
    recipe: tuple[RecipeChange, ...] = ()

    @property
    def is_same(self) -> bool:
        """Whether nothing differs beyond rounding and names."""
        return all(finding.severity == "note" for finding in self.findings)

    @property
    def exit_code(self) -> int:
        """0 if the sides are the same, or differ within the thresholds given; otherwise 1."""
        if self.thresholds:
            return int(bool(self.violations))
        return 0 if self.is_same else 1

    def to_data(self) -> dict[str, Any]:
        """Return plain data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> DiffResult:
        """Build a result from plain data; pydantic's ValidationError if it is none."""
        return TypeAdapter(cls).validate_python(data)
