"""Decoder families, each built small with seeded random weights.

Two layers where all are alike, three or four where they alternate; head_dim 8 or 16; windows and
chunks so short that every test wraps them. `NAMED` are those that must work, `PLAIN` are models
without transformers, `OTHERS` is a sample of what else transformers has.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from models import VOCAB, PlainLlama, RMSNorm, randomise
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

LIMIT = 160  # positions that every model knows
WINDOW = 5

_TOKENS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SIZES = {
    **_TOKENS,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": LIMIT,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_HEADS = {**_GROUPED, "head_dim": 8}
_GPT = {**_TOKENS, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": LIMIT}
_SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LATENT = {
    **_SIZES,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "head_dim": 8,
    "v_head_dim": 16,
}
_ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}
_MAMBA2 = {**_MAMBA, "mamba_n_heads": 12, "mamba_d_head": 8, "mamba_n_groups": 1}
_DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}


@dataclass(frozen=True)
class Family:
    """One small model.

    Attributes:
        name: Row of the coverage table.
        fields: Fields of the configuration.
        model_type: What transformers calls it; the name if empty.
        seed: Seed of the weights.
    """

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    model_type: str = ""
    seed: int = 0

    def build(self, dtype: torch.dtype) -> nn.Module:
        """Return the model in evaluation mode."""
        config = AutoConfig.for_model(self.model_type or self.name, **self.fields)
        torch.manual_seed(self.seed)
        model = AutoModelForCausalLM.from_config(config)
        if dtype is torch.float64:
            if getattr(config, "_experts_implementation", None):
                model.set_experts_implementation("eager")  # grouped_mm has no float64
            in_float64(model)
        model.generation_config.eos_token_id = None  # continuations are as long as asked
        return randomise(model.to(dtype).eval(), self.seed)


class InFloat64(TorchFunctionMode):
    """Whatever asks for float32 gets float64."""

    WIDER: ClassVar[dict[Any, Any]] = {
        torch.float32: torch.float64,
        torch.complex64: torch.complex128,
        Tensor.float: Tensor.double,
    }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        wide = [self.WIDER.get(x, x) if isinstance(x, torch.dtype) else x for x in args]
        options = {
            name: self.WIDER.get(x, x) if isinstance(x, torch.dtype) else x
            for name, x in (kwargs or {}).items()
        }
        return self.WIDER.get(func, func)(*wide, **options)


def in_float64(model: nn.Module) -> nn.Module:
    """Let a float64 model compute in float64 throughout; in place.

    Many compute norms, angles or softmaxes in float32 whatever their dtype. Then a sum depends at
    1e-7 on how many terms it has, and a token on how the ones before it came.
    """
    cls = type(model)

    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with InFloat64():
            return cls.forward(self, *args, **kwargs)

    members = {"forward": forward, "__module__": cls.__module__}
    model.__class__ = type(cls.__name__, (cls,), members)
    return model


@dataclass(frozen=True)
class Plain(Family):
    """One model of `PLAIN`; `fields` are its options."""

    def build(self, dtype: torch.dtype) -> nn.Module:
        """Return the model in evaluation mode."""
        torch.manual_seed(self.seed)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            if self.name == "multihead":
                model: nn.Module = PlainMultihead(**self.fields)
            else:
                model = PlainLlama(limit=LIMIT, **self.fields)
        finally:
            torch.set_default_dtype(before)
        return randomise(model.eval(), self.seed)


class PlainMultihead(nn.Module):
    """Pre-norm decoder around `nn.MultiheadAttention`, with learned positions."""

    def __init__(self, *, layers: int = 2, width: int = 48, heads: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.places = nn.Embedding(LIMIT, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": RMSNorm(width),
                    "attention": nn.MultiheadAttention(width, heads, batch_first=True),
                    "norm2": RMSNorm(width),
                    "up": nn.Linear(width, 2 * width),
                    "down": nn.Linear(2 * width, width),
                }
            )
            for _ in range(layers)
        )
        self.norm = RMSNorm(width)
        self.head = nn.Linear(width, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        x = self.embed(tokens) + self.places(torch.arange(length, device=tokens.device))
        mask = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
        for block in self.blocks:
            h = block["norm1"](x)
            x = x + block["attention"](h, h, h, attn_mask=mask, need_weights=False)[0]
            x = x + block["down"](block["up"](block["norm2"](x)).relu())
        return self.head(self.norm(x))


def _register(*families: Family) -> dict[str, Family]:
    return {family.name: family for family in families}


NAMED = _register(
    Family("llama", _HEADS),
    Family("qwen2", _GROUPED),
    Family("qwen3", _HEADS),
    Family("mistral", {**_HEADS, "sliding_window": WINDOW}),
    Family("gemma", _HEADS),
    Family("gemma2", {**_HEADS, **_SLIDING, "query_pre_attn_scalar": 12}),
    Family("gemma3_text", {**_HEADS, **_SLIDING, "query_pre_attn_scalar": 12}),
    Family("phi", _SIZES),
    Family("phi3", _GROUPED),
    Family("gpt2", _GPT),
    Family("gpt_neox", _SIZES),
    Family("gptj", {**_GPT, "rotary_dim": 4}),
    Family("codegen", {**_GPT, "n_embd": 64, "n_head": 4, "n_ctx": LIMIT, "rotary_dim": 8}),
    Family("opt", {**_SIZES, "ffn_dim": 64, "word_embed_proj_dim": 48}),
    Family("falcon", {**_SIZES, "ffn_hidden_size": 64}),
    Family("bloom", {**_TOKENS, "hidden_size": 48, "n_layer": 2, "n_head": 6}),
    Family(
        "mpt",
        {**_TOKENS, "d_model": 48, "n_heads": 6, "n_layers": 2, "max_seq_len": LIMIT},
    ),
    Family("stablelm", _GROUPED),
    Family(
        "granite",
        {
            **_GROUPED,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.25,
            "logits_scaling": 2.0,
        },
    ),
    Family("olmo2", _GROUPED),
    Family("cohere", _GROUPED),
    Family("starcoder2", _GROUPED),
    Family("smollm3", {**_GROUPED, "no_rope_layers": [1, 0]}),
    Family("persimmon", _SIZES),
    Family("glm", _HEADS),
    Family("mixtral", {**_GROUPED, **_LOCAL_EXPERTS}),
    Family("qwen3_moe", {**_HEADS, **_EXPERTS}),
    Family("gpt_oss", {**_HEADS, **_LOCAL_EXPERTS, **_SLIDING}),
    Family("deepseek_v2", {**_LATENT, **_ROUTED}),
    Family("deepseek_v3", {**_LATENT, **_ROUTED}),
)

PLAIN = _register(
    Plain("by hand", {"by_hand": True}),
    Plain("complex rope", {"rotary": "complex"}),
    Plain("multihead"),
)

OTHERS = _register(
    Family("apertus", _GROUPED),
    Family("arcee", _HEADS),
    Family("bamba", {**_GROUPED, **_MAMBA2, "attn_layer_indices": [1]}),
    Family("biogpt", _SIZES),
    Family("cohere2", {**_HEADS, **_SLIDING}),
    Family("ctrl", {**_GPT, "dff": 64}),
    Family("ernie4_5", _HEADS),
    Family("exaone4", {**_GROUPED, **_SLIDING, "sliding_window_pattern": 2}),
    Family("falcon alibi", {**_SIZES, "ffn_hidden_size": 64, "alibi": True}, "falcon"),
    Family(
        "falcon new decoder",
        {**_SIZES, "ffn_hidden_size": 64, "new_decoder_architecture": True, "num_kv_heads": 2},
        "falcon",
    ),
    Family("falcon_h1", {**_HEADS, **_MAMBA2, "mamba_d_ssm": 96}),
    Family(
        "gemma3n_text",
        {
            **_HEADS,
            "num_hidden_layers": 4,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 16,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
    Family("glm4", _HEADS),
    Family("glm4_moe", {**_HEADS, **_ROUTED}),
    Family("gpt_bigcode", _GPT),
    Family(
        "gpt_neo",
        {
            **_TOKENS,
            "hidden_size": 48,
            "num_layers": 2,
            "num_heads": 6,
            "intermediate_size": 64,
            "attention_types": [[["global", "local"], 1]],
            "window_size": WINDOW,
            "max_position_embeddings": LIMIT,
        },
    ),
    Family("gpt_neox_japanese", {**_SIZES, "intermediate_multiple_size": 2}),
    Family("granitemoe", {**_GROUPED, **_LOCAL_EXPERTS}),
    Family("helium", _HEADS),
    Family("hunyuan_v1_dense", _HEADS),
    Family(
        "jamba",
        {
            **_GROUPED,
            **_MAMBA,
            **_EXPERTS,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
        },
    ),
    Family("jetmoe", {**_SIZES, **_LOCAL_EXPERTS, "kv_channels": 8, "num_key_value_heads": 3}),
    Family("lfm2", {**_GROUPED, "layer_types": ["conv", "full_attention"]}),
    Family(
        "llama4_text",
        {
            **_HEADS,
            **_LOCAL_EXPERTS,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 64,
            "attention_chunk_size": WINDOW,
            "no_rope_layers": [1, 0],
            "layer_types": ["chunked_attention", "full_attention"],
        },
    ),
    Family("minicpm3", {**_LATENT, "head_dim": 8}),
    Family(
        "modernbert-decoder",
        {
            **_SIZES,
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": WINDOW,
            "cls_token_id": 3,
            "sep_token_id": 4,
        },
    ),
    Family("nanochat", _GROUPED),
    Family("nemotron", _HEADS),
    Family("olmo", _GROUPED),
    Family("olmo3", {**_GROUPED, **_SLIDING}),
    Family("olmoe", {**_GROUPED, **_EXPERTS}),
    Family(
        "phi3 longrope",
        {
            **_GROUPED,
            "original_max_position_embeddings": LIMIT // 4,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [2.0, 2.1, 2.2, 2.3],
                "original_max_position_embeddings": LIMIT // 4,
            },
        },
        "phi3",
    ),
    Family("phimoe", {**_GROUPED, **_LOCAL_EXPERTS}),
    Family(
        "qwen2_moe",
        {**_GROUPED, **_EXPERTS, "shared_expert_intermediate_size": 16},
    ),
    Family(
        "qwen3_next",
        {**_HEADS, **_HYBRID, **_DELTA, **_EXPERTS, "shared_expert_intermediate_size": 16},
    ),
    Family("seed_oss", _HEADS),
    Family("starcoder2 window", {**_GROUPED, "sliding_window": WINDOW}, "starcoder2"),
)

ALL = {**NAMED, **PLAIN, **OTHERS}
