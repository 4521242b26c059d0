"""OnnxSession: an exported package in use, on ONNX Runtime.

The cache never leaves the runtime: every step binds the `present` values of the last one as `past`.
In the cache all rows are equally long; shorter prompts are padded on the left, and the padding is
masked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kvxform.errors import ArtifactError, CacheFullError, KvxformError
from kvxform.runtime.generate import GenerationOptions, Streamer, eos_tuple, run_loop
from kvxform.runtime.inputs import Batch, check_tokens, make_batch, refuse
from kvxform.runtime.onnx_files import check_package

if TYPE_CHECKING:
    import onnxruntime

PAST, PRESENT = "past_key_values.", "present."
NUMPY_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
}


class OnnxSession:
    """Cached execution of an ONNX package for one batch of sequences.

    Args:
        folder: What `export_onnx` wrote.
        providers: Execution providers of ONNX Runtime, the first that fits is used; CPU by default.
        threads: Threads within an operation; those of the machine by default.

    Raises:
        ArtifactError: KVX601 for missing, KVX602 for damaged files, KVX603 for a path that leaves
            the folder, KVX604 for another version of the package.
        KvxformError: KVX704 if onnxruntime is not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        threads: int | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.description = check_package(self.folder)
        self._runtime = import_runtime()
        self._session = self._load(list(providers), threads)
        self._device = "cuda" if providers[0] == "CUDAExecutionProvider" else "cpu"
        ports = [x for x in self._session.get_inputs() if x.name.startswith(PAST)]
        self._ports = {x.name: (x.shape, NUMPY_DTYPES[x.type]) for x in ports}
        self._outputs = [x.name for x in self._session.get_outputs()]
        self._past: dict[str, Any] = {}
        self._mask = np.zeros((0, 0), np.int64)

    @property
    def info(self) -> dict[str, Any]:
        """Facts about the model: `vocab_size`, `eos_token_ids`, `context_length`, ..."""
        model: dict[str, Any] = self.description["model"]
        return model

    @property
    def batch_size(self) -> int:
        """Sequences in the cache."""
        return len(self._mask)

    def prefill(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        chunk_size: int | None = None,
        all_logits: bool = False,
    ) -> Tensor:
        """Append prompts; rows that are cached already continue.

        Args:
            input_ids: Integer `[B, S]`, padded on either side.
            attention_mask: `[B, S]` of 0 and 1, one run of ones a row.
            chunk_size: Tokens per run; all at once by default.
            all_logits: Return logits of all positions, in the caller's columns, zero at padding.

        Returns:
            Logits of the last token of each row `[B, vocab]`, or `[B, S, vocab]`.

        Raises:
            CacheFullError: KVX703 if a sequence would be longer than the model's context.
            KvxformError: KVX704 for bad input; nothing has changed then.
        """
        batch = make_batch(input_ids, attention_mask, self.info["vocab_size"])
        self._check_batch(batch)
        if chunk_size is not None and chunk_size < 1:
            refuse("chunk_size must be at least 1", chunk_size)
        ids, mask = _pad_left(batch)
        parts = []
        for first in range(0, ids.shape[1], chunk_size or ids.shape[1]):
            chunk = slice(first, first + (chunk_size or ids.shape[1]))
            parts.append(self._run(ids[:, chunk], mask[:, chunk], all_logits))
        if not all_logits:
            return parts[-1]
        return batch.to_caller(_move_left(torch.cat(parts, 1), batch.counts))

    def decode(self, token_ids: Tensor) -> Tensor:
        """Append one token to each row and return the next logits.

        Args:
            token_ids: Integer `[B]`.

        Returns:
            Logits `[B, vocab]`.

        Raises:
            CacheFullError: KVX703 if a sequence would be longer than the model's context.
            KvxformError: KVX704 for bad input.
        """
        ids = check_tokens(token_ids, self.info["vocab_size"])
        if len(ids) != self.batch_size or not self.batch_size:
            refuse(f"decode needs one token for each of {self.batch_size} rows", len(ids))
        self._check_length([1] * len(ids))
        return self._run(ids[:, None].numpy(), np.ones((len(ids), 1), np.int64), False)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 32,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        streamer: Streamer | None = None,
    ) -> Tensor:
        """Continue prompts greedily, in an empty cache; names follow Hugging Face.

        Args:
            input_ids: Integer `[B, S]`, padded on the left.
            attention_mask: `[B, S]` of 0 and 1.
            max_new_tokens: Tokens to add at most.
            eos_token_id: Tokens that end a row; those of the model by default.
            pad_token_id: Fills ended rows.
            streamer: Receives the prompt and each new token.

        Returns:
            int64 `[B, S + new]`.
        """
        eos = eos_tuple(eos_token_id, tuple(self.info["eos_token_ids"]))
        pad = next((p for p in (pad_token_id, self.info["pad_token_id"], *eos) if p is not None), 0)
        options = GenerationOptions(max_new_tokens, eos_token_ids=eos, pad_token_id=pad)
        self.reset()
        logits = self.prefill(input_ids, attention_mask)
        return run_loop(input_ids, logits, self.decode, options, streamer=streamer)

    def reset(self) -> None:
        """Forget all rows."""
        self._past = {}
        self._mask = np.zeros((0, 0), np.int64)

    def sequence_lengths(self) -> tuple[int, ...]:
        """Return cached tokens of each row, padding not counted."""
        return tuple(self._mask.sum(1).tolist())

    def cache_bytes(self) -> int:
        """Return bytes of the cache planes, padding included."""
        return sum(
            math.prod(value.shape()) * np.dtype(self._ports[name][1]).itemsize
            for name, value in self._past.items()
        )

    def cache_planes(self) -> dict[str, Tensor]:
        """Return copies of the cache planes `[B, Hk, rows, width]` by input name."""
        return {name: torch.from_numpy(value.numpy()) for name, value in self._past.items()}

    @property
    def mask(self) -> Tensor:
        """Which cached columns are tokens and not padding, int64 `[B, columns]`."""
        return torch.from_numpy(self._mask)

    def replace_rows(self, planes: Mapping[str, Tensor], mask: Tensor) -> None:
        """Let the cache hold `planes`, as `cache_planes` returns them, of the columns in `mask`."""
        make = self._runtime.OrtValue.ortvalue_from_numpy
        self._past = {
            name: make(plane.contiguous().numpy(), self._device) for name, plane in planes.items()
        }
        self._mask = mask.contiguous().numpy()

    def _load(self, providers: list[str], threads: int | None) -> onnxruntime.InferenceSession:
        options = self._runtime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        path = str(self.folder / "model.onnx")
        try:
            return self._runtime.InferenceSession(path, options, providers=providers)
        except Exception as error:  # the runtime has a class for each status code
            reason = str(error).splitlines()[0]
            raise ArtifactError(
                "KVX602", "ONNX Runtime must be able to load model.onnx", got=reason
            ) from error

    def _check_batch(self, batch: Batch) -> None:
        if self.batch_size and len(batch.counts) != self.batch_size:
            refuse(f"the cache holds {self.batch_size} rows", len(batch.counts))
        if len(set(batch.counts)) > 1 and not self.description["onnx"]["padding"]:
            raise KvxformError(
                "KVX704",
                "rows must be equally long in a package with exact regions or groups of tokens",
                where="onnx",
                got=batch.counts,
                hint="run rows of different lengths one after the other",
            )
        self._check_length(batch.counts)

    def _check_length(self, counts: list[int]) -> None:
        before = self.sequence_lengths() or (0,) * len(counts)
        longest = max(a + n for a, n in zip(before, counts, strict=True))
        limit = self.info["context_length"]
        if limit is not None and longest > limit:
            raise CacheFullError(
                "KVX703",
                f"a sequence must fit into the model's {limit} tokens",
                where="onnx",
                got=longest,
                hint="shorten the prompt",
            )

    def _run(self, ids: np.ndarray[Any, Any], mask: np.ndarray[Any, Any], every: bool) -> Tensor:
        """Run one step; return logits `[B, S, vocab]` if `every`, else of the last column."""
        past_mask = self._mask if self.batch_size else np.zeros((len(ids), 0), np.int64)
        full = np.concatenate([past_mask, mask], 1)
        positions = np.maximum(full.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids))
        binding.bind_cpu_input("attention_mask", full)
        binding.bind_cpu_input("position_ids", np.ascontiguousarray(positions))
        for name in self._ports:
            binding.bind_ortvalue_input(name, self._past.get(name) or self._empty(name, len(ids)))
        for name in self._outputs:
            binding.bind_output(name, "cpu" if name == "logits" else self._device)
        self._session.run_with_iobinding(binding)
        values = dict(zip(self._outputs, binding.get_outputs(), strict=True))
        logits = torch.from_numpy(values.pop("logits").numpy())
        self._past = {PAST + name.removeprefix(PRESENT): v for name, v in values.items()}
        self._mask = full
        return logits if every else logits[:, -1]

    def _empty(self, name: str, batch_size: int) -> Any:
        shape, dtype = self._ports[name]
        zeros = np.zeros((batch_size, shape[1], 0, shape[3]), dtype)
        return self._runtime.OrtValue.ortvalue_from_numpy(zeros, self._device)


def import_runtime() -> Any:
    """Return the module onnxruntime; KVX704 if it is not installed."""
    try:
        import onnxruntime
    except ImportError as error:
        raise KvxformError(
            "KVX704",
            "an ONNX session needs the package onnxruntime",
            where="onnx",
            hint="pip install 'kvxform[cpu]'",
        ) from error
    return onnxruntime


def _pad_left(batch: Batch) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return ids and mask, int64 `[B, S]`, with real tokens at the right end."""
    width = max(batch.counts)
    ids = np.zeros((len(batch.counts), width), np.int64)
    mask = np.zeros_like(ids)
    for row, count in enumerate(batch.counts):
        ids[row, width - count :] = batch.input_ids[row, :count].numpy()
        mask[row, width - count :] = 1
    return ids, mask


def _move_left(values: Tensor, counts: list[int]) -> Tensor:
    """Move the last `counts[b]` entries of axis 1 to its front; the rest becomes zero."""
    out = torch.zeros_like(values)
    for row, count in enumerate(counts):
        out[row, :count] = values[row, values.shape[1] - count :]
    return out
