"""From what the caller gave to windows of tokens, and from those to a calibration."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from kvxform.calibrate.collecting import Progress, collect
from kvxform.errors import RecipeError
from kvxform.ir.calibration import Calibration
from kvxform.ir.program import Program
from kvxform.texts import encode_text, read_text
from kvxform.tokenizer import load_tokenizer

CalibrationLike = str | Path | Tensor | Calibration | None
LONGEST_WINDOW = 1024  # tokens of a window where nothing else is said
WHERE = "calibration"


def make_calibration(
    program: Program,
    given: CalibrationLike,
    *,
    tokens: int,
    window: int | None,
    seed: int,
    fisher: bool = False,
    progress: Progress | None = None,
) -> Calibration:
    """Return statistics of `program`, or check those that are given.

    Args:
        program: A program without a cache, as capture made it.
        given: A text file, token ids `[n]` or `[windows, window]`, a calibration that was made
            before, or None for the help topics of the standard library.
        tokens: Tokens to read; windows are spread evenly over a longer text.
        window: Tokens of a sequence, or None for 1024 or what the model can take.
        seed: Seed of the choice of samples.
        fisher: Collect gradients too.
        progress: Called after each window.

    Raises:
        RecipeError: KVX108 if the text is too short, there is no tokenizer, or what is given does
            not belong to the model.
        KvxformError: KVX801 if the file cannot be read as text.
    """
    if isinstance(given, Calibration):
        _check_calibration(program, given, fisher)
        return given
    longest = program.info.context_length or LONGEST_WINDOW
    window = window or min(LONGEST_WINDOW, longest)
    if isinstance(given, Tensor):
        label, ids = "token ids", given
    else:
        label = "Python help topics" if given is None else Path(given).name
        ids = _encode(program, given)
    rows = ids if ids.ndim == 2 else cut_windows(ids, tokens, window)
    _check_tokens(program, rows)
    digest = hashlib.sha256(rows.to(torch.int64).cpu().numpy().tobytes()).hexdigest()[:12]
    name = f"{label} ({digest}), {rows.shape[0]} x {rows.shape[1]} tokens, seed {seed}"
    return collect(program, rows, name=name, seed=seed, fisher=fisher, progress=progress)


def cut_windows(token_ids: Tensor, tokens: int, window: int) -> Tensor:
    """Return windows that are spread evenly over a text, int64 `[windows, window]`.

    Args:
        token_ids: The text, int64 `[n]`.
        tokens: Tokens wanted; whole windows are taken, one at least.
        window: Tokens of one.

    Raises:
        RecipeError: KVX108 if the text is too short.
    """
    windows = max(1, tokens // window)
    if token_ids.ndim != 1 or len(token_ids) < windows * window:
        raise RecipeError(
            "KVX108",
            f"the text must have {windows} x {window} = {windows * window} tokens",
            where=WHERE,
            got=len(token_ids) if token_ids.ndim == 1 else f"shape {list(token_ids.shape)}",
            hint="take a longer text, or say calibration: {tokens: ...} in the recipe",
        )
    spare = len(token_ids) - window
    starts = [spare * i // max(1, windows - 1) for i in range(windows)]
    return torch.stack([token_ids[start : start + window] for start in starts])


def _encode(program: Program, path: str | Path | None) -> Tensor:
    text = read_text(path)
    tokenizer = load_tokenizer(program.info.tokenizer_path)
    if tokenizer is None:
        raise RecipeError(
            "KVX108",
            "a text needs a model with a tokenizer",
            where=WHERE,
            got=f"none with {program.info.name}",
            hint="put tokenizer files into the model's folder, or give token ids in Python",
        )
    return encode_text(tokenizer, text)


def _check_tokens(program: Program, rows: Tensor) -> None:
    vocab, longest = program.info.vocab_size, program.info.context_length
    if rows.dtype.is_floating_point or not 0 <= int(rows.min()) <= int(rows.max()) < vocab:
        raise RecipeError(
            "KVX108", f"token ids must be integers from 0 to {vocab - 1}", where=WHERE
        )
    if longest is not None and rows.shape[1] > longest:
        raise RecipeError(
            "KVX108",
            f"a window must fit the {longest} tokens that the model can take",
            where=WHERE,
            got=rows.shape[1],
            hint=f"say calibration: {{window: {longest}}}",
        )


def _check_calibration(program: Program, given: Calibration, fisher: bool) -> None:
    shapes = {
        site.layer: (site.num_kv_heads, site.head_dim, site.v_head_dim) for site in program.sites
    }
    found = {
        layer: (*statistics.k_post.mean.shape, statistics.v.mean.shape[1])
        for layer, statistics in given.layers.items()
    }
    if shapes != found:
        raise RecipeError(
            "KVX108", "a calibration must be of the same model", where=WHERE, got=given.name
        )
    if fisher and not given.has_gradients:
        raise RecipeError(
            "KVX108",
            "a pass of the recipe needs gradients",
            where=WHERE,
            got=f"none in '{given.name}'",
            hint="collect with fisher=True, or give the text",
        )
