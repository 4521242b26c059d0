"""One interface to everything that is measured: source module, OptimizedModel, ONNX session.

A runner holds one sequence. `logits` is stateless; `prefill` starts the sequence anew and `decode`
continues it.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Runner(Protocol):
    """What evaluation needs from a model."""

    def logits(self, input_ids: Tensor) -> Tensor:
        """Return logits of all positions, `[1, S, vocab]`, from int64 `[1, S]`; no state."""

    def prefill(self, input_ids: Tensor) -> Tensor:
        """Start a new sequence with int64 `[1, S]`; logits of the last position `[1, vocab]`."""

    def decode(self, token_ids: Tensor) -> Tensor:
        """Append one token, int64 `[1]`; logits `[1, vocab]`."""


class SourceRunner:
    """An unrewritten `nn.Module`; Hugging Face models decode with their own DynamicCache.

    Other modules have no cache that we know of: they decode by running the whole sequence again.
    """

    def __init__(self, module: nn.Module) -> None:
        from transformers import PreTrainedModel

        self._module = module.eval()
        self._has_cache = isinstance(module, PreTrainedModel)
        self._cache: Any = None
        self._seen = torch.empty(1, 0, dtype=torch.int64)

    def logits(self, input_ids: Tensor) -> Tensor:
        """Return logits of all positions, `[1, S, vocab]`."""
        options = {"use_cache": False} if self._has_cache else {}
        with torch.inference_mode():
            return _logits_of(self._module(input_ids, **options))

    def prefill(self, input_ids: Tensor) -> Tensor:
        """Start a new sequence; logits of the last position `[1, vocab]`."""
        self._cache, self._seen = None, input_ids[:, :0]
        return self._append(input_ids)

    def decode(self, token_ids: Tensor) -> Tensor:
        """Append one token, int64 `[1]`; logits `[1, vocab]`."""
        return self._append(token_ids[:, None])

    def _append(self, input_ids: Tensor) -> Tensor:
        if not self._has_cache:
            self._seen = torch.cat([self._seen, input_ids], 1)
            return self.logits(self._seen)[:, -1]
        with torch.inference_mode():
            out = self._module(input_ids, past_key_values=self._cache, use_cache=True)
        self._cache = out.past_key_values
        return _logits_of(out)[:, -1]


class SessionRunner:
    """An OptimizedModel; each sequence is a fresh session of one row.

    Args:
        model: The OptimizedModel.
        max_seq_len: Most tokens of a sequence, prompt included.
    """

    def __init__(self, model: Any, max_seq_len: int) -> None:
        self._model, self._max_seq_len = model, max_seq_len
        self._session: Any = None

    def logits(self, input_ids: Tensor) -> Tensor:
        """Return logits of all positions, `[1, S, vocab]`."""
        out: Tensor = self._model(input_ids)
        return out

    def prefill(self, input_ids: Tensor) -> Tensor:
        """Start a new sequence; logits of the last position `[1, vocab]`."""
        self._session = self._model.new_session(max_batch_size=1, max_seq_len=self._max_seq_len)
        out: Tensor = self._session.prefill(input_ids)
        return out

    def decode(self, token_ids: Tensor) -> Tensor:
        """Append one token, int64 `[1]`; logits `[1, vocab]`."""
        out: Tensor = self._session.decode(token_ids)
        return out


class OnnxRunner:
    """An OnnxSession; it holds one sequence, which `prefill` starts anew."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def logits(self, input_ids: Tensor) -> Tensor:
        """Return logits of all positions, `[1, S, vocab]`."""
        self._session.reset()
        out: Tensor = self._session.prefill(input_ids, all_logits=True)
        return out

    def prefill(self, input_ids: Tensor) -> Tensor:
        """Start a new sequence; logits of the last position `[1, vocab]`."""
        self._session.reset()
        out: Tensor = self._session.prefill(input_ids)
        return out

    def decode(self, token_ids: Tensor) -> Tensor:
        """Append one token, int64 `[1]`; logits `[1, vocab]`."""
        out: Tensor = self._session.decode(token_ids)
        return out


def make_runner(model: Any, max_seq_len: int) -> Runner:
    """Return the runner for a source module, an OptimizedModel or an OnnxSession.

    Args:
        model: What to run.
        max_seq_len: Longest sequence that will be run.
    """
    from kvxform.runtime.model import OptimizedModel

    if isinstance(model, OptimizedModel):
        return SessionRunner(model, max_seq_len)
    return SourceRunner(model) if isinstance(model, nn.Module) else OnnxRunner(model)


def _logits_of(out: Any) -> Tensor:
    """Return the logits in a module's output: the tensor itself, `.logits`, or the first item."""
    if isinstance(out, Tensor):
        return out
    logits: Tensor = out.logits if hasattr(out, "logits") else out[0]
    return logits
