"""Cache planes as inputs and outputs of the graph, named as ONNX Runtime GenAI and optimum do.

Input `past_key_values.<layer>.<stream>[_<plane>]`, output `present.<layer>.<stream>[_<plane>]`; an
unencoded stream has one plane and no suffix. An empty cache is a past of length 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from kvxform.codecs.base import PlaneSpec, dtype_from_name
from kvxform.codegen.onnx.builder import onnx_dtype
from kvxform.ir.plan import CachePlan, SitePlan
from kvxform.ir.stream_plan import StreamPlan

PAST, PRESENT = "past_key_values", "present"
BUFFERS = ("sink", "recent", "scores")  # planes of tokens that are not encoded


def has_tail(plan: StreamPlan) -> bool:
    """Whether some tokens after the sink stay unencoded for a while."""
    return plan.recent_capacity > 0


def is_plain(plan: StreamPlan, dtype: ir.DataType) -> bool:
    """Whether a stream is stored in the dtype of the model, with no codec and no regions."""
    if plan.codec["codec"] != "none" or plan.regions.sink or has_tail(plan):
        return False
    return onnx_dtype(plan.planes[0].torch_dtype) == dtype


def plane_specs(plan: StreamPlan) -> tuple[PlaneSpec, ...]:
    """Return all planes of a stream: those of the codec, then `sink` and `recent` if it has them.

    The exact planes are in the dtype of the regions, one row a token; `scores` are those of recent
    tokens, where tokens are ranked.
    """
    extra = [("sink", plan.regions.sink > 0), ("recent", has_tail(plan))]
    exact = [PlaneSpec(n, plan.regions.dtype, plan.head_dim) for n, present in extra if present]
    scores = [PlaneSpec("scores", "float32", 1)] if plan.score_bytes else []
    return (*plan.planes, *exact, *scores)


@dataclass
class CachePorts:
    """All cache inputs and outputs of a graph, in the order of their layers.

    Attributes:
        plan: What is cached.
        capacity: Symbol of the rows of all planes where these are written in place; None where
            they grow.
        past: Inputs by `<layer>.<stream>[_<plane>]`.
        present: Outputs by the same keys.
    """

    plan: CachePlan
    capacity: str | None = None
    past: dict[str, ir.Value] = field(default_factory=dict)
    present: dict[str, ir.Value] = field(default_factory=dict)

    def enter(self, site: SitePlan, stream: str) -> dict[str, ir.Value]:
        """Add the inputs of one stream, by plane name.

        Each is `[batch_size, Hk, rows, width]`; with one head where all of them share a row.
        """
        entered = {}
        for spec in plane_specs(site.streams[stream]):
            key = port_key(site, stream, spec.name)
            rows = self.capacity or f"past_{self._rows(site, stream, spec)}"
            entered[spec.name] = ir.Value(
                name=f"{PAST}.{key}",
                type=ir.TensorType(onnx_dtype(dtype_from_name(spec.dtype))),
                shape=ir.Shape(["batch_size", spec.heads(site.num_kv_heads), rows, spec.width]),
            )
            self.past[key] = entered[spec.name]
        return entered

    def leave(self, site: SitePlan, stream: str, plane: str, value: ir.Value) -> ir.Value:
        """Make `value` the output of one plane."""
        spec = next(s for s in plane_specs(site.streams[stream]) if s.name == plane)
        key = port_key(site, stream, plane)
        total = self.capacity or f"total_{self._rows(site, stream, spec)}"
        value.name = f"{PRESENT}.{key}"
        heads = spec.heads(site.num_kv_heads)
        value.shape = ir.Shape(["batch_size", heads, total, spec.width])
        self.present[key] = value
        return value

    def _rows(self, site: SitePlan, stream: str, spec: PlaneSpec) -> str:
        """Return the symbol of the rows of a plane, the same for planes that grow together."""
        plan = site.streams[stream]
        if spec.name not in BUFFERS:
            if not plan.regions.sink and not has_tail(plan):
                return "sequence_length"
            kind = "body" if spec.tokens_per_row == 1 else "groups"
        else:
            kind = "sink" if spec.name == "sink" else "recent"
        rules = {
            (s.streams[stream].regions, s.streams[stream].tokens_per_group)
            for s in self.plan.owners
        }
        layer = f"{site.layer}_" if len(rules) > 1 else ""
        return f"{layer}{stream}_{kind}_length"


def port_key(site: SitePlan, stream: str, plane: str) -> str:
    """Return the part of the name of a port that inputs and outputs share."""
    suffix = "" if plane == "value" else f"_{plane}"
    return f"{site.layer}.{stream}{suffix}"
