"""OnnxSession: an exported package in use, on ONNX Runtime.

The cache never leaves the runtime. How it is kept is a matter of the package: planes that grow,
buffers of a fixed length, or pages (`kvxform.runtime.onnx_cache`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from kvxform.errors import CacheFullError, KvxformError
from kvxform.runtime.generate import GenerationOptions, Streamer, eos_tuple, run_loop
from kvxform.runtime.inputs import Batch, check_tokens, make_batch, refuse
from kvxform.runtime.onnx_buffers import BufferCache
from kvxform.runtime.onnx_cache import PackageCache
from kvxform.runtime.onnx_engine import Engine
from kvxform.runtime.onnx_files import check_package
from kvxform.runtime.onnx_growing import GrowingCache
from kvxform.runtime.onnx_paged import PagedCache
from kvxform.runtime.onnx_runtime import refuse_here


class OnnxSession:
    """Cached execution of an ONNX package for one batch of sequences.

    Args:
        folder: What `export_onnx` wrote.
        provider: `cpu` or `cuda`; what the package was made for by default.
        threads: Threads within an operation on the CPU; those of the machine by default.
        max_length: Tokens that a row has room for; the context of the model by default, and
            buffers grow as they must.
        cuda_graph: Capture decode steps on CUDA; by default where the package allows it.
        is_edited: Take a package whose files were changed since it was written.

    Attributes:
        folder: The package.
        description: Its `kvxform.json`.
        provider: Where it runs.

    Raises:
        ArtifactError: KVX601 for missing, KVX602 for damaged files, KVX603 for a path that leaves
            the folder, KVX604 for another version of the package.
        KvxformError: KVX704 if the installed ONNX Runtime cannot run it there.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        provider: str | None = None,
        threads: int | None = None,
        max_length: int | None = None,
        cuda_graph: bool | None = None,
        is_edited: bool = False,
    ) -> None:
        if max_length is not None and max_length < 1:
            refuse("max_length must be at least 1", max_length)
        self.folder = Path(folder)
        self.description = check_package(self.folder, is_edited=is_edited)
        form = self.description["onnx"]
        self.provider = str(provider or form["provider"])
        self._limit = _least(max_length, self.info["context_length"])
        is_static = form["cache"] != "grow" and self.provider == "cuda"
        captures = is_static if cuda_graph is None else cuda_graph
        if captures and not is_static:
            got = f"cache {form['cache']} on {self.provider}"
            hint = "leave cuda_graph out"
            refuse_here("cuda_graph needs a package with buffers or pages, on CUDA", got, hint)
        if form["cache"] == "paged" and self.provider == "cpu":
            hint = "take provider cuda, or export level L3 for the CPU"
            refuse_here("a package with pages runs on CUDA alone", self.provider, hint)
        engine = Engine(self.folder, form, self.provider, threads=threads, cuda_graph=captures)
        self._cache = _make_cache(engine, form, max_length, self._limit, captures)

    @property
    def info(self) -> dict[str, Any]:
        """Facts about the model: `vocab_size`, `eos_token_ids`, `context_length`, ..."""
        model: dict[str, Any] = self.description["model"]
        return model

    @property
    def batch_size(self) -> int:
        """Sequences in the cache."""
        return len(self._cache.lengths)

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
            all_logits: Return logits of all positions, in the caller's columns, zero at padding. A
                package with logits `last` then runs token by token.

        Returns:
            Logits of the last token of each row `[B, vocab]`, or `[B, S, vocab]`; on the GPU where
            that is the provider.

        Raises:
            CacheFullError: KVX703 if a sequence would be longer than the session or the context.
            KvxformError: KVX704 for bad input, KVX706 if the runtime fails; nothing has changed
                then.
        """
        batch = make_batch(input_ids, attention_mask, self.info["vocab_size"])
        self._check_batch(batch)
        if chunk_size is not None and chunk_size < 1:
            refuse("chunk_size must be at least 1", chunk_size)
        logits = self._cache.append(batch, chunk_size, every=all_logits)
        return batch.to_caller(logits) if all_logits else logits

    def decode(self, token_ids: Tensor) -> Tensor:
        """Append one token to each row and return the next logits.

        Args:
            token_ids: Integer `[B]`.

        Returns:
            Logits `[B, vocab]`.

        Raises:
            CacheFullError: KVX703 if a sequence would be longer than the session or the context.
            KvxformError: KVX704 for bad input, KVX706 if the runtime fails.
        """
        ids = check_tokens(token_ids, self.info["vocab_size"])
        if len(ids) != self.batch_size or not self.batch_size:
            refuse(f"decode needs one token for each of {self.batch_size} rows", len(ids))
        self._check_length([1] * len(ids))
        return self._cache.step(ids)

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
        self._cache.reset()

    def sequence_lengths(self) -> tuple[int, ...]:
        """Return cached tokens of each row, padding not counted."""
        return self._cache.lengths

    def cache_bytes(self) -> int:
        """Return bytes of the memory of the cache, padding and room for more tokens included."""
        return self._cache.bytes()

    def planned_rows(self) -> tuple[int, int]:
        """Return the rows and the tokens a row that this memory is for."""
        return self._cache.planned_rows()

    def cache_planes(self) -> dict[str, Tensor]:
        """Return copies of the cache planes `[B, Hk, rows, width]` by input name."""
        return self._cache.planes()

    @property
    def mask(self) -> Tensor:
        """Which columns of the planes are tokens and not padding, int64 `[B, columns]`."""
        return self._cache.mask

    def replace_rows(self, planes: Mapping[str, Tensor], mask: Tensor) -> None:
        """Let the cache hold `planes`, as `cache_planes` returns them, of the columns in `mask`."""
        self._cache.replace(planes, mask)

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
        if self._limit is not None and longest > self._limit:
            is_model = self._limit == self.info["context_length"]
            raise CacheFullError(
                "KVX703",
                f"a sequence must fit into the {'model' if is_model else 'session'}'s "
                f"{self._limit} tokens",
                where="onnx",
                got=longest,
                hint="shorten the prompt" if is_model else "open the session with more max_length",
            )


def _make_cache(
    engine: Engine,
    form: Mapping[str, Any],
    max_length: int | None,
    limit: int | None,
    cuda_graph: bool,
) -> PackageCache:
    """Return the cache that a package asks for."""
    if form["cache"] == "buffer":
        return BufferCache(engine, max_length, limit, cuda_graph=cuda_graph)
    if form["cache"] == "paged":
        size = int(form["block_size"])
        return PagedCache(engine, max_length, block_size=size, cuda_graph=cuda_graph)
    return GrowingCache(engine)


def _least(*numbers: int | None) -> int | None:
    return min((n for n in numbers if n is not None), default=None)
