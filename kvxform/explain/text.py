"""Print an explanation for people: one block for layers that are alike, exceptions after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from kvxform.capture.refusal import STEPS
from kvxform.explain.pass_text import format_pass
from kvxform.explain.records import (
    Explanation,
    LatentRecord,
    NormRecord,
    SiteRecord,
    WeightRecord,
)
from kvxform.ir.folding import fold_name, fold_names, fold_sentence, layer_words
from kvxform.ir.program import RejectedSite

Rename = Callable[[str], str]
Rows = dict[str, str]
_WIDTH = 10  # of the column of labels
_MORE = "then more than a choice of channels"  # between a linear layer and the heads
_MANY = 8  # rows in which an exception may differ before it is printed whole


def format_explanation(explanation: Explanation) -> str:
    """Return an explanation as text without a final line break."""
    attentions = [r for r in explanation.rejected if r.kind == "attention"]
    others = [r for r in explanation.rejected if r.kind != "attention"]
    blocks = [_heading(explanation, len(attentions), len(others))]
    if explanation.passes:
        return "\n\n".join([*blocks, *(format_pass(finding) for finding in explanation.passes)])
    blocks += _site_blocks(explanation.sites)
    blocks += _rejected_blocks(attentions)
    if others:
        blocks.append("\n".join(_mixer_lines(others)))
    return "\n\n".join(blocks)


def _heading(explanation: Explanation, rejected: int, mixers: int) -> str:
    known = ", ".join(filter(None, (explanation.family, explanation.dtype)))
    name = f"{explanation.model} ({known})" if known else explanation.model
    counts = [f"{len(explanation.sites)} raised", f"{rejected} rejected"]
    if mixers:
        counts.append(f"{mixers} other mixer{'s' if mixers > 1 else ''} of tokens")
    lines = [f"{name}: attention: {', '.join(counts)}"]
    return "\n".join([*lines, explanation.failure] if explanation.failure else lines)


def _site_blocks(sites: Sequence[SiteRecord]) -> list[str]:
    """Return one block for the rows that most layers have, and one for every exception."""
    groups: dict[tuple[tuple[str, str], ...], list[SiteRecord]] = {}
    for site in sites:
        groups.setdefault(tuple(site_rows(site, fold_name).items()), []).append(site)
    if not groups:
        return []
    usual = max(groups, key=lambda rows: len(groups[rows]))
    order = [usual, *(rows for rows in groups if rows != usual)]
    return [_site_block(rows, groups[rows], usual, groups[usual]) for rows in order]


def _site_block(
    items: tuple[tuple[str, str], ...],
    group: Sequence[SiteRecord],
    usual: tuple[tuple[str, str], ...],
    usual_group: Sequence[SiteRecord],
) -> str:
    rename = _same if len(group) == 1 else fold_name
    rows, common = site_rows(group[0], rename), dict(usual)
    own, where = dict(items), layer_words(s.layer for s in group)
    changed = [key for key in {**own, **common} if own.get(key) != common.get(key)]
    note = ""
    if items is not usual and len(changed) < _MANY:
        rows = {key: rows.get(key, "none") for key in changed}
        note = f"    as {layer_words(s.layer for s in usual_group)}, but:"
    title = f"{where}    {', '.join(fold_names([s.module for s in group]))}{note}"
    return "\n".join([title, *_lines(rows)])


def _same(name: str) -> str:
    return name


def _lines(rows: Rows) -> Iterator[str]:
    for label, text in rows.items():
        yield f"  {label:<{_WIDTH}} {text}".rstrip()


def site_rows(site: SiteRecord, rename: Rename) -> Rows:
    """Return what is known of a site as labelled lines.

    Args:
        site: The site.
        rename: Applied to every name of a weight or module.
    """
    rows = {
        "attention": site.origin,
        "heads": _heads(site),
        "scores": _scores(site, rename),
        "rope": _rope(site, rename),
    }
    for norm in site.norms:
        label = {"input": "norm", "output": "norm after"}.get(norm.role, f"norm {norm.role}")
        rows[label.replace("norm input of", "norm for")] = _norm(norm, rename)
    for name in "qkvo":
        text = _weight(getattr(site, name), rename)
        rows[name] = text.replace(_MORE, f"then norm {name}") if f"norm {name}" in rows else text
    if site.latent is not None:
        rows |= _latent(site.latent, rename)
    if site.owner != site.layer:
        rows["cache"] = f"reads the keys and values of layer {site.owner}"
    for i, note in enumerate(site.notes):
        rows["note" if i == 0 else f"note {i + 1}"] = fold_sentence(note)
    return rows


def _heads(site: SiteRecord) -> str:
    kind = "MHA" if site.group == 1 else f"GQA, {site.group} query heads to one"
    if site.group > 1 and site.num_kv_heads == 1:
        kind = "MQA"
    values = "" if site.v_head_dim == site.head_dim else f" (values {site.v_head_dim})"
    return (
        f"{site.num_q_heads} query, {site.num_kv_heads} KV ({kind}), "
        f"head_dim {site.head_dim}{values}"
    )


def _scores(site: SiteRecord, rename: Rename) -> str:
    default = f" = 1/sqrt({site.head_dim})" if site.is_default_scale else ""
    parts = [f"scale {site.scale:.6g}{default}", "causal" if site.causal else "bidirectional"]
    if site.window is not None:
        parts.append(f"window {site.window}")
    if site.chunk is not None:
        parts.append(f"chunks of {site.chunk}")
    if site.softcap is not None:
        parts.append(f"softcap {site.softcap:g}")
    if site.sink_logits is not None:
        parts.append(f"sink logits {rename(site.sink_logits)}")
    if site.alibi_slopes is not None:
        parts.append(f"ALiBi slopes {rename(site.alibi_slopes)}")
    return ", ".join(parts)


def _rope(site: SiteRecord, rename: Rename) -> str:
    rope = site.rope
    if rope is None:
        return (
            "not raised: positions enter q or k in another way" if site.keeps_positions else "none"
        )
    share = "all" if rope.rotary_dim == site.head_dim else f"{rope.rotary_dim} of"
    parts = [f"{share} {site.head_dim} channels", f"{rope.pairs} pairs"]
    if rope.theta is not None:
        parts.append(f"theta {rope.theta:g}")
        if rope.linear_factor != 1.0:
            parts.append(f"positions divided by {rope.linear_factor:g}")
    else:
        words = {"table": "frequencies from a table", "unknown": "frequencies"}
        parts.append(f"{words[rope.frequencies]} {rename(rope.inv_freq)}")
    if rope.attention_scaling != 1.0:
        parts.append(f"cos and sin times {rope.attention_scaling:.6g}")
    return ", ".join(parts)


def _norm(norm: NormRecord, rename: Rename) -> str:
    parts = [f"{norm.kind}{f' {norm.place}' if norm.place else ''}", f"eps {norm.eps:g}"]
    if norm.gain is None:
        parts.append("no gain")
    else:
        offset = f" + {norm.offset:g}" if norm.offset else ""
        parts.append(f"gain {rename(norm.gain)}{offset}")
    if norm.bias is not None:
        parts.append(f"bias {rename(norm.bias)}")
    return ", ".join(parts)


def _weight(weight: WeightRecord | None, rename: Rename) -> str:
    if weight is None:
        return "not a plain linear layer"
    text = f"{rename(weight.weight)} {list(weight.shape)}{_slice(weight)}"
    if weight.layout == "in_out":
        text += ", stored [in, out]"
    if weight.bias is None:
        return text
    is_usual = weight.bias == weight.weight.removesuffix("weight") + "bias"
    return f"{text}, bias" if is_usual else f"{text}, bias {rename(weight.bias)}"


def _latent(latent: LatentRecord, rename: Rename) -> Rows:
    shared = f", keys share {latent.rope_dim} more channels" if latent.rope_dim else ""
    return {
        "latent": f"{latent.rank} channels make all keys and values{shared}",
        "up k": _weight(latent.up_k, rename),
        "up v": _weight(latent.up_v, rename),
    }


def _slice(weight: WeightRecord) -> str:
    """Return which rows or columns the heads take, or nothing if they take all."""
    size = weight.shape[0 if weight.axis == "rows" else 1]
    first, count = weight.start, weight.heads * weight.head_dim
    if first is None:
        return f", {_MORE}"
    if weight.head_stride == weight.head_dim or weight.heads == 1:
        return "" if count == size else f", {weight.axis} {first}-{first + count - 1}"
    last = first + weight.head_dim - 1
    return f", {weight.axis} {first}-{last} of every {weight.head_stride}"


def _rejected_blocks(rejected: Sequence[RejectedSite]) -> list[str]:
    """Return one block for candidates that were left alone for the same reason."""
    groups: dict[tuple[tuple[str, str], ...], list[RejectedSite]] = {}
    for site in rejected:
        groups.setdefault(tuple(_rejected_rows(site, fold_sentence).items()), []).append(site)
    blocks = []
    for group in groups.values():
        rows = _rejected_rows(group[0], _same if len(group) == 1 else fold_sentence)
        title = f"rejected    {', '.join(fold_names([s.module for s in group])) or '(no module)'}"
        blocks.append("\n".join([title, *_lines(rows)]))
    return blocks


def _rejected_rows(site: RejectedSite, rename: Rename) -> Rows:
    rows = {"candidate": site.origin}
    for step in site.matched:
        name, _, found = step.partition(": ")
        rows[f"+ {name}"] = rename(found)
    rows[f"- {STEPS[len(site.matched)]}"] = rename(site.reason)
    if site.node and site.node != site.origin:
        rows["differs"] = f"first at {site.node}"
    if site.hint:
        rows["to change"] = rename(site.hint)
    return rows


def _mixer_lines(mixers: Sequence[RejectedSite]) -> Iterator[str]:
    groups: dict[tuple[str, str], list[RejectedSite]] = {}
    for site in mixers:
        groups.setdefault((fold_sentence(site.reason), site.origin), []).append(site)
    for (reason, origin), group in groups.items():
        modules = ", ".join(fold_names([site.module for site in group])) or "(no module)"
        yield f"not attention    {modules}: {reason}, at {origin}"
