"""The whole capture: source -> exported program -> normalised graph -> raised Program -> proof."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from kvxform.capture.attention import find_cores
from kvxform.capture.comparing import compare, longest_trial
from kvxform.capture.decompose import decompose
from kvxform.capture.einsum import expand_einsums
from kvxform.capture.exporting import (
    ExportedReference,
    LogitsOnly,
    export_module,
    make_functional,
    prepare,
)
from kvxform.capture.latents import raise_latents
from kvxform.capture.layer_norms import raise_layer_norms
from kvxform.capture.mixers import find_mixers
from kvxform.capture.normalise import normalise
from kvxform.capture.norms import raise_norms
from kvxform.capture.orient import orient
from kvxform.capture.positions import read_positions
from kvxform.capture.probing import Prober, one_thread
from kvxform.capture.sharing import mark_owners, merge_equal_calls
from kvxform.capture.sites import SiteRaiser
from kvxform.capture.softmaxes import raise_softmaxes
from kvxform.capture.sources import AnySource, Source, open_source
from kvxform.capture.tidy import remove_dead
from kvxform.errors import CaptureError
from kvxform.ir.program import ModelInfo, Program
from kvxform.ir.store import watching

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Captured:
    """A captured model.

    Attributes:
        program: The raised program.
        tokenizer_path: Folder or file with the tokenizer of the source, or None.
        max_abs_error: Largest difference between a logit of the program and of the source.
    """

    program: Program
    tokenizer_path: str | None
    max_abs_error: float = 0.0


def capture(
    source: AnySource,
    *,
    name: str | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Captured:
    """Turn a model into a Program in the kvx dialect.

    Args:
        source: A module, an exported program, `smollm2-135m`, a Hugging Face folder or cached id,
            the path of a GGUF file, or `file.py:function`, which is run. It is not changed.
        name: What reports call the model; default: derived from `source`.
        dtype: Compute dtype; default: that of the source, float32 for GGUF files.
        progress: Called with a short sentence before each step.

    Raises:
        CaptureError: KVX301 unknown source, KVX302 export failed, KVX303 no attention found,
            KVX304 the model takes or does what cannot be captured.
    """
    tell = progress or (lambda _: None)
    tell("reading the model")
    opened = open_source(source, name=name, dtype=dtype)
    return capture_opened(opened, dtype=dtype, tell=tell)


def capture_opened(opened: Source, *, dtype: torch.dtype | None, tell: Progress) -> Captured:
    """Capture a source that has been opened; see `capture`."""
    model = opened.model
    if isinstance(model, ExportedProgram):
        return _prove(opened, _raise(opened, model, tell), ExportedReference(model), tell)
    adapter = prepare(model, dtype)
    tell("exporting")
    program = _raise(opened, export_module(adapter), tell)
    try:
        return _prove(opened, program, adapter, tell)
    except CaptureError:
        length = longest_trial(program)
        if length is None:
            raise
    tell("exporting again, with a longer sample")
    program = _raise(opened, export_module(adapter, length), tell)
    return _prove(opened, program, adapter, tell)


def _raise(opened: Source, exported: ExportedProgram, tell: Progress) -> Program:
    """Return the raised program of an export."""
    tell("raising to the dialect")
    graph, weights = normalise(make_functional(exported))
    # not around the export: frames of the watch would be taken for the source
    with watching(opened.store), one_thread():
        program = raise_graph(graph, weights, opened.info)
    program.store = opened.store
    return program


def _prove(
    opened: Source, program: Program, reference: LogitsOnly | ExportedReference, tell: Progress
) -> Captured:
    """Compare a raised program with its source."""
    tell("comparing with the source")
    with watching(opened.store):
        worst = compare(program, reference)
    return Captured(program, opened.info.tokenizer_path, worst)


def raise_graph(graph: fx.Graph, weights: dict[str, Tensor], info: ModelInfo) -> Program:
    """Raise a normalised graph to the dialect.

    Raises:
        CaptureError: KVX303 if no attention could be raised.
    """
    decompose(graph)
    expand_einsums(graph)
    prober = Prober(graph, weights)
    orient(graph, prober.content)
    raise_softmaxes(prober)
    raise_norms(prober)
    remove_dead(graph)
    prober.refresh()
    if raise_layer_norms(prober):
        remove_dead(graph)
        prober.refresh()
    raiser = SiteRaiser(prober)
    for core in find_cores(graph, prober.content):
        raiser.raise_core(core)
    if not raiser.sites:
        reasons = sorted({r.reason for r in raiser.rejected})
        raise CaptureError(
            "KVX303",
            "a model must have attention that can be cached",
            where="capture",
            got="; ".join(reasons) or "no softmax over scores and no SDPA call",
            hint="kvxform explain shows how far each candidate got",
            rejected=raiser.rejected,
        )
    remove_dead(graph)
    prober.refresh()
    sites = raise_latents(prober, raiser.sites)
    context_length = read_positions(prober, info.context_length)
    remove_dead(graph)
    merge_equal_calls(graph)
    graph.lint()
    used = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
    program = Program(
        graph=graph,
        weights={k: v for k, v in weights.items() if k in used},
        sites=mark_owners(graph, sites),
        info=complete_info(info, graph, context_length),
        rejected=tuple(raiser.rejected),
    )
    return replace(program, rejected=(*program.rejected, *find_mixers(program)))


def complete_info(info: ModelInfo, graph: fx.Graph, context_length: int | None) -> ModelInfo:
    """Fill in what the graph knows: vocabulary size, dtype, longest sequence."""
    (output,) = (n for n in graph.nodes if n.op == "output")
    type_ = output.args[0].meta["type"]
    return replace(
        info,
        vocab_size=int(type_.shape[2]),
        dtype=str(type_.dtype).removeprefix("torch."),
        context_length=context_length,
    )
