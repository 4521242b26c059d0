"""The whole capture: source -> exported program -> normalised graph -> raised Program -> proof."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

import kvxform.ir.ops as kvx
from kvxform.capture.attention import find_cores
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
from kvxform.capture.probing import TOLERANCE, Prober, coarsest, error, one_thread
from kvxform.capture.sharing import mark_owners, merge_equal_calls
from kvxform.capture.sites import SiteRaiser
from kvxform.capture.softmaxes import raise_softmaxes
from kvxform.capture.sources import AnySource, Source, open_source
from kvxform.capture.structure import op_name
from kvxform.capture.tidy import remove_dead
from kvxform.errors import CaptureError
from kvxform.ir.program import ModelInfo, Program, default_positions
from kvxform.ir.store import watching

Progress = Callable[[str], None]
_TRIALS = ((2, 7, 0), (1, 1, 0), (3, 11, 5))  # batch, length and first position


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
            or the path of a GGUF file. It is not changed.
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
    reference: LogitsOnly | ExportedReference
    if isinstance(model, ExportedProgram):
        exported, reference = model, ExportedReference(model)
    else:
        adapter = prepare(model, dtype)
        tell("exporting")
        exported, reference = export_module(adapter), adapter
    tell("raising to the dialect")
    graph, weights = normalise(make_functional(exported))
    with watching(opened.store):  # not around the export: its frames would be taken for the source
        with one_thread():
            program = raise_graph(graph, weights, opened.info)
        tell("comparing with the source")
        worst = compare(program, reference)
    program.store = opened.store
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


def compare(program: Program, reference: LogitsOnly | ExportedReference) -> float:
    """Return the largest absolute difference of logits between a program and its source.

    Raises:
        CaptureError: KVX304 if it is more than the dtype explains.
    """
    module, rows = program.to_module(), embedding_rows(program)
    coarse = _score_dtype(program)
    generator, worst = torch.Generator().manual_seed(0), 0.0
    device = next((w.device for w in program.weights.values()), torch.device("cpu"))
    for *shape, start in _TRIALS:
        input_ids = torch.randint(0, rows, shape, generator=generator).to(device)
        positions = default_positions(input_ids) + (start if reference.takes_positions else 0)
        with torch.no_grad():
            want = reference(input_ids, positions)
            got = module(input_ids, positions)
        relative = error(got, want)
        if relative > 10 * TOLERANCE.get(coarse, TOLERANCE[torch.float32]):
            raise CaptureError(
                "KVX304",
                "the captured program must give the logits of the source",
                where="capture",
                got=f"a relative difference of {relative:.1e} at batch and length {shape}",
            )
        worst = max(worst, float((got - want).abs().max()))
    return worst


def _score_dtype(program: Program) -> torch.dtype:
    """Return the coarsest dtype of the logits and of the scores of any attention."""
    found = [program.dtype]
    for node in program.calls(kvx.ATTENTION):
        q, softmax = node.args[0], node.kwargs.get("softmax_dtype")
        assert isinstance(q, fx.Node)
        found.append(q.meta["type"].dtype)
        if isinstance(softmax, torch.dtype):
            found.append(softmax)
    return coarsest(*found)


def embedding_rows(program: Program) -> int:
    """Return how many token ids the model knows."""
    for node in program.graph.nodes:
        if op_name(node) == "embedding" and node.args[1] is not program.placeholder("position_ids"):
            return int(program.weights[str(node.args[0].target)].shape[0])
    return program.info.vocab_size
