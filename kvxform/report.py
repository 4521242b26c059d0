"""Report: what was done to a model, what was proved about it, and what was only measured.

A report holds no time, date or path, so equal runs give equal reports. `to_json` and `from_json`
are inverses; `to_html` gives one file that needs nothing else.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from kvxform.errors import ArtifactError
from kvxform.formats import rounded
from kvxform.healing_record import HealingRecord
from kvxform.report_records import (
    BoundRecord,
    CacheMeasured,
    LayerRecord,
    LoweringRecord,
    Measured,
    PassCost,
    PassRecord,
    PlanSummary,
    SourceSummary,
)

__all__ = [
    "BoundRecord",
    "CacheMeasured",
    "LayerRecord",
    "LoweringRecord",
    "Measured",
    "PassCost",
    "PassRecord",
    "PlanSummary",
    "Report",
    "SourceSummary",
]

REPORT_VERSION = 1


@dataclass(frozen=True)
class Report:
    """Everything that is known about one run of a recipe on a model.

    Attributes:
        source: The model that went in.
        recipe: The recipe as plain data.
        verify: How it was verified: `none`, `probe` or `full`.
        probes: Lengths of the probe sequences.
        passes: The passes in the order they ran.
        plan: What the cache costs; None if the model has no cache.
        layers: One record a layer that owns a cache.
        bounds: Bounds of the recipe.
        cache: State of the cache of the finished model; None if not measured.
        lowering: How the target compares with the eager lowering; None if that is the target, or
            if not measured.
        calibration: The text that statistics come from, or None if no pass needed any.
        trainable: Every pass whose weights healing may train, and how many they are.
        healing: What healing did; None before it. Figures of passes and layers are those from
            before.
        version: Version of this form.
    """

    source: SourceSummary
    recipe: dict[str, Any]
    verify: str
    probes: tuple[int, ...]
    passes: tuple[PassRecord, ...]
    plan: PlanSummary | None = None
    layers: tuple[LayerRecord, ...] = ()
    bounds: tuple[BoundRecord, ...] = ()
    cache: CacheMeasured | None = None
    lowering: LoweringRecord | None = None
    calibration: str | None = None
    trainable: tuple[tuple[str, int], ...] = ()
    healing: HealingRecord | None = None
    version: int = REPORT_VERSION

    @property
    def kv_bytes_per_token(self) -> float | None:
        """Bytes that one more token costs, metadata included; None without a cache."""
        return self.plan.kv_bytes_per_token if self.plan else None

    @property
    def bits_per_value(self) -> float | None:
        """True bits per cached value, metadata included; None without a cache."""
        return self.plan.bits_per_value if self.plan else None

    @property
    def final(self) -> Measured | None:
        """Logits of the finished model against the source; None if not measured."""
        measured = [p.vs_source for p in self.passes if p.vs_source is not None]
        return measured[-1] if measured else None

    @property
    def needs_training(self) -> tuple[str, ...]:
        """Names of the passes after which the model should be healed; none once it was."""
        if self.healing is not None:
            return ()
        return tuple(p.name for p in self.passes if p.exactness == "needs training")

    def training_hint(self, artifact: str = "ARTIFACT", source: str | None = None) -> str:
        """Return one line that says which passes need training and how to heal, or nothing.

        Args:
            artifact: Folder of the saved model.
            source: The model that went in; by default as the report has it.
        """
        if not self.needs_training:
            return ""
        names = " and ".join(dict.fromkeys(self.needs_training))
        command = f"kvxform heal {artifact} --source {source or self.source.name} -o HEALED"
        return f"what {names} changed should be trained: {command}"

    def to_data(self) -> dict[str, Any]:
        """Return plain data."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """Return canonical JSON; equal reports give equal text."""
        return json.dumps(rounded(self.to_data()), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Build a report from its JSON.

        Raises:
            ArtifactError: KVX602 if the text is not a report of this version.
        """
        try:
            report = TypeAdapter(cls).validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            raise ArtifactError(
                "KVX602", "report.json must be a report", got=first["msg"], at=place
            ) from error
        if report.version != REPORT_VERSION:
            raise ArtifactError(
                "KVX604", f"report version must be {REPORT_VERSION}", got=report.version
            )
        return report

    def to_html(self) -> str:
        """Return one HTML page with everything in it."""
        from kvxform.report_html import render_report  # jinja2 only when a page is wanted

        return render_report(self)
