"""One interface to everything that is measured: source module, OptimizedModel, ONNX session.

A runner holds sequences of one length, a row each. `logits` is stateless; `prefill` starts the
sequences anew and `decode` continues them. Token ids may come from any device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Runner(Protocol):
    """What evaluation needs from a model."""

    def logits(self, input_ids: Tensor) -> Tensor:
        """Return logits of all positions, `[B, S, vocab]`, from int64 `[B, S]`; no state."""

    def prefill(self, input_ids: Tensor) -> Tensor:
        """Start new sequences with int64 `[B, S]`; logits of the last position `[B, vocab]`."""

    def decode(self, token_ids: Tensor) -> Tensor:
        """Append one token a row, int64 `[B]`; logits `[B, vocab]`."""


class SourceRunner:
    """An unrewritten `nn.Module`; Hugging Face models decode with their own cache.

    Other modules have no cache that we know of: they decode by running the whole sequence again.

    Args:
        module: The model.
        make_cache: Makes an empty Hugging Face cache; their DynamicCache by default.
    """

    def __init__(self, module: nn.Module, make_cache: Callable[[], Any] | None = None) -> None:
        from transformers import PreTrainedModel

        self._module = module.eval()
        self._has_cache = isinstance(module, PreTrainedModel)
        self._make_cache = make_cache
        self._cache: Any = None
        self._seen = torch.empty(1, 0, dtype=torch.int64)

    def logits(self, input_ids: Tensor) -> Tensor:
        """Return logits of all positions, `[B, S, vocab]`."""
        options = {"use_cache": False} if self._has_cache else {}
        with torch.inference_mode():
            return _logits_of(self._module(input_ids.to(self._device), **options))

    def prefill(self, input_ids: Tensor) -> Tensor:
        """Start new sequences; logits of the last position `[B, vocab]`."""
        self._cache = None if self._make_cache is None else self._make_cache()
        self._seen = input_ids[:, :0]
        return self._append(input_ids)

    def decode(self, token_ids: Tensor) -> Tensor:
        """Append one token a row, int64 `[B]`; logits `[B, vocab]`."""
        return self._append(token_ids[:, None])

    @property
    def cache(self) -> Any:
        """The Hugging Face cache of the sequences, or None."""
        return self._cache

    @property
    def _device(self) -> torch.device:
        return next((p.device for p in self._module.parameters()), torch.device("cpu"))

    def _append(self, input_ids: Tensor) -> Tensor:
        if not self._has_cache:
            self._seen = torch.cat([self._seen, input_ids], 1)
            return self.logits(self._seen)[:, -1]
        with torch.inference_mode():
            out = self._module(
                input_ids.to(self._device),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self._cache = out.past_key_values
        return _logits_of(out)[:, -1]


class SessionRunner:
    """An OptimizedModel; a prefill opens a fresh session.

    Args:
        model: The OptimizedModel.
        max_seq_len: Most tokens of a sequence, prompt included.
    """

    def __init__(self, model: Any, max_seq_len: int) -> None:
        self._model, self._max_seq_len = model, max_seq_len
        self._session: Any = None

    def logits(self, input_ids: Tensor) -> Tensor:
        """Return logits of all positions, `[B, S, vocab]`."""
        out: Tensor = self._model(input_ids)
        return out

    def prefill(self, input_ids: Tensor) -> Tensor:
        """Start new sequences; logits of the last position `[B, vocab]`."""
        self._session = self._model.new_session(
            max_batch_size=len(input_ids), max_seq_len=self._max_seq_len
        )
        out: Tensor = self._session.prefill(input_ids)
        return out

    def decode(self, token_ids: Tensor) -> Tensor:
        """Append one token a row, int64 `[B]`; logits `[B, vocab]`."""
        out: Tensor = self._session.decode(token_ids)
        return out

    def cache_bytes(self) -> int:
        """Return bytes of the cache of the sequences."""
        return int(self._session.cache_bytes())


class OnnxRunner:
    """An OnnxSession; `prefill` starts it anew."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def logits(self, input_ids: Tensor) -> Tensor:
        """Return logits of all positions, `[B, S, vocab]`."""
        self._session.reset()
        out: Tensor = self._session.prefill(input_ids, all_logits=True)
        return out

    def prefill(self, input_ids: Tensor) -> Tensor:
        """Start new sequences; logits of the last position `[B, vocab]`."""
        self._session.reset()
        out: Tensor = self._session.prefill(input_ids)
        return out

    def decode(self, token_ids: Tensor) -> Tensor:
        """Append one token a row, int64 `[B]`; logits `[B, vocab]`."""
        out: Tensor = self._session.decode(token_ids)
        return out

    def cache_bytes(self) -> int:
        """Return bytes of the cache of the sequences."""
        return int(self._session.cache_bytes())


class Remembered:
    """A runner whose stateless logits are computed once for each input and kept.

    A table of many formats compares all of them with one source; this is that source. What is kept
    is `rows * S * vocab` floats.

    Args:
        runner: The model.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._kept: dict[tuple[int, ...], Tensor] = {}

    def logits(self, input_ids: Tensor) -> Tensor:
        """Return logits of all positions, `[B, S, vocab]`."""
        rows = []
        for row in input_ids:
            key = tuple(row.tolist())
            if key not in self._kept:
                self._kept[key] = self._runner.logits(row[None])[0]
            rows.append(self._kept[key])
        return torch.stack(rows)

    def prefill(self, input_ids: Tensor) -> Tensor:
        """Start new sequences; logits of the last position `[B, vocab]`."""
        return self._runner.prefill(input_ids)

    def decode(self, token_ids: Tensor) -> Tensor:
        """Append one token a row, int64 `[B]`; logits `[B, vocab]`."""
        return self._runner.decode(token_ids)


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
