"""An exported package as rows of a cache, so that it can be checked like any other lowering.

A package has one batch of rows that are equally long in the cache, padding included. So rows start
together, are never freed alone, and are cropped by the same number of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from kvxform.codecs.base import dtype_from_name, make_codec
from kvxform.errors import CodegenError
from kvxform.ir.logical import unrotate_pair
from kvxform.ir.plan import CachePlan, SitePlan
from kvxform.ir.program import Program
from kvxform.ir.stream_plan import StreamPlan
from kvxform.runtime.onnx_engine import PAST
from kvxform.runtime.onnx_session import OnnxSession
from kvxform.runtime.state import LogicalCache

Planes = dict[str, dict[str, Tensor]]
BUFFERS = ("sink", "recent", "scores")


class OnnxModel:
    """A package and the program that it was made from.

    Args:
        program: Says what the planes of the package mean.
        session: The package, opened.
    """

    def __init__(self, program: Program, session: OnnxSession) -> None:
        self.program, self._session = program, session

    @property
    def plan(self) -> CachePlan:
        """What is cached and how."""
        assert self.program.plan is not None, "packages have a cache"
        return self.program.plan

    @property
    def takes_padding(self) -> bool:
        """Whether rows may have different lengths."""
        return bool(self._session.description["onnx"]["padding"])

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Return logits of all positions, `[B, S, vocab]`."""
        self._session.reset()
        return self._session.prefill(input_ids, all_logits=True)

    def new_session(self, *, max_batch_size: int, max_seq_len: int) -> OnnxRows:
        """Return an empty cache; the one before it is gone."""
        self._session.reset()
        return OnnxRows(self, self._session)


class OnnxRows:
    """The rows of an `OnnxSession`; see `kvxform.runtime.session.Session` for all methods."""

    def __init__(self, model: OnnxModel, session: OnnxSession) -> None:
        self._model, self._session = model, session

    def prefill(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        rows: Sequence[int] | None = None,
        chunk_size: int | None = None,
        all_logits: bool = False,
    ) -> Tensor:
        """Append prompts to all rows."""
        if rows is not None and list(rows) != list(range(len(input_ids))):
            _refuse("rows of a package go on together", rows)
        return self._session.prefill(
            input_ids, attention_mask, chunk_size=chunk_size, all_logits=all_logits
        )

    def decode(self, token_ids: Tensor, *, rows: Sequence[int] | None = None) -> Tensor:
        """Append one token to every row."""
        return self._session.decode(token_ids)

    def free(self, rows: Sequence[int] | None = None) -> None:
        """Forget all rows."""
        if rows is not None and len(rows) < self._session.batch_size:
            _refuse("rows of a package are freed together", rows)
        self._session.reset()

    def reorder(self, order: Sequence[int]) -> None:
        """Let row i become what row `order[i]` was."""
        index = torch.tensor(list(order))
        planes, mask = self._session.cache_planes(), self._session.mask
        kept = {name: plane[index] for name, plane in planes.items()}
        self._session.replace_rows(kept, mask[index])

    def crop(self, length: int | Sequence[int], rows: Sequence[int] | None = None) -> None:
        """Drop the newest tokens, the same number of every row.

        None of them may be encoded where tokens wait before they are.
        """
        before = self.sequence_lengths()
        wanted = [length] * len(before) if isinstance(length, int) else list(length)
        drops = {n - keep for n, keep in zip(before, wanted, strict=True)}
        if len(drops) > 1:
            _refuse("rows of a package are cropped by the same number of tokens", wanted)
        drop, mask = drops.pop(), self._session.mask
        # The newest tokens are the last ones of each row; padding is before or behind them.
        kept, columns = mask * (mask.flip(1).cumsum(1).flip(1) > drop), mask.shape[1] - drop
        planes = {
            name: plane[:, :, : self._rows_of(name, columns)]
            for name, plane in self._session.cache_planes().items()
        }
        self._session.replace_rows(planes, kept[:, :columns])

    def sequence_lengths(self) -> tuple[int, ...]:
        """Return cached tokens of each row."""
        return self._session.sequence_lengths()

    def cache_bytes(self) -> int:
        """Return bytes of all planes, padding included."""
        return self._session.cache_bytes()

    def planned_bytes(self) -> int:
        """Return bytes that the plan asks for with so many rows and columns."""
        rows, columns = self._session.planned_rows()
        return rows * sum(
            _stream_bytes(stream, site.num_kv_heads, columns)
            for site in self._model.plan.owners
            for stream in site.streams.values()
        )

    def logical_cache(self, layer: int) -> LogicalCache:
        """Return what `layer` holds for each row: decoded, un-rotated, without padding."""
        program, site = self._model.program, self._model.plan.site(layer)
        owner = self._model.plan.site(site.owner)
        planes = self._planes(owner)
        stored = {
            name: _decode(stream, planes[name], program.dtype)
            for name, stream in owner.streams.items()
        }
        keys, values = stored["key"], stored.get("value", stored["key"])
        pairs = [
            unrotate_pair(program, layer, keys[row][:, real], values[row][:, real])
            for row, real in enumerate(self._session.mask.bool())
        ]
        return LogicalCache(tuple(k for k, _ in pairs), tuple(v for _, v in pairs))

    def stored_planes(self, layer: int) -> tuple[Planes, ...]:
        """Return the encoded tokens of each row, by stream and plane, without padding."""
        owner = self._model.plan.site(self._model.plan.site(layer).owner)
        planes, found = self._planes(owner), []
        for row, real in enumerate(self._session.mask.bool()):
            own: Planes = {}
            for name, stream in owner.streams.items():
                is_padded = not bool(real.all())
                encoded = {p.name: planes[name][p.name][row] for p in stream.planes}
                own[name] = {n: x[:, real] if is_padded else x for n, x in encoded.items()}
            found.append(own)
        return tuple(found)

    def _planes(self, owner: SitePlan) -> Planes:
        """Return the planes of a layer by stream and name, `[B, heads, rows, width]` each."""
        found: Planes = {name: {} for name in owner.streams}
        for port, plane in self._session.cache_planes().items():
            layer, stream, name = _parts(port)
            if layer == owner.layer:
                found[stream][name] = _as_stored(plane, owner.streams[stream], name)
        return found

    def _rows_of(self, port: str, columns: int) -> int:
        """Return the rows of a plane with `columns` tokens in the cache."""
        layer, stream, name = _parts(port)
        plan = self._model.plan.site(layer).streams[stream]
        sink, body = min(columns, plan.regions.sink), plan.body_tokens(columns)
        if name in BUFFERS:
            return sink if name == "sink" else columns - sink - body
        spec = next(p for p in plan.planes if p.name == name)
        return -(-body // spec.tokens_per_row)


def _parts(port: str) -> tuple[int, str, str]:
    """Return layer, stream and plane of the name of a cache input."""
    layer, _, rest = port.removeprefix(PAST).partition(".")
    stream, _, name = rest.partition("_")
    return int(layer), stream, name or "value"


def _as_stored(plane: Tensor, stream: StreamPlan, name: str) -> Tensor:
    """Return a plane in the dtype of the plan; packages have bytes where ONNX has no such dtype."""
    spec = next((p for p in stream.planes if p.name == name), None)
    is_bytes = spec is not None and plane.dtype is torch.uint8 and spec.torch_dtype.itemsize == 1
    return plane.view(spec.torch_dtype) if spec is not None and is_bytes else plane


def _decode(stream: StreamPlan, planes: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Return all tokens of one stream, `[B, Hk, T, D]`: sink, body, recent."""
    parts = [planes["sink"].to(dtype)] if "sink" in planes else []
    encoded = {p.name: planes[p.name] for p in stream.planes}
    if next(iter(encoded.values())).shape[2]:
        parts.append(make_codec(stream.codec).decode(encoded, dtype))
    if "recent" in planes:
        parts.append(planes["recent"].to(dtype))
    return torch.cat(parts, 2)


def _stream_bytes(stream: StreamPlan, heads: int, columns: int) -> int:
    """Return bytes of one row of a stream with `columns` cached tokens."""
    body, sink = stream.body_tokens(columns), min(columns, stream.regions.sink)
    exact = stream.head_dim * dtype_from_name(stream.regions.dtype).itemsize
    tail = columns - body - sink
    per_head = (sink + tail) * exact + tail * stream.score_bytes
    return round(body * stream.body_bytes_per_token(heads)) + heads * per_head


def _refuse(rule: str, got: object) -> NoReturn:
    raise CodegenError("KVX401", rule, where="onnx", got=got)
