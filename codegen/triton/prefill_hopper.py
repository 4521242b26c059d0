"""Emission of `prefill` for Hopper: a warp loads through TMA, two groups of warps multiply.

The kernel is for the plain case, causal attention of 16-bit heads of 64 or 128 channels over one
copy of the tokens. Everything else is left to the kernel of `prefill`, which is also the twin that
Triton's interpreter runs.
"""

from __future__ import annotations

import torch

from kvxform.codegen.triton.refusal import refuse
from kvxform.codegen.triton.registry import Emission
from kvxform.codegen.triton.spec import PrefillSpec

HEAD_DIMS = (64, 128)
ROWS = 128  # of a block: 64 for each group of four warps
GROUPS = (1, 2, 4, 8, 16)  # query heads of a KV head: they divide a block
BLOCKS = (16, 32, 64, 128)  # of a Hadamard of queries
COMPUTE_CAPABILITY = 9  # major, of the devices that can run it

_CONFIGS = ((128, 2),)  # (block_n, num_stages)
# What turns two float32 into one register: the first of them is the low half.
_PACK = {"float16": "cvt.rn.f16x2.f32", "bfloat16": "cvt.rn.bf16x2.f32"}


def reason_against(spec: PrefillSpec) -> str | None:
    """Return why the kernel for Hopper cannot express a spec, or None if it can."""
    rules = ((spec.key_keep, spec.key_chunk), (spec.value_keep, spec.value_chunk))
    reasons = {
        "its dtype has no 16 bits": spec.dtype not in _PACK,
        "K and V have different head_dim": spec.key_dim != spec.value_dim,
        f"head_dim is none of {HEAD_DIMS}": spec.key_dim not in HEAD_DIMS,
        "some tokens stay exact": rules != ((0, 1), (0, 1)),
        "its window ends": spec.window is not None or spec.chunk is not None,
        "scores are more than products": spec.softcap is not None or spec.has_alibi,
        "there are sink logits": spec.has_sink_logits,
        f"the query heads of a KV head are none of {GROUPS}": _groups(spec) not in GROUPS,
        f"its Hadamard has none of {BLOCKS} channels": spec.query_block not in (0, *BLOCKS),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def is_hopper(device: torch.device) -> bool:
    """Return whether `device` can run the kernel."""
    return (
        device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == COMPUTE_CAPABILITY
    )


def make_context(spec: PrefillSpec, extras: dict[str, str]) -> Emission:
    """Return the template of the kernel and its variables.

    Args:
        spec: What it is for.
        extras: What the docstring says of each optional tensor, by name.

    Raises:
        CodegenError: KVX401 for a spec that it cannot express.
    """
    reason = reason_against(spec)
    if reason is not None:
        refuse("prefill for Hopper must be of the plain kind", reason, "", "leave out `for_hopper`")
    block = spec.query_block
    variables = {
        "groups": _groups(spec),
        "queries": ROWS // _groups(spec),
        "pack": _PACK[spec.dtype],
        "parity_shifts": [shift for shift in (4, 2, 1) if block > 1 << shift],
        "extras": extras,
        "configs": _CONFIGS,
    }
    return Emission("prefill_hopper.py.jinja", variables)


def _groups(spec: PrefillSpec) -> int:
    return spec.num_q_heads // spec.num_kv_heads
