"""OptimizedModel: a Program that a user can call, generate with, save and export."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvxform.codegen.eager.lowering import EagerExecutable
from kvxform.ir.execution import Executable
from kvxform.ir.plan import CachePlan
from kvxform.ir.program import Program, default_positions
from kvxform.recipe import Target
from kvxform.runtime.executables import make_executable
from kvxform.runtime.generate import GenerationOptions, NextLogits, Streamer, eos_tuple, run_loop
from kvxform.runtime.inputs import Batch, check_ids, make_batch, refuse
from kvxform.runtime.session import Session
from kvxform.tokenizer import load_tokenizer, tokenizer_files

if TYPE_CHECKING:
    from kvxform.codegen.onnx.forms import OnnxOptions
    from kvxform.runtime.exporting import ExportCheck

DEFAULT_SEQ_LEN = 2048


class OptimizedModel:
    """A compiled model.

    Args:
        program: What to run.
        report: What the pipeline measured, a `kvxform.report.Report`, or None.
        recipe: What was done to it, a `kvxform.recipe.Recipe`, or None.
        tokenizer: Tokenizer of the source; loaded on first use if the program knows its files.
    """

    def __init__(
        self,
        program: Program,
        *,
        report: Any = None,
        recipe: Any = None,
        tokenizer: Any = None,
    ) -> None:
        self.program, self.report, self.recipe = program, report, recipe
        self._tokenizer = tokenizer
        target = Target() if recipe is None else recipe.target
        self._executable: Executable = make_executable(program, target)

    @property
    def plan(self) -> CachePlan | None:
        """What is cached and how; None without a cache."""
        return self.program.plan

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self._executable.device

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The source's tokenizer, or None."""
        path = self.program.info.tokenizer_path
        return load_tokenizer(path) if self._tokenizer is None else self._tokenizer

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return logits `[B, S, vocab]` of all positions, in the caller's columns.

        A program with a cache runs one prefill over a fresh one, so the codecs act on K and V of
        every position. Logits at padding are zero.

        Args:
            input_ids: Integer `[B, S]`, padded on either side.
            attention_mask: `[B, S]` of 0 and 1, one run of ones a row.

        Raises:
            KvxformError: KVX704 for bad input.
        """
        if self.plan is not None:
            session = self._session_for(input_ids, 0)
            return session.prefill(input_ids, attention_mask, all_logits=True)
        info = self.program.info
        batch = make_batch(input_ids, attention_mask, info.vocab_size)
        self._check_length(batch.input_ids.shape[1])
        ids = batch.input_ids.to(self.device)
        return batch.to_caller(self._stateless(ids, default_positions(ids)))

    def new_session(
        self,
        max_batch_size: int = 1,
        max_seq_len: int | None = None,
        *,
        num_pages: int | None = None,
    ) -> Session:
        """Return an empty session.

        Args:
            max_batch_size: Rows.
            max_seq_len: Longest sequence; the model's context, or 2048 if that is unknown.
            num_pages: Usable pages; enough for all rows at full length by default.

        Raises:
            CodegenError: KVX401 if the program has no cache.
        """
        if max_seq_len is None:
            max_seq_len = self.program.info.context_length or DEFAULT_SEQ_LEN
        return Session(
            self._executable,
            max_batch_size=max_batch_size,
            max_seq_len=max_seq_len,
            num_pages=num_pages,
        )

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 32,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        streamer: Streamer | None = None,
    ) -> Tensor:
        """Continue prompts; greedy unless told otherwise. Names follow Hugging Face.

        Args:
            input_ids: Integer `[B, S]`, padded on the left.
            attention_mask: `[B, S]` of 0 and 1.
            max_new_tokens: Tokens to add at most.
            do_sample: Draw tokens instead of taking the likeliest.
            temperature: See `GenerationOptions`, as for the next three.
            top_k: Tokens kept.
            top_p: Mass kept.
            repetition_penalty: Factor against tokens that occurred before.
            eos_token_id: Tokens that end a row; those of the model by default.
            pad_token_id: Fills ended rows; that of the model, or its first end token, by default.
            seed: Seed of the draws; without it and `generator` the global state is used.
            generator: Source of the draws.
            streamer: Receives the prompt and each new token.

        Returns:
            int64 `[B, S + new]`.

        Raises:
            KvxformError: KVX704 for bad input.
        """
        info = self.program.info
        eos = eos_tuple(eos_token_id, info.eos_token_ids)
        pad = next((p for p in (pad_token_id, info.pad_token_id, *eos) if p is not None), 0)
        options = GenerationOptions(
            max_new_tokens, do_sample, temperature, top_k, top_p, repetition_penalty, eos, pad
        )
        if seed is not None:
            generator = torch.Generator(self._executable.device).manual_seed(seed)
        logits, advance = self._start(input_ids, attention_mask, max_new_tokens)
        return run_loop(input_ids, logits, advance, options, generator=generator, streamer=streamer)

    def save(self, path: str | Path) -> Path:
        """Write the model as an artifact folder, for `kvxform.load`.

        Raises:
            ArtifactError: KVX601 if `path` is something else than an artifact.
        """
        from kvxform.ir.artifact import save_artifact

        save_artifact(Path(path), self.program, self.artifact_files())
        return Path(path)

    def artifact_files(self, tokenizer_folder: str = "tokenizer/") -> dict[str, str | bytes]:
        """Return what an artifact holds beside the program, by relative path.

        Args:
            tokenizer_folder: Prefix of the paths of tokenizer files.
        """
        extra: dict[str, str | bytes] = {}
        if self.report is not None:
            extra |= {"report.json": self.report.to_json(), "report.html": self.report.to_html()}
        if self.recipe is not None:
            extra["recipe.yaml"] = self.recipe.to_yaml()
            if self.recipe.target.lowering == "triton":
                from kvxform.codegen.triton.files import artifact_kernels

                extra |= artifact_kernels(self.program)
        files = tokenizer_files(self.program.info.tokenizer_path)
        return extra | {f"{tokenizer_folder}{name}": content for name, content in files.items()}

    def as_huggingface(self) -> Any:
        """Return this model as a transformers `PreTrainedModel` that can `generate`.

        See `kvxform.runtime.huggingface.KvxformForCausalLM`.
        """
        from kvxform.runtime.huggingface import KvxformConfig, KvxformForCausalLM

        return KvxformForCausalLM(KvxformConfig.of(self.program), self)

    def export_onnx(
        self,
        path: str | Path,
        options: OnnxOptions | None = None,
        *,
        verify: ExportCheck = "probe",
        progress: Callable[[str], None] | None = None,
    ) -> Path:
        """Write the model as an ONNX package folder; see `kvxform.runtime.exporting`.

        Args:
            path: Where to write.
            options: What is asked of the package; what the recipe says if None.
            verify: `probe` runs it against the eager lowering before it gets its place.
            progress: Called with a line of text as the work goes on.

        Raises:
            CodegenError: KVX401 if the program has something that cannot be expressed, KVX403 if
                the options are not legal for it.
            VerifyError: KVX503 if the package is not as the eager lowering; nothing is written.
        """
        from kvxform.runtime.exporting import export_package

        return export_package(self, path, options, verify=verify, progress=progress)

    def _start(
        self, input_ids: Tensor, attention_mask: Tensor | None, max_new_tokens: int
    ) -> tuple[Tensor, NextLogits]:
        """Return logits of the prompts' last tokens, and what feeds one more token to each."""
        fed_later = max_new_tokens - 1  # nothing comes after the last token
        if self.plan is not None:
            session = self._session_for(input_ids, fed_later)
            return session.prefill(input_ids, attention_mask), session.decode
        batch = make_batch(input_ids, attention_mask, self.program.info.vocab_size)
        self._check_length(batch.width + fed_later)
        rows = _Recompute(self._stateless, batch)
        return rows.logits(), rows.advance

    @property
    def _stateless(self) -> EagerExecutable:
        assert isinstance(self._executable, EagerExecutable), "other lowerings need a cache"
        return self._executable

    def _session_for(self, input_ids: Tensor, fed_later: int) -> Session:
        check_ids(input_ids, 2, self.program.info.vocab_size)
        batch_size, width = input_ids.shape
        self._check_length(width + fed_later)
        return self.new_session(batch_size, width + fed_later)

    def _check_length(self, tokens: int) -> None:
        limit = self.program.info.context_length
        if limit is not None and tokens > limit:
            refuse(f"prompt and new tokens must be within the model's {limit} tokens", tokens)


class _Recompute:
    """Generation without a cache: every step runs the whole sequence again."""

    def __init__(self, executable: EagerExecutable, batch: Batch) -> None:
        self._executable = executable
        self._ids = batch.input_ids.to(executable.device)
        self._counts = torch.tensor(batch.counts, device=executable.device)

    def logits(self) -> Tensor:
        """Return logits of the last token of each row, `[B, vocab]`."""
        return self._executable(self._ids, default_positions(self._ids), last=self._counts - 1)

    def advance(self, token_ids: Tensor) -> Tensor:
        """Append `token_ids` `[B]` and return the next logits."""
        self._ids = torch.nn.functional.pad(self._ids, (0, 1))
        rows = torch.arange(len(token_ids), device=token_ids.device)
        self._ids[rows, self._counts] = token_ids
        self._counts = self._counts + 1
        return self.logits()
