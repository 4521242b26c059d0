"""Decode attention of others, on the same problems: what ours is compared with.

Nothing here is a dependency of kvxform. A peer that is not installed, does not load or cannot do a
problem raises, and the benchmark writes its error down.

FlashAttention-3 is a library that torch loads, as vLLM's wheel has it: name the file in
`KVX_FLASH_ATTENTION_3`. FlashInfer compiles its kernels on first use.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from gpu_timing import copies_for
from problems import (
    GROUPS,
    HEAD_DIM,
    NUM_KV_HEADS,
    NUM_Q_HEADS,
    SCALE,
    Problem,
    make_block_table,
    to_pages,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

BF16_BYTES_PER_TOKEN = 2 * NUM_KV_HEADS * HEAD_DIM * 2
FLASHINFER_PAGE = 16  # the page size its authors recommend


@dataclass(frozen=True, eq=False)
class Prepared:
    """A peer, ready to be timed.

    Attributes:
        calls: The same work on copies of the cache; each returns `[B, H, D]`, or a view of it.
        cache_bytes: What one call must read.
        note: What a reader should know, or empty.
    """

    calls: list[Callable[[], Tensor]]
    cache_bytes: float
    note: str = ""


@dataclass(frozen=True)
class Peer:
    """A library.

    Attributes:
        stored: How it stores the cache: `bf16`, `fp8` or `int4`.
        prepare: Makes it ready for a problem.
    """

    stored: str
    prepare: Callable[[Problem], Prepared]


def _copies(k: Tensor, v: Tensor, cache_bytes: float) -> list[tuple[Tensor, Tensor]]:
    return [(k, v)] + [(k.clone(), v.clone()) for _ in range(copies_for(cache_bytes) - 1)]


def _refuse_ragged(problem: Problem) -> None:
    if problem.is_ragged:
        raise ValueError("cannot take sequences of different lengths without reading padding")


def prepare_sdpa(problem: Problem, backend: SDPBackend) -> Prepared:
    """SDPA over contiguous K and V; query heads of a group are its queries, which it likes best."""
    _refuse_ragged(problem)
    cache_bytes = sum(problem.lengths) * BF16_BYTES_PER_TOKEN
    q = problem.q.unflatten(1, (NUM_KV_HEADS, GROUPS))  # [B, Hk, G, D]

    def attend(k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=SCALE)

    copies = _copies(problem.k, problem.v, cache_bytes)
    return Prepared([lambda k=k, v=v: attend(k, v) for k, v in copies], cache_bytes)


def prepare_flex(problem: Problem) -> Prepared:
    """FlexAttention, compiled for the shape; lengths are a block mask, heads of a group queries."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    cache_bytes = sum(problem.lengths) * BF16_BYTES_PER_TOKEN
    mask = None
    if problem.is_ragged:
        lengths = torch.tensor(problem.lengths, device="cuda")
        size = (len(problem.lengths), None, GROUPS, problem.max_length)
        mask = create_block_mask(lambda b, h, i, j: j < lengths[b], *size, device="cuda")
    q = problem.q.unflatten(1, (NUM_KV_HEADS, GROUPS))  # [B, Hk, G, D]

    def attend(k: Tensor, v: Tensor) -> Tensor:
        return compiled(q, k, v, block_mask=mask, scale=SCALE)

    copies = _copies(problem.k, problem.v, cache_bytes)
    return Prepared([lambda k=k, v=v: attend(k, v) for k, v in copies], cache_bytes)


@functools.cache
def load_flash_attention_3() -> None:
    """Load the library that `KVX_FLASH_ATTENTION_3` names."""
    path = os.environ.get("KVX_FLASH_ATTENTION_3")
    if not path:
        raise ImportError("KVX_FLASH_ATTENTION_3 does not name the library")
    torch.ops.load_library(path)


def prepare_flash_attention_3(problem: Problem, page_size: int, dtype: torch.dtype) -> Prepared:
    """FlashAttention-3 over pages, with its scheduler's data made beforehand."""
    load_flash_attention_3()
    ops = torch.ops._vllm_fa3_C
    batch_size = len(problem.lengths)
    cache_bytes = sum(problem.lengths) * BF16_BYTES_PER_TOKEN * dtype.itemsize / 2
    table = make_block_table(problem.lengths, page_size).cuda()
    k, v = (
        to_pages(x, table, problem.lengths, page_size).to(dtype) for x in (problem.k, problem.v)
    )
    q, out = problem.q.to(dtype), torch.empty_like(problem.q)
    lengths = torch.tensor(problem.lengths, dtype=torch.int32, device="cuda")
    starts = torch.arange(batch_size + 1, dtype=torch.int32, device="cuda")
    heads = (NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM, HEAD_DIM)
    schedule = ops.get_scheduler_metadata(
        batch_size, 1, problem.max_length, *heads, dtype, lengths, starts, None, None, None, None,
        page_size, 0, True, -1, -1, False, 0, None, 0,
    )  # fmt: skip
    unit = torch.ones(batch_size, NUM_KV_HEADS, device="cuda") if dtype.itemsize == 1 else None

    def attend(k: Tensor, v: Tensor) -> Tensor:
        ops.fwd(
            q, k, v, None, None, None, out, starts, None, None, None, lengths, 1,
            problem.max_length, table, None, None, None, None, None, unit, unit, unit, SCALE, True,
            -1, -1, 0.0, True, schedule, 0, None, 0, None, 1, 0, None,
        )  # fmt: skip
        return out

    calls = [lambda k=k, v=v: attend(k, v) for k, v in _copies(k, v, cache_bytes)]
    return Prepared(calls, cache_bytes, f"pages of {page_size}")


def prepare_flashinfer(problem: Problem) -> Prepared:
    """FlashInfer's paged batch decode on tensor cores, planned beforehand."""
    import flashinfer

    page = FLASHINFER_PAGE
    cache_bytes = sum(problem.lengths) * BF16_BYTES_PER_TOKEN
    table = make_block_table(problem.lengths, page)
    counts = torch.tensor([-(-n // page) for n in problem.lengths])
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    pages = torch.cat([table[row, :n] for row, n in enumerate(counts.tolist())]).cuda()
    last = torch.tensor([(n - 1) % page + 1 for n in problem.lengths], dtype=torch.int32)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(256 << 20, dtype=torch.uint8, device="cuda"),
        "NHD",
        use_cuda_graph=True,
        use_tensor_cores=True,
        paged_kv_indptr_buffer=torch.zeros_like(starts, device="cuda"),
        paged_kv_indices_buffer=torch.zeros_like(pages),
        paged_kv_last_page_len_buffer=torch.zeros_like(last, device="cuda"),
    )
    kind = {"q_data_type": problem.q.dtype, "kv_data_type": problem.k.dtype, "sm_scale": SCALE}
    wrapper.plan(starts, pages, last, NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM, page, **kind)
    out = torch.empty_like(problem.q)
    k, v = (to_pages(x, table, problem.lengths, page) for x in (problem.k, problem.v))
    calls = [lambda kv=kv: wrapper.run(problem.q, kv, out=out) for kv in _copies(k, v, cache_bytes)]
    return Prepared(calls, cache_bytes, f"pages of {page}")


def encode_for_xformers(x: Tensor) -> Tensor:
    """Return `[B, T, Hk, 1, 17]` int32: scale and shift as halves, then 8 codes a word."""
    x = x.transpose(1, 2).float()  # [B, T, Hk, D]
    low, high = x.aminmax(dim=-1, keepdim=True)
    scale, shift = ((high - low) / 15).half(), low.half()
    codes = ((x - shift.float()) / scale.float()).round().clamp(0, 15).int().unflatten(-1, (-1, 8))
    words = torch.zeros(codes.shape[:-1], dtype=torch.int32, device=x.device)
    for place in range(8):
        words |= codes[..., place] << (4 * place)
    head = torch.cat([scale, shift], -1).view(torch.int32)  # the scale is in the low half
    return torch.cat([head, words], -1)[:, :, :, None]


def prepare_xformers(problem: Problem, splits: int | None) -> Prepared:
    """The Triton split-K kernel of xformers over contiguous int4 rows with scale and shift."""
    _refuse_ragged(problem)
    from xformers.ops.fmha import Inputs, triton_splitk

    operator = triton_splitk.FwOp if splits is None else triton_splitk.FwOp.get_operator(splits)
    k, v = (encode_for_xformers(x) for x in (problem.k, problem.v))
    cache_bytes = float(k.nbytes + v.nbytes)
    q = problem.q.unflatten(1, (NUM_KV_HEADS, GROUPS))[:, None]  # [B, 1, Hk, G, D]

    def attend(k: Tensor, v: Tensor) -> Tensor:
        keys, values = (x.expand(-1, -1, -1, GROUPS, -1) for x in (k, v))
        return operator.apply(Inputs(q, keys, values, scale=SCALE), needs_gradient=False)[0]

    calls = [lambda k=k, v=v: attend(k, v) for k, v in _copies(k, v, cache_bytes)]
    return Prepared(calls, cache_bytes, f"{splits or 'its own number of'} splits, contiguous")


def prepare_onnxruntime(problem: Problem) -> Prepared:
    """ONNX Runtime's GroupQueryAttention over contiguous int8 buffers; appends the last token."""
    from peer_onnxruntime import prepare_calls

    calls, cache_bytes = prepare_calls(problem)
    return Prepared(calls, cache_bytes, "one scale a tensor, contiguous, append included")


_fa3 = functools.partial(functools.partial, prepare_flash_attention_3)
_sdpa = functools.partial(functools.partial, prepare_sdpa)
PEERS: Mapping[str, Peer] = {
    "sdpa-flash": Peer("bf16", _sdpa(backend=SDPBackend.FLASH_ATTENTION)),
    "sdpa-cudnn": Peer("bf16", _sdpa(backend=SDPBackend.CUDNN_ATTENTION)),
    "fa3": Peer("bf16", _fa3(page_size=256, dtype=torch.bfloat16)),
    "fa3-page16": Peer("bf16", _fa3(page_size=16, dtype=torch.bfloat16)),
    "flashinfer": Peer("bf16", prepare_flashinfer),
    "flex": Peer("bf16", prepare_flex),
    "fa3-fp8": Peer("fp8", _fa3(page_size=256, dtype=torch.float8_e4m3fn)),
    "ort-gqa-int8": Peer("int8", prepare_onnxruntime),
    "xformers-int4": Peer("int4", functools.partial(prepare_xformers, splits=None)),
    "xformers-int4-s16": Peer("int4", functools.partial(prepare_xformers, splits=16)),
    "xformers-int4-s32": Peer("int4", functools.partial(prepare_xformers, splits=32)),
}


def bits_per_value(prepared: Prepared, problem: Problem) -> float:
    """Return stored bits of a cached value, scales included."""
    values = sum(problem.lengths) * 2 * NUM_KV_HEADS * HEAD_DIM
    return prepared.cache_bytes * 8 / values
