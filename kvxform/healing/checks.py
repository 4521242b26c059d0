"""What must hold before anything is trained."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from kvxform.errors import ArtifactError, KvxformError
from kvxform.healing.parameters import trainable
from kvxform.ir.program import Program

WHERE = "heal"


def require_touched(program: Program) -> None:
    """Refuse a program in which there is nothing to train.

    Raises:
        ArtifactError: KVX605.
    """
    sites = program.plan.sites if program.plan else ()
    if any(site.payload == "pair" for site in sites):
        rule = "caches of layers must not be merged while weights are trained"
        hint = "heal what comes before merge-layer-pairs, and merge afterwards"
        raise ArtifactError("KVX605", rule, where=WHERE, got="merge-layer-pairs", hint=hint)
    if trainable(program):
        return
    raise ArtifactError(
        "KVX605",
        "a structure pass must have touched weights that can be trained",
        where=WHERE,
        got=f"none after {', '.join(program.passes) or 'no pass'}",
        hint="what the other passes change is no weight, or is exact",
    )


def require_source(program: Program, source: Program) -> None:
    """Refuse a source that `program` was not made from.

    Raises:
        ArtifactError: KVX606 with what differs.
    """
    own, theirs = program.info, source.info
    for what in ("family", "vocab_size", "dtype"):
        if getattr(own, what) != getattr(theirs, what):
            words = what.replace("_", " ")
            _refuse(f"{words} {getattr(own, what)}", f"{getattr(theirs, what)} of {theirs.name}")
    modules = {site.module for site in source.sites}
    missing = [site.module for site in program.sites if site.module not in modules]
    if missing:
        _refuse(f"an attention {missing[0]}", f"none in {theirs.name}")
    _require_weights(program, source)


def _require_weights(program: Program, source: Program) -> None:
    """Compare the weights that no pass has rewritten."""
    for name in sorted(set(program.weights) & set(source.weights) - set(program.touched)):
        own, theirs = program.weights[name], source.weights[name]
        if own.shape != theirs.shape and own.ndim > 1:
            _refuse(f"{name} {list(own.shape)}", f"{list(theirs.shape)} of {source.info.name}")
    kept = [name for name in sorted(source.weights) if _is_kept(program, source, name)]
    if program.facts["residual.basis"] == "identity" and not kept:
        _refuse("the weights of the artifact where no pass changed them", "none that is equal")


def _is_kept(program: Program, source: Program, name: str) -> bool:
    """Whether a matrix is the same in both."""
    own: Tensor | None = program.weights.get(name)
    theirs = source.weights[name]
    if own is None or own.ndim < 2 or own.shape != theirs.shape:
        return False
    return torch.equal(own, theirs.to(own.device))


def require_windows(token_ids: Tensor, window: int, vocab_size: int) -> Tensor:
    """Return the text as windows without overlap, int64 `[N, window]`, two at least.

    Raises:
        KvxformError: KVX704 if the text is too short, or of another vocabulary.
    """
    if token_ids.ndim != 1 or len(token_ids) < 2 * window or window < 2:
        rule = f"the text must have two windows of {window} tokens or more"
        hint = "take a longer text or a smaller --window"
        raise KvxformError("KVX704", rule, where=WHERE, got=len(token_ids), hint=hint)
    if int(token_ids.min()) < 0 or int(token_ids.max()) >= vocab_size:
        rule = f"tokens must be between 0 and {vocab_size - 1}"
        raise KvxformError("KVX704", rule, where=WHERE, got=int(token_ids.max()))
    count = len(token_ids) // window
    return token_ids[: count * window].view(count, window)


def _refuse(rule: str, got: str) -> NoReturn:
    rule = f"the source must be the model that the artifact was made from: {rule}"
    hint = "give the MODEL that `kvxform optimize` was given"
    raise ArtifactError("KVX606", rule, where=WHERE, got=got, hint=hint)
