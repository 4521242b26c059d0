"""Run an emitted decode kernel on poisoned buffers and compare it with float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton_cases import decode_reference, random_kv, random_q, store

from kvxform.codecs.hadamard import block_hadamard
from kvxform.codegen.triton.emit import emit
from kvxform.codegen.triton.loading import load
from kvxform.codegen.triton.spec import DecodeSpec

NUM_SMS = 4  # as a small device would have; enough for several splits
SOFTCAP = 5.0


def options_of(spec: DecodeSpec, batch_size: int, num_tokens: int) -> dict[str, Tensor]:
    """Return the optional tensors that a kernel of `spec` takes, but rows and lse."""
    generator = torch.Generator().manual_seed(5)
    site, options = spec.site, {}
    if spec.has_signs:
        options["signs"] = torch.randint(0, 2, (site.key.head_dim,), generator=generator) * 2.0 - 1
    if spec.has_sink_logits:
        options["sink_logits"] = 2 * torch.randn(site.num_q_heads, generator=generator)
    if spec.has_alibi:
        options["alibi_slopes"] = torch.rand(site.num_q_heads, generator=generator) * 0.1
    if spec.has_slot_bias:
        shape = (batch_size, site.num_kv_heads, num_tokens)
        bias = torch.randn(shape, generator=generator)
        options["slot_bias"] = bias.masked_fill(
            torch.rand(shape, generator=generator) < 0.2, -math.inf
        )
    return options


def run_decode(
    spec: DecodeSpec,
    lengths: Sequence[int],
    *,
    device: str = "cpu",
    config: int = 0,
    seed: int = 0,
    num_sms: int = NUM_SMS,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return output and lse of the kernel, then those of the reference, in float64 on the CPU."""
    site, batch_size, num_tokens = spec.site, len(lengths), max(*lengths, 1)
    keys, values = random_kv(site, batch_size, num_tokens, seed=seed)
    q = random_q(site, batch_size, site.num_q_heads, seed=seed + 1)
    options = options_of(spec, batch_size, num_tokens)
    stored = store(site, keys, values, lengths, seed=seed + 2).to(device)
    module = load(emit(spec, interpret=device == "cpu"))
    work = module.make_workspace(batch_size, num_tokens, num_sms, device)
    for tensor in work if isinstance(work, tuple) else vars(work).values():
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.ndim > 1:
            tensor.fill_(math.nan)
    shape = (batch_size, site.num_q_heads, site.value.head_dim)
    out = torch.full(shape, math.nan, dtype=q.dtype, device=device)
    extras = {name: tensor.to(device) for name, tensor in options.items()}
    if site.has_exact:
        extras["rows"] = stored.rows
    lse = torch.full(shape[:2], math.nan, device=device) if spec.has_lse else None
    if lse is not None:
        extras["lse"] = lse
    chosen = module.CONFIGS[config % len(module.CONFIGS)]
    if hasattr(module, "prepare"):
        module.prepare(work, list(lengths), stored.block_table.cpu(), config=chosen)
    scale = site.key.head_dim**-0.5
    module.decode(
        q.to(device),
        stored.cache(module),
        stored.block_table,
        stored.lengths,
        work,
        out,
        scale=scale,
        config=chosen,
        **extras,
    )
    turned = q.double()
    if spec.query_block:
        turned = block_hadamard(turned, spec.query_block, options.pop("signs", None))
    expected = decode_reference(
        site,
        turned,
        keys,
        values,
        lengths,
        scale=scale,
        window=spec.window,
        chunk=spec.chunk,
        softcap=spec.softcap,
        **options,
    )
    return out.double().cpu(), None if lse is None else lse.double().cpu(), *expected


def check_decode(
    spec: DecodeSpec, lengths: Sequence[int], *, tolerance: float | None = None, **run: Any
) -> None:
    """Compare, relative to the largest output of each sequence."""
    out, lse, expected, expected_lse = run_decode(spec, lengths, **run)
    if tolerance is None:
        tolerance = {"float16": 3e-3, "bfloat16": 2e-2, "float32": 1e-5}[spec.site.dtype]
    for b, length in enumerate(lengths):
        size = expected[b].abs().max().clamp_min(1e-6)
        error = ((out[b] - expected[b]).abs().max() / size).item()
        assert error < tolerance, f"length {length}: relative error {error}"
        if lse is not None:
            torch.testing.assert_close(
                lse[b], expected_lse[b], rtol=tolerance, atol=5 * tolerance, msg=f"lse at {length}"
            )
