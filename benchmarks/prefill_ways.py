"""Ways to prefill one layer: SDPA or FlashAttention-3 and a plain write, or our kernels."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from gpu_timing import time_calls
from peers import load_flash_attention_3
from problems import DEVICE, HEAD_DIM, NUM_KV_HEADS, NUM_Q_HEADS, SCALE, make_block_table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

WRITE_TILE = 16  # tokens a block of the plain write
SDPA = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
}
Part = Callable[[], None]


@dataclass(frozen=True, eq=False)
class Inputs:
    """Queries, keys and values of one sequence, as a model makes them.

    Attributes:
        q: `[1, H, T, D]`, a view of `[1, T, H, D]`.
        k: `[1, Hk, T, D]`, likewise, as is `v`.
        chunk: Tokens a chunk.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    chunk: int

    @property
    def length(self) -> int:
        """Tokens, T."""
        return self.q.shape[2]

    @property
    def starts(self) -> Iterator[int]:
        """First tokens of the chunks."""
        return iter(range(0, self.length, self.chunk))


def make_inputs(length: int, chunk: int) -> Inputs:
    """Return normal random inputs on the GPU."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(heads: int) -> Tensor:
        size = (1, length, heads, HEAD_DIM)
        x = torch.randn(size, generator=generator, device=DEVICE, dtype=torch.bfloat16)
        return x.transpose(1, 2)

    return Inputs(normal(NUM_Q_HEADS), normal(NUM_KV_HEADS), normal(NUM_KV_HEADS), chunk)


class PlainPages:
    """The plain write of K and V of a sequence to pages."""

    def __init__(self, inputs: Inputs, page_size: int) -> None:
        from plain_write import make_pages

        table = make_block_table((inputs.length,), page_size, first_page=1)
        self.pages = make_pages(int(table.max()) + 1, NUM_KV_HEADS, page_size, HEAD_DIM)
        self.table = table.to(DEVICE)
        self.inputs = inputs

    def write(self, start: int) -> Part:
        """Return the write of the chunk that begins at `start`."""
        from plain_write import write

        own = slice(start, start + self.inputs.chunk)
        k, v = self.inputs.k[:, :, own], self.inputs.v[:, :, own]
        first = torch.tensor([start], dtype=torch.int32, device=DEVICE)
        options = {"tile": WRITE_TILE, "num_warps": 4}
        return functools.partial(write, k, v, self.pages, self.table, first, **options)


class SdpaPrefill:
    """SDPA over K and V as they are, and the plain write.

    Attributes:
        out: Output of the last chunk, `[1, H, chunk, D]`.
        chosen: Launch parameters by kernel: none.
    """

    def __init__(self, backend: SDPBackend, inputs: Inputs, options: argparse.Namespace) -> None:
        self.backend, self.inputs = backend, inputs
        self.plain = PlainPages(inputs, options.page_size)
        self.out = torch.empty(0)
        self.chosen: dict[str, Any] = {}

    def parts(self) -> dict[str, list[Part]]:
        """Return what is to be done, by kind, one call a chunk."""
        starts = list(self.inputs.starts)
        return {
            "write": [self.plain.write(start) for start in starts],
            "attend": [functools.partial(self.attend, start) for start in starts],
        }

    def attend(self, start: int) -> None:
        """Attend from one chunk to all before it and itself."""
        end = start + self.inputs.chunk
        q, k, v = (
            self.inputs.q[:, :, start:end],
            self.inputs.k[:, :, :end],
            self.inputs.v[:, :, :end],
        )
        mask: Any = {"is_causal": True}
        if start:
            mask = {"attn_mask": causal_lower_right(end - start, end)}
        with sdpa_kernel(self.backend):
            self.out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, scale=SCALE, enable_gqa=True, **mask
            )


class FlashAttention3Prefill(SdpaPrefill):
    """FlashAttention-3 over K and V as they are, and the plain write."""

    def __init__(self, inputs: Inputs, options: argparse.Namespace) -> None:
        super().__init__(SDPBackend.FLASH_ATTENTION, inputs, options)
        load_flash_attention_3()
        self.result = torch.empty_like(inputs.q[:, :, : inputs.chunk].transpose(1, 2)[0])
        self.out = self.result.transpose(0, 1)[None]
        self.ends = {
            start: torch.tensor([0, start + inputs.chunk], dtype=torch.int32, device=DEVICE)
            for start in inputs.starts
        }
        self.own = torch.tensor([0, inputs.chunk], dtype=torch.int32, device=DEVICE)

    def attend(self, start: int) -> None:
        """Attend from one chunk to all before it and itself."""
        end, chunk = start + self.inputs.chunk, self.inputs.chunk
        q = self.inputs.q[0].transpose(0, 1)[start:end]  # [chunk, H, D]
        k, v = (x[0].transpose(0, 1)[:end] for x in (self.inputs.k, self.inputs.v))
        torch.ops._vllm_fa3_C.fwd(
            q, k, v, None, None, None, self.result, self.own, self.ends[start], None, None, None,
            chunk, end, None, None, None, None, None, None, None, None, None, SCALE, True, -1, -1,
            0.0, True, None, 0, None, 0, None, 1, 0, None,
        )  # fmt: skip


class OurPrefill:
    """Our append, gather and prefill kernels in one format.

    Attributes:
        out: Output of the last chunk, `[1, H, chunk, D]`.
        chosen: Launch parameters by kernel.
    """

    def __init__(self, name: str, inputs: Inputs, options: argparse.Namespace) -> None:
        from caches import FORMATS, make_cache, make_tensors, module_of, row_options

        from kvxform.codegen.triton.sites import prefill_spec
        from kvxform.codegen.triton.spec import AppendSpec, GatherSpec

        chosen = FORMATS[name]
        site = chosen.site(options.page_size, inputs.q.dtype)
        block = HEAD_DIM if chosen.is_rotated else 0
        self.inputs, self.is_quick = inputs, options.quick
        self.append = module_of(AppendSpec(site, key_block=block))
        self.gather = module_of(GatherSpec(site))
        self.prefill = module_of(prefill_spec(site, query_block=block))
        table = make_block_table((inputs.length,), options.page_size, first_page=1)
        tensors = make_tensors(site, int(table.max()) + 1)
        self.rows = row_options(site, 1)
        self.stored = make_cache(self.append, tensors)
        self.source = make_cache(self.gather, tensors)
        self.table = table.to(DEVICE)
        self.out = torch.empty_like(inputs.q[:, :, : inputs.chunk])
        dense = (1, NUM_KV_HEADS, inputs.length, HEAD_DIM)
        self.keys, self.values = (
            torch.empty(dense, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)
        )
        self.numbers = {
            n: torch.tensor([n], dtype=torch.int32, device=DEVICE)
            for n in (*inputs.starts, inputs.chunk, inputs.length)
        }
        self.chosen: dict[str, Any] = {}
        self.queries = {n: inputs.q[:, :, n : n + inputs.chunk] for n in inputs.starts}
        self._tune()

    def _tune(self) -> None:
        """Choose launch parameters by the last chunk, the longest work."""
        last = self.inputs.length - self.inputs.chunk
        run: dict[str, Callable[[int], None]] = {
            "append": self._append, "gather": self._gather, "prefill": self._prefill,
        }  # fmt: skip
        for name, launch in run.items():
            configs = getattr(self, name).CONFIGS[: 2 if self.is_quick else None]
            times = {}
            for config in configs:
                self.chosen[name] = config
                times[config] = time_calls([lambda f=launch: f(last)], turns=10).median_us
            self.chosen[name] = min(times, key=times.__getitem__)

    def parts(self) -> dict[str, list[Part]]:
        """Return what is to be done, by kind, one call a chunk."""
        starts = list(self.inputs.starts)
        names = {"append": self._append, "gather": self._gather, "attend": self._prefill}
        return {
            name: [functools.partial(launch, start) for start in starts]
            for name, launch in names.items()
        }

    def _append(self, start: int) -> None:
        own = slice(start, start + self.inputs.chunk)
        k, v = self.inputs.k[:, :, own], self.inputs.v[:, :, own]
        numbers = (self.numbers[start], self.numbers[self.inputs.chunk])
        self.append.append(
            k, v, self.stored, self.table, *numbers, **self.rows, config=self.chosen["append"]
        )

    def _gather(self, start: int) -> None:
        end = self.numbers[start + self.inputs.chunk]
        dense = (self.keys, self.values)
        options = {**self.rows, "config": self.chosen["gather"]}
        self.gather.gather(self.source, self.table, end, *dense, **options)

    def _prefill(self, start: int) -> None:
        numbers = (self.numbers[start], self.numbers[self.inputs.chunk])
        dense = (self.keys, self.values)
        self.prefill.prefill(
            self.queries[start], *dense, *numbers, self.out, scale=SCALE,
            config=self.chosen["prefill"],
        )  # fmt: skip
