"""Decode over pages in fragment order: a Gluon kernel without shared memory in its loop.

docs/adr/0008-triton-decode.md says why it is built like this, `fragment` how pages are laid out.
Tokens are taken in units of 16: the rows of one mma. If keys or values share rows by two tokens,
there are two units, of the lower and the higher tokens of each block of 32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from kvxform.codegen.triton import fragment, fragment_levels
from kvxform.codegen.triton.fragment import BLOCK, ROW_WORDS, AreaLayout
from kvxform.codegen.triton.fragment_configs import count_columns, list_configs
from kvxform.codegen.triton.refusal import refuse
from kvxform.codegen.triton.registry import Emission
from kvxform.codegen.triton.spec import DecodeSpec, SiteSpec, StreamSpec

# Powers of two at which the codes of a half of a word stand, as `unpack_int*` leaves them.
SHIFTS = {2: (1, 4, 16, 64, 256, 1, 4, 16), 4: (1, 16, 1, 16), 8: (1, 1), 16: (1,)}


@dataclass(frozen=True)
class Slot:
    """One of the operands that a load is unpacked to.

    Attributes:
        index: Which of them.
        unit: Unit of 16 tokens that it belongs to.
        group: Its group of 16 channels.
    """

    index: int
    unit: int
    group: int


@dataclass(frozen=True)
class Load:
    """One load of 16 bytes a lane, `TILE / units` rows.

    Attributes:
        index: Position among the loads of its stream.
        offset: Words from the start of the tile, besides what depends on the lane.
        unit: Unit of its tokens if rows are not shared.
        slots: What it is unpacked to.
    """

    index: int
    offset: int
    unit: int
    slots: tuple[Slot, ...]


def make_context(spec: DecodeSpec) -> Emission:
    """Return the template and variables of the Gluon kernel of `spec`.

    Raises:
        CodegenError: KVX401 if pages of the site cannot be in fragment order.
    """
    site = spec.site
    reason = fragment.reason_against(site)
    if reason:
        rule = "pages in fragment order must hold whole words of both streams"
        refuse(rule, reason, "", "use layout rows")
    streams = {name: _stream(site, name) for name in ("key", "value")}
    is_final = bool(spec.softcap or spec.has_alibi or spec.has_slot_bias)
    variables = {
        **streams,
        **_geometry(site),
        **_arguments(spec),
        "kinds": sorted({stream["kind"] for stream in streams.values()}),
        "level_lines": {
            _kind(stream): fragment_levels.unpack_lines(stream)
            for stream in site.streams.values()
            if stream.table
        },
        "record": _record(site),
        "rotation": _rotation(spec),
        "start": _start(spec),
        "is_final": is_final,  # scores are in units of log2 before their maximum is taken
        "cap_log2": (spec.softcap or 0.0) / math.log(2),
        "configs": list_configs(site),
    }
    return Emission("decode_fragment.py.jinja", variables)


def _geometry(site: SiteSpec) -> dict[str, Any]:
    groups = site.key.head_dim // BLOCK
    area = fragment.areas(site)["key"]
    joins, order = _joins(groups)
    return {
        "units": _units(site),
        "groups": groups,
        "head_dim": site.key.head_dim,
        "columns": count_columns(site),
        "padded_group": 1 << (site.groups - 1).bit_length(),
        "page_size": site.page_size,
        "page_shift": site.page_size.bit_length() - 1,
        "chunk_words": fragment.chunk_words(site),
        "values_start": area.words(site.page_size),
        "records_start": fragment.record_start(site),
        "joins": joins,
        "join_order": order,
    }


def _units(site: SiteSpec) -> int:
    return fragment.block_tokens(site) // BLOCK


def _stream(site: SiteSpec, name: str) -> dict[str, Any]:
    stream, area, units = site.streams[name], fragment.areas(site)[name], _units(site)
    offset = "" if not stream.has_scale else stream.zero if stream.has_zero else "symmetric"
    shifts = (1,) if stream.table else SHIFTS[stream.bits]
    return {
        "kind": _kind(stream),
        "unit": _unit(stream),
        "factor": f"{name}_norm" if stream.gain else f"{name}_scale",
        "bits": stream.bits,
        "is_coded": stream.is_coded,
        "operand": stream.dtype or "float16",
        "offset": offset,
        "needs_sum": bool(offset),
        "middle": 2 ** (stream.bits - 1),
        "is_spread": area.tokens_per_row < units,  # blocks of 16 rows alternate between units
        "position_words": ROW_WORDS // area.tokens_per_row,
        "shifts": [shifts[g % len(shifts)] for g in range(area.groups)],
        "loads": _loads(site, area, units),
    }


def _kind(stream: StreamSpec) -> str:
    """Return the suffix of the function that unpacks words."""
    if stream.table:
        return f"levels{stream.bits}"
    return f"int{stream.bits}" if stream.is_coded else stream.dtype


def _unit(stream: StreamSpec) -> float:
    """Return what products with operands must be multiplied by: codes are subnormals."""
    if stream.table:
        return 1 / fragment_levels.UNIT
    return 2.0**24 if stream.is_coded else 1.0


def _loads(site: SiteSpec, area: AreaLayout, units: int) -> list[Load]:
    plane_words = area.words(site.page_size) // area.planes
    groups_a_row = min(area.slots, area.groups)
    loads: list[Load] = []
    for plane in range(area.planes):
        for unit in range(units // area.tokens_per_row):
            slots = tuple(
                Slot(i, unit + i // groups_a_row, plane * groups_a_row + i % groups_a_row)
                for i in range(area.slots)
            )
            offset = plane * plane_words + unit * BLOCK * ROW_WORDS
            loads.append(Load(len(loads), offset, unit, slots))
    return loads


def _record(site: SiteSpec) -> dict[str, Any]:
    """Return how a record is loaded: as one word of 16, 32 or 64 bits, or as three of 16."""
    names = [f"{stream}_{plane}" for stream, plane in fragment.record_fields(site)]
    loads = 3 if len(names) == 3 else min(len(names), 1)
    words = [name.replace("_", " ") for name in names]
    return {
        "names": names,
        "words": " and ".join(filter(None, [", ".join(words[:-1]), words[-1] if words else ""])),
        "loads": loads,
        "bits": 16 if loads == 3 else 16 * len(names),
    }


def _rotation(spec: DecodeSpec) -> dict[str, Any] | None:
    """Return the Hadamard of q: butterflies across groups, then 16 channels by one mma."""
    block = spec.query_block
    if block < 2:
        return None
    groups = spec.site.key.head_dim // BLOCK
    stages = []
    distance = 1
    while distance * BLOCK < block:
        firsts = [g for g in range(groups) if not g & distance]
        stages.append([(g, g + distance) for g in firsts])
        distance *= 2
    return {"stages": stages, "inner": min(block, BLOCK), "norm": repr(block**-0.5)}


def _start(spec: DecodeSpec) -> str:
    """Return the first token that the query sees as an expression, or nothing if all are seen."""
    if spec.window is not None:
        return f"length - {spec.window}"
    if spec.chunk is not None:
        return f"(length - 1) // {spec.chunk} * {spec.chunk}"
    return ""


def _joins(groups: int) -> tuple[list[str], list[int]]:
    """Return lines that join the outputs of all groups to `rows`, and the order of its axes."""
    level = [f"out{g}" for g in range(groups)]
    lines, depth = [], 0
    while len(level) > 1:
        pairs = list(zip(level[::2], level[1::2], strict=True))
        names = [f"rows{depth}_{i}" for i in range(len(pairs))] if len(pairs) > 1 else ["rows"]
        lines += [f"{name} = gl.join({a}, {b})" for name, (a, b) in zip(names, pairs, strict=True)]
        level, depth = names, depth + 1
    bits = [3 + i for i in range(depth)]  # [WARPS, 16, COLUMNS, bits of the group, low ones first]
    return lines, [0, 2, *reversed(bits), 1]


def _arguments(spec: DecodeSpec) -> dict[str, Any]:
    """Return parameters and arguments by function; each has those that this kernel uses."""
    signs = ["signs_ptr"] if spec.has_signs else []
    sinks = ["sink_ptr"] if spec.has_sink_logits else []
    lse = ["lse_ptr"] if spec.has_lse else []
    output = ["out_ptr", "out_stride_b", "out_stride_head", *sinks, *lse]
    launch = {
        "q_ptr": "q",
        "pool_ptr": "cache.pool",
        "table_ptr": "block_table",
        "items_ptr": "work.items",
        "parts_ptr": "work.parts",
        "stats_ptr": "work.stats",
        "arrived_ptr": "work.arrived",
        "out_ptr": "out",
    }
    optional = {
        "signs": ("signs_ptr", spec.has_signs),
        "sink_logits": ("sink_ptr", spec.has_sink_logits),
        "alibi_slopes": ("slopes_ptr", spec.has_alibi),
        "slot_bias": ("bias_ptr", spec.has_slot_bias),
        "lse": ("lse_ptr", spec.has_lse),
    }
    launch |= {pointer: name for name, (pointer, is_used) in optional.items() if is_used}
    launch |= {
        "q_stride_b": "q.stride(0)",
        "q_stride_head": "q.stride(1)",
        "out_stride_b": "out.stride(0)",
        "out_stride_head": "out.stride(1)",
        "table_stride": "block_table.stride(0)",
    }
    if spec.has_slot_bias:
        launch |= {
            "bias_stride_b": "slot_bias.stride(0)",
            "bias_stride_head": "slot_bias.stride(1)",
        }
    # With a softcap the first exponential wants 2 * score / cap, else the score; in log2 units.
    factor = 2 / (spec.softcap * math.log(2)) if spec.softcap else 1 / math.log(2)
    launch["score_scale"] = f"scale * {factor!r}"
    return {
        "kernel_parameters": list(launch),
        "launch_arguments": list(launch.values()),
        "optional_tensors": [name for name, (_, is_used) in optional.items() if is_used],
        "query_parameters": ["q_row", "q_stride_head", *signs],
        "query_arguments": ["q_row", "q_stride_head", *signs],
        "output_parameters": ["rows", "top", "total", *output],
        "output_arguments": ["rows", "top", "total", *output],
        "combine_parameters": ["parts_ptr", "stats_ptr", *output],
        "combine_arguments": ["parts_ptr", "stats_ptr", *output],
    }
