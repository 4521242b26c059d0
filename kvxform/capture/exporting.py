"""From a module to an ExportedProgram with inputs `(input_ids, position_ids)` and one output."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
from collections.abc import Iterator
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
        return first_tensor(self.source(input_ids, **options))


def first_tensor(out: Any) -> Tensor:
    """Return the logits in what a model returns.

    Raises:
        CaptureError: KVX304 if there is no tensor where logits should be.
    """
    logits = getattr(out, "logits", out[0] if isinstance(out, tuple | list) else out)
    if isinstance(logits, Tensor):
        return logits
    raise CaptureError(
        "KVX304", "a model must return logits", where="capture", got=type(logits).__name__
    )


def prepare(module: nn.Module, dtype: torch.dtype | None = None) -> LogitsOnly:
    """Return an adapter around an independent copy of `module` that shares its parameters.

    The copy is in evaluation mode, so that neither flags nor buffers of the original are touched.
    With another `dtype` the parameters are copied too.
    """
    parameters = list(module.parameters())
    converts = dtype is not None and any(
        p.dtype != dtype for p in parameters if p.is_floating_point()
    )
    shared: dict[int, Any] = {} if converts else {id(p): p for p in parameters}
    own = copy.deepcopy(module, memo=shared).eval()
    if converts:
        own = own.to(dtype)
    choose_implementations(own)
    return LogitsOnly(own)


def choose_implementations(model: nn.Module) -> None:
    """Let a Hugging Face model compute in ways that can be traced; in place.

    Attention becomes `sdpa` unless it is `eager`. Mixtures of experts become `batched_mm`: the loop
    over experts depends on the tokens, and `grouped_mm` knows no float64.
    """
    config = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", "sdpa") not in ("sdpa", "eager", None):
        set_attention: Any = model.set_attn_implementation
        set_attention("sdpa")
    set_experts: Any = getattr(model, "set_experts_implementation", None)
    if set_experts is not None:
        set_experts("batched_mm")


def export_module(adapter: LogitsOnly, length: int = _SAMPLE[1]) -> ExportedProgram:
    """Export with dynamic batch and sequence.

    Args:
        adapter: The model.
        length: Tokens of the sample that is traced.

    Raises:
        CaptureError: KVX302 with the reason that torch.export gives.
    """
    device = next((p.device for p in adapter.parameters()), torch.device("cpu"))
    shape = (_SAMPLE[0], length)
    input_ids = torch.zeros(shape, dtype=torch.int64, device=device)
    positions = torch.arange(length, device=device).expand(shape).contiguous()
    dynamic = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    try:
        with torch.no_grad(), _quiet():
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
            hint=_hint(failure),
        ) from failure


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drop what torch prints: a trace that fails prints its whole graph, and the error says why."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _hint(failure: Exception) -> str:
    """Return what would have to change in a model that cannot be exported."""
    if "data-dependent" in str(failure):
        return (
            "the model must not branch on values: on token ids, or on positions, as rotary "
            "embeddings do whose frequencies change with the length (dynamic NTK)"
        )
    return "the model must take input_ids [B, S] and treat batch and length as variable"


def make_functional(exported: ExportedProgram) -> ExportedProgram:
    """Return an equal program without ops that write in place."""
    mutable = any(
        getattr(getattr(node.target, "_schema", None), "is_mutable", False)
        for node in exported.graph.nodes
    )
    return exported.run_decompositions({}) if mutable else exported


class ExportedReference:
    """Calls an exported program as `(input_ids, position_ids) -> logits`, whatever its inputs."""

    def __init__(self, exported: ExportedProgram) -> None:
        self.module = exported.module()
        self.inputs = find_inputs(exported)
        self.takes_positions = len(self.inputs) == 2
        self.samples, self.structure = torch.utils._pytree.tree_flatten(exported.example_inputs)

    def __call__(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Return logits `[B, S, vocab]`."""
        values = dict(zip(self.inputs, (input_ids, position_ids), strict=False))
        leaves = [values.get(i, sample) for i, sample in enumerate(self.samples)]
        args, kwargs = torch.utils._pytree.tree_unflatten(leaves, self.structure)
        return first_tensor(self.module(*args, **kwargs))


def find_inputs(exported: ExportedProgram) -> tuple[int, ...]:
    """Return which user inputs are `input_ids` and, if there is one, `position_ids`.

    Raises:
        CaptureError: KVX304 if there are other tensors among the inputs.
    """
    names = list(exported.graph_signature.user_inputs)
    nodes = {n.name: n for n in exported.graph.nodes if n.op == "placeholder"}
    tensors = [
        i for i, n in enumerate(names) if n in nodes and isinstance(nodes[n].meta["val"], Tensor)
    ]
    known = {name: i for i, name in enumerate(names) if i in tensors}
    first = known.get("input_ids", tensors[0] if tensors else None)
    second = next((i for name, i in known.items() if "pos" in name and i != first), None)
    found = tuple(i for i in (first, second) if i is not None)
    if first is None or set(found) != set(tensors):
        raise CaptureError(
            "KVX304",
            "a model may take only input_ids and position_ids",
            where="capture",
            got=[str(names[i]) for i in tensors],
            hint="export it without attention_mask, cache and labels",
        )
    return found
