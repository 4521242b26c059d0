"""`genai_config.json`: what ONNX Runtime GenAI has to know of a package.

Names of inputs and outputs are read off the graph, so that the file cannot say anything else.
GenAI keeps one tensor for the keys and one for the values of a layer; where a stream has more
planes, or layers are left out, no cache is named, and GenAI cannot load the package.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import onnx_ir as ir
import torch

from kvxform.codegen.onnx.forms import Form
from kvxform.codegen.onnx.ports import PAST, PRESENT
from kvxform.codegen.onnx.writing import MODEL
from kvxform.ir.program import Program

# Kinds of decoders that GenAI 0.18 knows. All of them are run alike, so any will do for another.
FAMILIES = frozenset(
    {
        "chatglm",
        "ernie4_5",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gpt2",
        "gptoss",
        "granite",
        "granitemoehybrid",
        "hunyuandensev1",
        "internlm2",
        "lfm2",
        "llama",
        "mistral",
        "nemotron",
        "olmo",
        "phi",
        "phi3",
        "phimoe",
        "qwen2",
        "qwen3",
        "smollm3",
    }
)
OTHER_FAMILY = "llama"
INPUTS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "block_table",
    "cumulative_sequence_lengths",
    "past_sequence_lengths",
    "attention_metadata",
)
SEARCH = {
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": True,
    "length_penalty": 1.0,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
}


def genai_config(program: Program, model: ir.Model, form: Form) -> dict[str, Any]:
    """Return the content of `genai_config.json`.

    Args:
        program: What was exported.
        model: Its graph.
        form: What the package is.
    """
    info = program.info
    eos = list(info.eos_token_ids)
    pad = info.pad_token_id if info.pad_token_id is not None else (eos[0] if eos else None)
    described = {
        "type": info.family if info.family in FAMILIES else OTHER_FAMILY,
        "bos_token_id": info.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos,
        "pad_token_id": pad,
        "vocab_size": info.vocab_size,
        "context_length": info.context_length,
        "decoder": _decoder(program, model, form),
    }
    shares = {"past_present_share_buffer": form.cache != "grow"}
    search = {**SEARCH, **shares, "max_length": info.context_length}
    config = {"model": _without_blanks(described), "search": _without_blanks(search)}
    if form.cache == "paged":
        batching = {"block_size": form.block_size, "gpu_utilization_factor": 0.6}
        config["engine"] = {"dynamic_batching": batching}
    return config


def _decoder(program: Program, model: ir.Model, form: Form) -> dict[str, Any]:
    first = program.sites[0]
    inputs = [x.name or "" for x in model.graph.inputs]
    outputs = [x.name or "" for x in model.graph.outputs]
    layers, past = _cache_names(inputs, PAST, "past")
    _, present = _cache_names(outputs, PRESENT, "present")
    options = [{"cuda": {"enable_cuda_graph": "0"}}] if form.provider == "cuda" else []
    return {
        "session_options": {"log_id": "kvxform", "provider_options": options},
        "filename": MODEL,
        "head_size": first.head_dim,
        "hidden_size": _hidden_size(program),
        "num_attention_heads": first.num_q_heads,
        "num_hidden_layers": layers or len(program.sites),
        "num_key_value_heads": first.num_kv_heads,
        "inputs": {**{name: name for name in INPUTS if name in inputs}, **past},
        "outputs": {"logits": "logits", **present},
    }


def _cache_names(names: Iterable[str], prefix: str, word: str) -> tuple[int, dict[str, str]]:
    """Return the number of cached layers and GenAI's patterns of names; none if none fit."""
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.(key|value)(\w*)")
    found = [m.groups() for m in map(pattern.fullmatch, names) if m]
    layers = sorted({int(layer) for layer, _, _ in found})
    suffixes = {stream: suffix for _, stream, suffix in found}
    wanted = [(str(n), stream, suffixes[stream]) for n in layers for stream in sorted(suffixes)]
    is_regular = layers == list(range(len(layers))) and sorted(found) == sorted(wanted)
    if not is_regular or len(suffixes) != 2:
        return 0, {}
    patterns = {f"{word}_{s}_names": f"{prefix}.%d.{s}{suffixes[s]}" for s in sorted(suffixes)}
    return len(layers), patterns


def _hidden_size(program: Program) -> int:
    """Return the width of the embedding, or that of all heads where there is no embedding."""
    for node in program.calls(torch.ops.aten.embedding.default):
        return int(node.meta["type"].shape[-1])
    return program.sites[0].num_q_heads * program.sites[0].head_dim


def _without_blanks(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if value not in (None, [])}
