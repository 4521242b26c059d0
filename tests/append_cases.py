"""Run an emitted `append` on a poisoned cache and compare every byte with what the codec says."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton_cases import arrive, body_tokens, encode, store

from kvxform.codegen.triton import fragment
from kvxform.codegen.triton.emit import emit
from kvxform.codegen.triton.loading import load
from kvxform.codegen.triton.spec import AppendSpec, SiteSpec, StreamSpec


class Appender:
    """A poisoned cache for rows of at most `ends` tokens, and a kernel that fills it.

    Args:
        spec: The kernel.
        ends: Cached tokens of each row once all is appended; they get pages for so many.
        device: Where the cache lives.
        garbage: What k and v hold past the new tokens of a row.
        is_token_major: Whether k and v are views of `[B, S, Hk, D]`.
    """

    def __init__(
        self,
        spec: AppendSpec,
        ends: Sequence[int],
        device: str = "cpu",
        *,
        garbage: float = 1e4,
        is_token_major: bool = False,
    ) -> None:
        self.site, self.device = spec.site, device
        self._garbage, self._is_token_major = garbage, is_token_major
        self.module = load(emit(spec, interpret=device == "cpu"))
        bodies = [max(body_tokens(s, n) for s in self.site.streams.values()) for n in ends]
        counts = [-(-body // self.site.page_size) for body in bodies]
        as_rows = dataclasses.replace(self.site, layout="rows")
        nothing = torch.zeros(len(ends), self.site.num_kv_heads, 0, 1)
        empty = store(as_rows, nothing, nothing, [0] * len(ends), spare_pages=sum(counts) + 2)
        self.planes, self.rows = empty.tensors, empty.rows
        order = 1 + torch.randperm(sum(counts) + 2).int()
        self.block_table = torch.zeros(len(ends), max([1, *counts]), dtype=torch.int32)
        first = 0
        for b, count in enumerate(counts):
            self.block_table[b, :count] = order[first : first + count]
            first += count
        self.lengths = [0] * len(ends)
        tensors = {"pool": _pool(self.site, self.planes)} if self._is_fragment else self.planes
        self.tensors = {name: tensor.clone().to(device) for name, tensor in tensors.items()}

    @property
    def _is_fragment(self) -> bool:
        return self.site.layout == "fragment"

    def append(self, k: Tensor, v: Tensor, counts: Sequence[int], **options: Any) -> None:
        """Append the next `counts[b]` tokens of each row of k and v `[B, Hk, T, D]`."""
        if self.site.has_exact:
            options["rows"] = self.rows.to(self.device)
        self.module.append(
            *(self._new(x, counts).to(self.device) for x in (k, v)),
            self.module.Cache(**self.tensors),
            self.block_table.to(self.device),
            torch.tensor(self.lengths, dtype=torch.int32, device=self.device),
            torch.tensor(counts, dtype=torch.int32, device=self.device),
            **options,
        )
        self.lengths = [a + n for a, n in zip(self.lengths, counts, strict=True)]

    def _new(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """Return the next tokens of x as a kernel gets them, `[B, Hk, S, D]`."""
        shape = (len(counts), self.site.num_kv_heads, max([1, *counts]), x.shape[-1])
        new = torch.full(shape, self._garbage, dtype=x.dtype)
        for b, (start, count) in enumerate(zip(self.lengths, counts, strict=True)):
            new[b, :, :count] = x[b, :, start : start + count]
        if self._is_token_major:
            return new.transpose(1, 2).contiguous().transpose(1, 2)
        return new

    def append_all(self, k: Tensor, v: Tensor, cuts: Sequence[Sequence[int]]) -> None:
        """Append in steps of `cuts[i][b]` tokens, and check after each."""
        for counts in cuts:
            self.append(k, v, counts)
            self.check(k, v)

    def check(self, k: Tensor, v: Tensor) -> None:
        """Assert that the cache holds the first tokens of k and v, and is else as it was."""
        planes = {name: tensor.clone() for name, tensor in self.planes.items()}
        live = {name: torch.ones_like(t, dtype=torch.bool) for name, t in planes.items()}
        for (name, stream), x in zip(self.site.streams.items(), (k, v), strict=True):
            for b, length in enumerate(self.lengths):
                self._expect_body(planes, name, stream, x[b], b)
                row = int(self.rows[b])
                for position in range(min(length, stream.sink)):
                    planes[f"{name}_sink"][row, :, position] = x[b, :, position]
                first = stream.sink + body_tokens(stream, length)
                if stream.capacity:
                    live[f"{name}_recent"][row] = False  # slots of tokens that left may hold them
                for position in range(first, length):
                    slot = (position - stream.sink) % stream.capacity
                    planes[f"{name}_recent"][row, :, slot] = x[b, :, position]
                    live[f"{name}_recent"][row, :, slot] = True
        if self._is_fragment:
            expected = {"pool": _pool(self.site, planes)}
            assert_same_bits(self.tensors["pool"], expected["pool"], "pool")
            return
        for name, expected_plane in planes.items():
            found = self.tensors[name].cpu()
            assert_same_bits(found[live[name]], expected_plane[live[name]], name)

    def _expect_body(
        self, planes: dict[str, Tensor], name: str, stream: StreamSpec, x: Tensor, b: int
    ) -> None:
        body = body_tokens(stream, self.lengths[b])
        if body == 0:
            return
        encoded = encode(stream, arrive(stream, x)[:, stream.sink : stream.sink + body])
        for plane in stream.planes:
            per_page = self.site.page_size // plane.tokens_per_row
            for i in range(encoded[plane.name].shape[1]):
                page = int(self.block_table[b, i // per_page])
                assert page > 0, "the null page is nobody's"
                target = planes[f"{name}_{plane.name}"]
                target[page, :, i % per_page] = encoded[plane.name][:, i]


def assert_same_bits(found: Tensor, expected: Tensor, name: str) -> None:
    """Assert that two tensors have the same bytes; NaN equals itself."""
    a, b = (x.cpu().contiguous().view(torch.uint8) for x in (found, expected))
    differ = int((a != b).sum())
    assert differ == 0, f"{name}: {differ} of {a.numel()} bytes differ"


def _pool(site: SiteSpec, planes: dict[str, Tensor]) -> Tensor:
    by_stream = {
        name: {plane.name: planes[f"{name}_{plane.name}"] for plane in stream.planes}
        for name, stream in site.streams.items()
    }
    return fragment.from_planes(site, by_stream)
