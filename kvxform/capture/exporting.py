"""From a module to an ExportedProgram with inputs `(input_ids, position_ids)` and one output."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from kvxform.errors import CaptureError

PREFIX = "source."  # where the adapter keeps the model; removed from names afterwards
_SAMPLE = (2, 7)  # batch and length of the trace; neither may be 0 or 1


class LogitsOnly(nn.Module):
    """Gives any decoder the signature `(input_ids, position_ids) -> logits`.

    Hugging Face models get `position_ids` and run without cache. A module whose forward does not
    know `position_ids` counts positions itself; `capture.positions` repairs that later.
    """

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.source = source
        parameters = inspect.signature(source.forward).parameters
        self.takes_positions = "position_ids" in parameters
        self.options: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Return logits `[B, S, vocab]` for int64 `[B, S]` tokens and positions."""
        options = dict(self.options)
        if self.takes_positions:
            options["position_ids"] = position_ids
        out = self.source(input_ids, **options)
        logits = getattr(out, "logits", out[0] if isinstance(out, tuple | list) else out)
        if not isinstance(logits, Tensor):
            raise CaptureError(
                "KVX304", "a model must return logits", where="capture", got=type(out).__name__
            )
        return logits


def prepare(module: nn.Module, dtype: torch.dtype | None = None) -> LogitsOnly:
    """Return an adapter around an independent copy of `module` that shares its parameters.

    The copy is in evaluation mode, so that neither flags nor buffers of the original are touched.
    """
    shared = {id(p): p for p in module.parameters()}
    own = copy.deepcopy(module, memo=dict(shared)).eval()
    config = getattr(own, "config", None)
    if getattr(config, "_attn_implementation", "sdpa") not in ("sdpa", "eager"):
        own.set_attn_implementation("sdpa")  # type: ignore[operator]
    if dtype is not None and any(
        p.dtype != dtype for p in shared.values() if p.is_floating_point()
    ):
        own = copy.deepcopy(module).eval().to(dtype)
    return LogitsOnly(own)


def export_module(adapter: LogitsOnly) -> ExportedProgram:
    """Export with dynamic batch and sequence.

    Raises:
        CaptureError: KVX302 with the reason that torch.export gives.
    """
    device = next((p.device for p in adapter.parameters()), torch.device("cpu"))
    input_ids = torch.arange(1, 1 + _SAMPLE[0] * _SAMPLE[1], device=device).view(_SAMPLE)
    positions = torch.arange(_SAMPLE[1], device=device).expand(_SAMPLE).contiguous()
    dynamic = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    try:
        with torch.no_grad():
            return torch.export.export(
                adapter, (input_ids, positions), dynamic_shapes=(dynamic, dynamic)
            )
    except CaptureError:
        raise
    except Exception as failure:  # torch.export raises many unrelated types
        first_line = next(iter(str(failure).strip().splitlines()), "")
        raise CaptureError(
            "KVX302",
            "torch.export must be able to trace the model",
            where="capture",
            got=f"{type(failure).__name__}: {first_line[:300]}",
            hint="the model must take input_ids [B, S] and treat batch and length as variable",
        ) from failure


def make_functional(exported: ExportedProgram) -> ExportedProgram:
    """Return an equal program without ops that write in place."""
    mutable = any(
        getattr(getattr(node.target, "_schema", None), "is_mutable", False)
        for node in exported.graph.nodes
    )
    return exported.run_decompositions({}) if mutable else exported
