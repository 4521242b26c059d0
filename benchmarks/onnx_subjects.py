"""What `onnx_cpu.py` times: one model in one runtime, behind one small interface.

A subject holds one sequence. `prefill` starts it anew, `decode` appends one token, and `fill`
brings it to a length without being timed: where a cache can be set, it gets copies of the tokens
that are cached already, since the time of a step does not depend on what it reads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

CHUNK = 512  # tokens of one run where a cache cannot be set
Ids = Sequence[int]


class Subject(Protocol):
    """One sequence of one model in one runtime."""

    def reset(self) -> None:
        """Forget the sequence."""

    def prefill(self, ids: Ids) -> int:
        """Start with a prompt; return the likeliest next token."""

    def decode(self, token: int) -> int:
        """Append a token; return the likeliest next one."""

    def fill(self, length: int) -> None:
        """Let the sequence have `length` tokens, not fewer than it has."""

    def cache_bytes(self) -> int | None:
        """Return bytes of the cache, or None where the runtime does not tell."""


class HuggingFace:
    """The model in transformers, eager, with its growing cache."""

    def __init__(self, threads: int) -> None:
        from kvxform.capture import load_source_module

        torch.set_num_threads(threads)
        self._model = load_source_module("smollm2-135m")
        self._cache: Any = None

    def reset(self) -> None:
        """Forget the sequence."""
        self._cache = None

    def prefill(self, ids: Ids) -> int:
        """Start with a prompt; logits of the last token alone, as `generate` does."""
        self.reset()
        return self._append(ids)

    def decode(self, token: int) -> int:
        """Append a token."""
        return self._append([token])

    def fill(self, length: int) -> None:
        """Repeat what is cached."""
        for layer in self._cache.layers:
            layer.keys, layer.values = (_repeat(x, length) for x in (layer.keys, layer.values))

    def cache_bytes(self) -> int:
        """Return bytes of keys and values."""
        return sum(x.keys.nbytes + x.values.nbytes for x in self._cache.layers)

    @torch.inference_mode()
    def _append(self, ids: Ids) -> int:
        out = self._model(
            input_ids=torch.tensor([list(ids)]),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache = out.past_key_values
        return int(out.logits[0, -1].argmax())


class Package:
    """A package of ours in `OnnxSession`."""

    def __init__(self, folder: Path, threads: int, capacity: int) -> None:
        from kvxform.runtime.onnx_session import OnnxSession

        self._session = OnnxSession(folder, threads=threads, max_length=capacity)

    def reset(self) -> None:
        """Forget the sequence."""
        self._session.reset()

    def prefill(self, ids: Ids) -> int:
        """Start with a prompt."""
        self.reset()
        return self._likeliest(self._session.prefill(torch.tensor([list(ids)])))

    def decode(self, token: int) -> int:
        """Append a token."""
        return self._likeliest(self._session.decode(torch.tensor([token])))

    def _likeliest(self, logits: torch.Tensor) -> int:
        """Choose by numpy, which has no threads that would wait beside the next step."""
        return int(logits[0].numpy().argmax())

    def fill(self, length: int) -> None:
        """Repeat what is cached."""
        planes = {k: _repeat(v, length) for k, v in self._session.cache_planes().items()}
        self._session.replace_rows(planes, torch.ones(1, length, dtype=torch.int64))

    def cache_bytes(self) -> int:
        """Return bytes of the planes."""
        return self._session.cache_bytes()


class PlainExport:
    """What `torch.onnx.export` makes: `present` of one call is bound as `past` of the next."""

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        self._make = onnxruntime.OrtValue.ortvalue_from_numpy
        self._session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self._inputs = self._session.get_inputs()
        self._outputs = [x.name for x in self._session.get_outputs()]
        self._past: list[Any] = []
        self.reset()

    def reset(self) -> None:
        """Forget the sequence."""
        shapes = [(1, x.shape[1], 0, x.shape[3]) for x in self._inputs[1:]]
        self._past = [self._make(np.zeros(shape, np.float32)) for shape in shapes]

    def prefill(self, ids: Ids) -> int:
        """Start with a prompt; the graph computes logits of all positions."""
        self.reset()
        return self._append(ids)

    def decode(self, token: int) -> int:
        """Append a token."""
        return self._append([token])

    def fill(self, length: int) -> None:
        """Repeat what is cached."""
        filled = [_repeat(torch.from_numpy(x.numpy()), length) for x in self._past]
        self._past = [self._make(x.numpy()) for x in filled]

    def cache_bytes(self) -> int:
        """Return bytes of keys and values."""
        return sum(4 * math.prod(x.shape()) for x in self._past)

    def _append(self, ids: Ids) -> int:
        binding = self._session.io_binding()
        binding.bind_cpu_input(self._inputs[0].name, np.array([list(ids)], np.int64))
        for port, value in zip(self._inputs[1:], self._past, strict=True):
            binding.bind_ortvalue_input(port.name, value)
        for name in self._outputs:
            binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        logits, *self._past = binding.get_outputs()
        return int(logits.numpy()[0, -1].argmax())


class GenAI:
    """A package in ONNX Runtime GenAI, of ours or of its builder."""

    def __init__(self, folder: Path, threads: int, capacity: int) -> None:
        import onnxruntime_genai

        self._module = onnxruntime_genai
        config = onnxruntime_genai.Config(str(folder))
        session = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": session}}))
        self._model = onnxruntime_genai.Model(config)
        self._capacity = capacity
        self._generator: Any = None
        self.reset()

    def reset(self) -> None:
        """Make a new generator, with its buffers."""
        self._generator = None
        params = self._module.GeneratorParams(self._model)
        params.set_search_options(max_length=self._capacity, do_sample=False)
        self._generator = self._module.Generator(self._model, params)

    def prefill(self, ids: Ids) -> int:
        """Start with a prompt; call `reset` first."""
        return self._append(ids)

    def decode(self, token: int) -> int:
        """Append a token."""
        return self._append([token])

    def fill(self, length: int) -> None:
        """Append tokens in chunks: the runtime lets nobody set its cache."""
        while (missing := length - self._generator.token_count()) > 0:
            self._append([7 + i % 1000 for i in range(min(CHUNK, missing))])

    def cache_bytes(self) -> None:
        """Return nothing: the runtime does not tell."""

    def _append(self, ids: Ids) -> int:
        self._generator.append_tokens(np.array(ids, np.int32))
        return int(np.asarray(self._generator.get_logits()).reshape(-1).argmax())


def _repeat(x: torch.Tensor, length: int) -> torch.Tensor:
    """Return `[B, heads, T, width]` repeated along the tokens up to `length`."""
    return x.repeat(1, 1, -(-length // x.shape[2]), 1)[:, :, :length].contiguous()
