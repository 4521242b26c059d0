"""Reports for tests, built by hand, so that what they must say is known."""

from __future__ import annotations

import dataclasses

from kvxform.report import (
    BoundRecord,
    CacheMeasured,
    LayerRecord,
    Measured,
    PassCost,
    PassRecord,
    PlanSummary,
    Report,
    SourceSummary,
)

EXACT = Measured(max_abs=1.5e-5, relative=1.234567891e-6, kl=2e-12, top1=1.0)
LOSSY = Measured(max_abs=4.25, relative=0.125, kl=0.0625, top1=0.875)
COST = PassCost((("kvx.hadamard", 24), ("aten.add", -1)), -1600, 1024.0, 4608)


def make_pass(
    name: str, exactness: str, measured: Measured | None, **changes: object
) -> PassRecord:
    """Return a pass that was measured, exact or not."""
    exact = exactness == "exact"
    record = PassRecord(
        name=name,
        options={"bits": 4},
        about=f"What {name} does.",
        source=f"Paper of {name}",
        exactness=exactness,
        matched=3,
        done_before=0,
        skipped=(("weight is read in 2 places", 1),),
        vs_before=measured,
        vs_source=measured,
        tolerance=3e-4 if exact else None,
        metric="relative" if exact else "kl",
        cost=COST
        if exact
        else dataclasses.replace(COST, operations=(), parameters=0, kv_bytes_per_token=256.0),
    )
    return dataclasses.replace(record, **changes)


def make_report(**changes: object) -> Report:
    """Return a report of a model of three layers, one exact pass and one that is not."""
    layers = tuple(
        LayerRecord(i, "int4 per token", "int4 per token", 36.0, 36.0, 256.0, 0.5 + i / 4, 0.125)
        for i in range(3)
    )
    report = Report(
        source=SourceSummary(
            "toy", "llama", "float32", 3, (("m.attn", "odd mask"),), 9, 3, 64, 0.0
        ),
        recipe={"version": 1, "name": "kv4", "passes": ["insert-cache"]},
        verify="probe",
        probes=(65, 31),
        passes=(
            make_pass("insert-cache", "exact", EXACT),
            make_pass("quantize-kv", "approximate", LOSSY),
        ),
        plan=PlanSummary(
            "paged(64)", 23040.0, 6480.0, 4.5, 8, 8192, 1 << 30, 1 << 28, 1e8, 3e7, 99
        ),
        layers=layers,
        bounds=(BoundRecord("max_kl", 0.1, 0.0625), BoundRecord("min_top1", 0.9, None)),
        cache=CacheMeasured(("ragged prefill and decode",), 1e-7, 0.0, 2e-6),
    )
    return dataclasses.replace(report, **changes)
