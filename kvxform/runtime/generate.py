"""The token loop of `generate`: greedy choice or sampling, with the names of Hugging Face.

Logits are changed by the processors of transformers, imported only when an option asks for one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from kvxform.runtime.inputs import refuse
from kvxform.runtime.one_thread import largest

LogitsProcessor = Callable[[Tensor, Tensor], Tensor]
NextLogits = Callable[[Tensor], Tensor]  # token ids [B] -> logits [B, vocab]


class Streamer(Protocol):
    """What receives tokens as they come; the streamers of transformers fit."""

    def put(self, value: Tensor) -> None:
        """Take the prompt `[B, S]` first, then new tokens `[B]`."""

    def end(self) -> None:
        """Take note that generation has ended."""


@dataclass(frozen=True)
class GenerationOptions:
    """Options of `generate`, with the meaning and the defaults of Hugging Face.

    Attributes:
        max_new_tokens: Tokens to add at most.
        do_sample: Draw from the distribution instead of taking the largest logit.
        temperature: Divides the logits (sampling only).
        top_k: Keep so many of the largest logits; 0 keeps all (sampling only).
        top_p: Keep the smallest set of tokens with this mass (sampling only).
        repetition_penalty: Factor against tokens that occurred before; 1 is off.
        eos_token_ids: Tokens that end a row.
        pad_token_id: Fills rows that have ended.
    """

    max_new_tokens: int = 32
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            refuse("max_new_tokens must be at least 1", self.max_new_tokens)
        if self.temperature <= 0:
            refuse("temperature must be greater than 0", self.temperature)
        if not 0 < self.top_p <= 1:
            refuse("top_p must be in (0, 1]", self.top_p)
        if self.top_k < 0:
            refuse("top_k must not be negative", self.top_k)
        if self.repetition_penalty <= 0:
            refuse("repetition_penalty must be greater than 0", self.repetition_penalty)


def make_processor(options: GenerationOptions) -> LogitsProcessor:
    """Return the function `(ids so far, logits) -> logits` that the options ask for."""
    kinds: list[tuple[str, Any]] = []
    if options.repetition_penalty != 1.0:
        kinds.append(("RepetitionPenaltyLogitsProcessor", options.repetition_penalty))
    if options.do_sample:
        if options.temperature != 1.0:
            kinds.append(("TemperatureLogitsWarper", options.temperature))
        if options.top_k:
            kinds.append(("TopKLogitsWarper", options.top_k))
        if options.top_p < 1.0:
            kinds.append(("TopPLogitsWarper", options.top_p))
    if not kinds:
        return lambda ids, logits: logits
    from transformers.generation import logits_process

    processors = [getattr(logits_process, name)(value) for name, value in kinds]
    chain: LogitsProcessor = logits_process.LogitsProcessorList(processors)
    return chain


@torch.inference_mode()
def run_loop(
    input_ids: Tensor,
    logits: Tensor,
    next_logits: NextLogits,
    options: GenerationOptions,
    *,
    generator: torch.Generator | None = None,
    streamer: Streamer | None = None,
) -> Tensor:
    """Add tokens until every row has ended or the limit is reached.

    Args:
        input_ids: The prompts in the caller's layout, int64 `[B, S]`.
        logits: Logits of their last tokens, `[B, vocab]`.
        next_logits: Feeds one token per row and returns the next logits.
        options: What to do.
        generator: Source of randomness of sampling.
        streamer: Receives the prompt, then each token.

    Returns:
        int64 `[B, S + new]`; rows that ended are filled with `pad_token_id`.
    """
    process = make_processor(options)
    eos = torch.tensor(options.eos_token_ids, dtype=torch.int64, device=logits.device)
    ids = input_ids.to(logits.device, torch.int64)
    running = torch.ones(len(ids), dtype=torch.bool, device=logits.device)
    if streamer is not None:
        streamer.put(ids.cpu())
    for count in range(1, options.max_new_tokens + 1):
        tokens = _choose(process(ids, logits.float()), options.do_sample, generator)
        tokens = torch.where(running, tokens, options.pad_token_id)
        ids = torch.cat([ids, tokens[:, None]], 1)
        running = running & ~torch.isin(tokens, eos)
        if streamer is not None:
            streamer.put(tokens.cpu())
        if count == options.max_new_tokens or not bool(running.any()):
            break
        logits = next_logits(tokens)
    if streamer is not None:
        streamer.end()
    return ids


def _choose(logits: Tensor, do_sample: bool, generator: torch.Generator | None) -> Tensor:
    if not do_sample:
        return largest(logits)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def eos_tuple(
    eos_token_id: int | Sequence[int] | None, default: tuple[int, ...]
) -> tuple[int, ...]:
    """Return end tokens as a tuple; `default` if none is given."""
    if eos_token_id is None:
        return default
    return (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)
