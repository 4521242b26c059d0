"""Emission of `prefill`: causal attention of many new queries over dense K and V."""

from __future__ import annotations

from kvxform.codegen.triton import prefill_hopper
from kvxform.codegen.triton.dense import DenseStream, check_dense, dot_precision
from kvxform.codegen.triton.refusal import refuse
from kvxform.codegen.triton.registry import Emission, emits
from kvxform.codegen.triton.spec import PrefillSpec

# (block_m, block_n, num_warps, num_stages), the best guess first
_SHORT_CONFIGS = ((128, 64, 8, 3), (64, 64, 4, 3), (128, 128, 8, 2), (64, 64, 4, 2))
_LONG_CONFIGS = ((128, 64, 8, 2), (64, 64, 4, 2))  # head_dim above 128
BLOCKS = (16, 32, 64, 128, 256)  # of a Hadamard of queries
_FLOAT32_CONFIGS = ((64, 32, 4, 2), (32, 32, 4, 2))


@emits(PrefillSpec)
def make_context(spec: PrefillSpec, *, interpret: bool) -> Emission:
    """Return the template of `prefill` and its variables.

    Raises:
        CodegenError: KVX401 for a dtype, head_dim or number of heads that has no tile.
    """
    if spec.for_hopper and not interpret:
        return prefill_hopper.make_context(spec, _extras(spec))
    groups = spec.num_q_heads // spec.num_kv_heads
    check_dense(spec.dtype, max(spec.key_dim, spec.value_dim), groups)
    if spec.key_sink != spec.value_sink:
        rule = "K and V must have the same number of sink tokens"
        refuse(rule, f"{spec.key_sink} and {spec.value_sink}", "", "give both the same `sink`")
    key = DenseStream("key", spec.key_dim, (spec.key_sink, spec.key_keep, spec.key_chunk))
    block = spec.query_block
    if block not in (0, *BLOCKS) or spec.key_dim % (block or 1):
        rule = f"a Hadamard block must be one of {BLOCKS} and divide {spec.key_dim}"
        refuse(rule, block, "key", "")
    value = DenseStream(
        "value", spec.value_dim, (spec.value_sink, spec.value_keep, spec.value_chunk)
    )
    variables = {
        "groups": groups,
        "key": key,
        "value": value,
        "copied": [stream for stream in (key, value) if stream.has_copies],
        "is_local": spec.window is not None or spec.chunk is not None,
        "is_product": spec.softcap is None and not spec.has_alibi,
        "parity_shifts": [shift for shift in (4, 2, 1) if block > 1 << shift],
        "precision": dot_precision(spec.dtype),
        "extras": _extras(spec),
        "configs": _configs(spec),
    }
    return Emission("prefill.py.jinja", variables)


def _extras(spec: PrefillSpec) -> dict[str, str]:
    """Return what the docstring says of each optional tensor, by name."""
    heads = spec.num_q_heads
    meanings = {
        "signs": (spec.has_signs, f"Factors of channels before the Hadamard, `[{spec.key_dim}]`."),
        "sink_logits": (spec.has_sink_logits, f"A softmax column without a value, `[{heads}]`."),
        "alibi_slopes": (spec.has_alibi, f"Slopes of ALiBi, `[{heads}]`."),
        "lse": (
            spec.has_lse,
            f"Natural log-sum-exp of scores{' and sink logit' if spec.has_sink_logits else ''},"
            f" float32 `[B, {heads}, S]`, dense; -inf at padding.",
        ),
    }
    return {name: meaning for name, (wanted, meaning) in meanings.items() if wanted}


def _configs(spec: PrefillSpec) -> tuple[tuple[int, ...], ...]:
    if spec.dtype == "float32":
        return _FLOAT32_CONFIGS
    return _LONG_CONFIGS if max(spec.key_dim, spec.value_dim) > 128 else _SHORT_CONFIGS
