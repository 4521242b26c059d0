"""Print programs and graphs as text: deterministic, one node a line. `ir.parse` reads it back.

A line of a graph looks like this::

    %41: f32[B, 9, S, 64] = kvx.cached_attention(%38, %40, %1, layer=3, scale=0.125)   # layers.3.self_attn  <- insert-cache <- sdpa (modeling_llama.py:271)

Nodes are numbered in graph order, placeholders first. Every argument that a node carries is
printed, keywords in the order of the op's schema, so that the graph read back is the graph that
was printed. Devices alone are left out: a graph runs where its inputs are. `docs/ir.md` has the
grammar.
"""  # noqa: E501

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from kvxform.errors import PassError
from kvxform.ir.plan import SitePlan
from kvxform.ir.program import AttentionSite, Program
from kvxform.ir.stream_plan import KeyView, StreamPlan
from kvxform.ir.targets import keyword_order, target_name
from kvxform.ir.types import short_dtype

WORDS: dict[str, Any] = {
    "None": None,
    "True": True,
    "False": False,
    "strided": torch.strided,
    "contiguous_format": torch.contiguous_format,
    "preserve_format": torch.preserve_format,
    "channels_last": torch.channels_last,
}
ARROW = " <- "
LONGEST_CONSTANT = 8  # numbers of an option that are printed
NOTHING = "-"  # an empty field of a provenance comment


def format_graph(graph: fx.Graph) -> str:
    """Return the graph as text, one node a line, with a final line break.

    Raises:
        PassError: KVX215 if a node calls a function or has an argument that has no text form.
    """
    numbers = number_nodes(graph)
    lines = [_format_node(node, numbers) for node in numbers]
    lines += [
        f"return {format_value(node.args[0], numbers)}" for node in graph.nodes if is_output(node)
    ]
    return "\n".join(lines) + "\n"


def format_program(program: Program) -> str:
    """Return the graph as text under a header of comments: model, sites, facts, plan, passes.

    Layers whose site or plan is the same share one line. `parse_graph` reads the result.

    Raises:
        PassError: KVX215, see `format_graph`.
    """
    info = program.info
    context = "" if info.context_length is None else f", context {info.context_length}"
    header = [f"model: {info.name} ({info.family}), {info.dtype}, vocab {info.vocab_size}{context}"]
    header += ["sites:", *_fold((site.layer, _format_site(site)) for site in program.sites)]
    for site in program.rejected:
        label = "mixer" if site.kind == "mixer" else "rejected"
        header.append(f"{label}: {site.module}: {site.reason}")
    facts = (f"{name}={value}" for name, value in sorted(program.facts.changed().items()))
    header.append(f"facts: {', '.join(facts) or NOTHING}")
    if program.plan is not None:
        header.append(f"plan: {program.plan.layout}")
        header += _fold((site.layer, _format_site_plan(site)) for site in program.plan.sites)
    header.append(f"passes: {', '.join(program.passes) or NOTHING}")
    one_line_each = (line.replace("\n", " ") for line in header)
    return "".join(f"# {line}\n" for line in one_line_each) + format_graph(program.graph)


def _fold(layers: Iterable[tuple[int, str]]) -> list[str]:
    """Return one indented line per distinct text, with the layers that have it."""
    by_text: dict[str, list[int]] = {}
    for layer, text in layers:
        by_text.setdefault(text, []).append(layer)
    return [
        f"  layer{'s' if len(found) > 1 else ''} {format_ranges(found)}: {text}"
        for text, found in by_text.items()
    ]


def format_ranges(numbers: Iterable[int]) -> str:
    """Return ascending numbers with runs folded, for instance `0-2, 5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def _format_site(site: AttentionSite) -> str:
    parts = [f"{site.num_q_heads} q heads, {site.num_kv_heads} kv heads, d {site.head_dim}"]
    if site.v_head_dim != site.head_dim:
        parts.append(f"dv {site.v_head_dim}")
    parts.append(f"scale {site.scale!r}")
    if site.rope is not None:
        pairs = "interleaved" if site.rope.interleaved else "half"
        parts.append(f"rope({site.rope.rotary_dim}, {pairs})")
    for name in ("window", "chunk", "softcap", "sink_logits", "alibi_slopes"):
        value = getattr(site, name)
        if value is not None:
            parts.append(f"{name} {value}")
    if site.latent is not None:
        parts.append(f"from a latent of {site.latent.rank} + {site.latent.rope_dim}")
    if site.payload != "kv":
        parts.append(f"payload {site.payload}")
    if site.shared_with is not None:
        parts.append(f"k and v of layer {site.shared_with}")
    return f"{', '.join(parts)}; basis k {site.k_basis}, v {site.v_basis}"


def _format_site_plan(site: SitePlan) -> str:
    owner = "" if site.owner == site.layer else f"cache of layer {site.owner}; "
    if site.payload == "pair":
        return f"{owner}half of a pair of layers: {_format_stream(site.key)}"
    if isinstance(site.value, KeyView):
        first = f"v the first {site.value.head_dim} channels of k"
        if site.key.makes_heads:
            first = "k and v of all heads are made from it"
        return f"{owner}{site.payload}: k {_format_stream(site.key)}; {first}"
    return f"{owner}k {_format_stream(site.key)}; v {_format_stream(site.value)}"


def _format_stream(stream: StreamPlan) -> str:
    parts = [_format_codec(stream.codec), f"basis {stream.basis}"]
    if stream.rope != "none":
        parts.append(f"{stream.rope}-rope")
    regions = stream.regions
    if regions.sink or regions.recent:
        sizes = f"sink {regions.sink}, recent {regions.recent}"
        parts.append(f"{sizes} ({regions.flush}, {regions.dtype})")
    if stream.read.form != "element":
        parts.append(f"read {stream.read.form}")
    return ", ".join(parts)


def _format_codec(codec: Mapping[str, Any]) -> str:
    options = {key: _format_option(value) for key, value in sorted(codec.items())}
    name = options.pop("codec")
    return f"{name}({', '.join(f'{key}={value}' for key, value in options.items())})"


def _format_option(value: Any) -> str:
    """Return an option of a codec as text; long constants by their shape, `<2 x 64 numbers>`."""
    if isinstance(value, Mapping):
        return _format_codec(value)
    sizes, inner = [], value
    while isinstance(inner, list | tuple) and inner:
        sizes.append(len(inner))
        inner = inner[0]
    is_long = math.prod(sizes) > LONGEST_CONSTANT
    return f"<{' x '.join(map(str, sizes))} numbers>" if is_long else str(value)


def number_nodes(graph: fx.Graph) -> dict[fx.Node, int]:
    """Return the number of every node but the output, in the order of their lines."""
    nodes = [node for node in graph.nodes if not is_output(node)]
    nodes.sort(key=lambda node: node.op != "placeholder")  # stable: the rest stays in graph order
    return {node: number for number, node in enumerate(nodes)}


def is_output(node: fx.Node) -> bool:
    """Return whether `node` is the output of its graph."""
    return node.op == "output"


def format_value(value: Any, numbers: Mapping[fx.Node, int]) -> str:
    """Return the text of one argument.

    Raises:
        PassError: KVX215 if it has no text form.
    """
    if isinstance(value, fx.Node):
        return f"%{numbers[value]}"
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, torch.dtype):
        return short_dtype(value)
    if type(value) in (int, float):
        return repr(value)
    if isinstance(value, tuple):
        items = ", ".join(format_value(item, numbers) for item in value)
        return f"({items},)" if len(value) == 1 else f"({items})"
    if isinstance(value, list):
        return f"[{', '.join(format_value(item, numbers) for item in value)}]"
    if isinstance(value, slice):
        parts = (value.start, value.stop, value.step)
        return f"slice({', '.join(format_value(part, numbers) for part in parts)})"
    for word, meaning in WORDS.items():
        if value is meaning:
            return word
    raise PassError(
        "KVX215", "an argument in a graph must have a text form", got=type(value).__name__
    )


def _format_node(node: fx.Node, numbers: Mapping[fx.Node, int]) -> str:
    kind = node.meta.get("type")
    left = f"%{numbers[node]}" if kind is None else f"%{numbers[node]}: {kind}"
    comment = format_provenance(node.meta)
    call = _format_call(node, numbers)
    return f"{left} = {call}   # {comment}" if comment else f"{left} = {call}"


def _format_call(node: fx.Node, numbers: Mapping[fx.Node, int]) -> str:
    if node.op == "placeholder":
        return f"placeholder({json.dumps(node.target)})"
    if node.op == "get_attr":
        return f"weight({json.dumps(node.target)})"
    name = target_name(node.target) if node.op == "call_function" else None
    if name is None:
        raise PassError(
            "KVX215",
            "a graph may call only functional aten ops and kvx ops",
            got=f"{node.op} {node.target}",
            at=f"{node.name} ({node.meta.get('origin', '')})",
        )
    assert callable(node.target), "call_function has a callable target"
    arguments = [format_value(value, numbers) for value in node.args]
    for keyword in keyword_order(node.target, node.kwargs):
        value = node.kwargs[keyword]
        if not isinstance(value, torch.device):
            arguments.append(f"{keyword}={format_value(value, numbers)}")
    return f"{name}({', '.join(arguments)})"


def format_provenance(meta: Mapping[str, Any]) -> str:
    """Return `module  <- last pass <- ... <- first pass <- origin`, or what there is of it."""
    module, origin = meta.get("module") or "", meta.get("origin") or ""
    via = tuple(meta.get("via") or ())
    if not (origin or via):
        return _format_field(module) if module else ""
    first, *rest = (_format_field(field) for field in (module, *reversed(via), origin))
    return f"{first} {ARROW}{ARROW.join(rest)}"


def _format_field(field: str) -> str:
    if not field:
        return NOTHING
    is_plain = field.isprintable() and "<-" not in field and field == field.strip()
    if is_plain and field != NOTHING and not field.startswith('"'):
        return field
    return json.dumps(field).replace("<", "\\u003c")
