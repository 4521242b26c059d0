"""Models of the shape of Llama-3-8B with random weights, and caches with plausible content."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from kvxform.ir.program import Program
from kvxform.runtime.session import Session

WEIGHT_SCALE = 0.02
PROMPT = 512  # tokens, whole pages, that are really prefilled; the other pages are copies of theirs
PREFILLED_ROWS = 8  # rows that are; pages of more rows are copies too
Step = Callable[[], Tensor]


def make_config(*, tiny: bool = False, context: int = 32768) -> LlamaConfig:
    """Return the configuration of Llama-3-8B, or of a model for tests, with a longer context."""
    sizes = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
    }
    if tiny:
        sizes |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
        sizes["vocab_size"] = 128
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    return LlamaConfig(
        **sizes,
        max_position_embeddings=context,
        rope_parameters=rope,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )


def make_model(config: LlamaConfig, device: torch.device, *, seed: int = 0) -> LlamaForCausalLM:
    """Return a model in bfloat16 with seeded normal weights, made on `device`."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


def make_shared_model(config: LlamaConfig, *, seed: int = 0) -> LlamaForCausalLM:
    """Return a model on the CPU whose layers share one set of weights, to capture its graph.

    It takes the memory of one layer. The parameters are distinct, so the program keeps a name for
    each, and `fill_weights` gives each its own values.
    """
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    generator, made = torch.Generator().manual_seed(seed), dict[torch.Size, Tensor]()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            shape = parameter.shape
            if shape not in made:
                made[shape] = _random_weight(shape, generator)
            setattr(module, name, Parameter(made[shape].view(shape), requires_grad=False))
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    return model.eval()


def _random_weight(shape: torch.Size, generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16, device=generator.device)
    weight = torch.randn(shape, dtype=torch.bfloat16, device=generator.device, generator=generator)
    return weight.mul_(WEIGHT_SCALE)


def fill_weights(program: Program, device: torch.device, *, seed: int = 0) -> Program:
    """Return the program with seeded random weights, made on `device`, where it has none."""
    generator = torch.Generator(device).manual_seed(seed)
    weights = {
        name: _random_weight(weight.shape, generator) if weight.is_meta else weight.to(device)
        for name, weight in program.weights.items()
    }
    return dataclasses.replace(program, weights=weights)


def read_weight_bytes(weights: Sequence[tuple[str, Tensor]]) -> int:
    """Return bytes of the weights that a decode step reads: all but the embedding table."""
    return sum(w.nbytes for name, w in weights if "embed_tokens" not in name)


def free_memory() -> None:
    """Give memory of objects that are gone back to the device."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def make_huggingface_step(
    model: LlamaForCausalLM, batch_size: int, length: int, room: int, *, compiled: bool = True
) -> tuple[Step, int]:
    """Return a greedy decode step of transformers over a static cache, and bytes of the cache.

    Args:
        model: The model.
        batch_size: Sequences.
        length: Tokens that are cached before the first step; their K and V are random.
        room: Steps that will be taken.
        compiled: Compile the model with CUDA graphs, as transformers' documents advise.
    """
    config, device = model.config, model.device
    cache = StaticCache(config=config, max_cache_len=length + room)
    sizes = (batch_size, config.num_key_value_heads, config.head_dim)
    cache.early_initialization(*sizes, dtype=model.dtype, device=device)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(length)
    ids = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
    position = torch.full((1, 1), length, device=device)
    forward = (
        torch.compile(model, mode="reduce-overhead", fullgraph=True, dynamic=False)
        if compiled
        else model
    )

    @torch.inference_mode()
    def step() -> Tensor:
        logits = forward(
            input_ids=ids, position_ids=position, past_key_values=cache, use_cache=True
        ).logits
        ids.copy_(logits[:, -1].argmax(-1, keepdim=True))
        position.add_(1)
        return logits

    return step, sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def preload(session: Session, batch_size: int, length: int, *, seed: int = 0) -> None:
    """Let `batch_size` rows of an empty session hold `length` tokens each.

    A short random prompt is prefilled in some rows, and its pages are copied to all others: a step
    reads real codes and scales, without the time of a prefill of all tokens.
    """
    prompt = min(PROMPT, length)
    generator = torch.Generator().manual_seed(seed)
    shape = (min(batch_size, PREFILLED_ROWS), prompt)
    ids = torch.randint(0, session._vocab_size, shape, generator=generator)
    for row in range(len(ids)):  # one at a time: logits of one row only
        session.prefill(ids[row : row + 1], rows=[row])
    rows = list(range(batch_size))
    sources = [list(session._pool.pages(row)) for row in range(len(ids))]
    counts = [length - prompt if row < len(ids) else length for row in rows]
    if max(counts) > 0:
        session._reserve(rows, counts)
        session._advance(rows, counts)
    for row in rows:
        filled = sources[row % len(ids)]
        pages = list(session._pool.pages(row))
        targets = pages[len(filled) :] if row < len(ids) else pages
        for first in range(0, len(targets), len(filled)):
            some = targets[first : first + len(filled)]
            session._cache.copy_pages(filled[: len(some)], some)


def make_session_step(session: Session, batch_size: int, vocab_size: int) -> Step:
    """Return a greedy decode step of all rows of a session."""
    state = {"ids": torch.randint(0, vocab_size, (batch_size,))}

    def step() -> Tensor:
        logits = session.decode(state["ids"])
        state["ids"] = logits.argmax(-1)
        return logits

    return step
