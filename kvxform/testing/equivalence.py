"""`assert_equivalent`: two models give the same logits, whatever they are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from kvxform.differ.comparing import diff
from kvxform.differ.sides import SideLike, open_side
from kvxform.diffing.render_text import render_text
from kvxform.errors import KvxformError
from kvxform.ir.rounding import coarsest
from kvxform.verify.probe import Difference, Reference, make_probe
from kvxform.verify.tolerances import tolerance_for

LENGTHS = (17, 17)  # tokens of the random rows that models run on


def assert_equivalent(
    a: SideLike,
    b: SideLike,
    *,
    inputs: Tensor | None = None,
    rtol: float | None = None,
    max_kl: float | None = None,
) -> None:
    """Assert that two models give the same logits on the same tokens.

    Args:
        a: What is right: an `nn.Module`, which runs as it is; or a `Program`, an `OptimizedModel`,
            or the path of an artifact or ONNX package.
        b: What is checked, likewise.
        inputs: Token ids, int64 `[B, S]` without padding; by default 2 x 17 random ones.
        rtol: Largest difference allowed, as a share of the largest logit; by default what rounding
            explains in the coarser dtype of both (`verify.tolerances`).
        max_kl: Instead, or too: the largest mean KL divergence in nats, for models that round
            their cache.

    Raises:
        AssertionError: With where they part, layer by layer.
        KvxformError: KVX820 if a side cannot run, KVX822 if nobody knows the vocabulary.
    """
    __tracebackhide__ = True
    sides = _Runner(a), _Runner(b)
    ids = _random_ids(*sides) if inputs is None else inputs
    with torch.inference_mode():
        logits = [side.run(ids).flatten(0, 1) for side in sides]
    if logits[0].shape != logits[1].shape:
        shapes = " and ".join(str([*ids.shape, x.shape[-1]]) for x in logits)
        raise AssertionError(f"logits of both must have one shape, not {shapes}")
    found = Reference(logits[0]).compare(Reference(logits[1]))
    if rtol is None and max_kl is None:
        rtol = tolerance_for(coarsest(*(side.dtype for side in sides))).logits
    wrong = _complaints(found, rtol, max_kl)
    if wrong:
        raise AssertionError("\n".join([*wrong, "", _explain(a, b, ids)]))


class _Runner:
    """Something that gives logits, with its dtype and vocabulary."""

    def __init__(self, source: SideLike) -> None:
        self.vocab: int | None = None
        self._call: Callable[[Tensor], Tensor]
        if isinstance(source, nn.Module):
            first = next(source.parameters(), None)
            self.dtype = torch.float32 if first is None else first.dtype
            config = getattr(source, "config", None)
            self.vocab = getattr(config, "vocab_size", None)
            self._call = source
            return
        side = open_side(source, runs=True, talk=lambda _: None)
        if side.model is None or side.program is None:
            rule = "both sides must be able to run"
            raise KvxformError("KVX820", rule, where="assert_equivalent", got=side.kind)
        self.dtype, self.vocab = side.program.dtype, side.program.info.vocab_size
        self._call = side.model

    def run(self, ids: Tensor) -> Tensor:
        """Return logits `[B, S, vocab]`."""
        found = self._call(ids)
        logits: Tensor = getattr(found, "logits", found)
        return logits.cpu()


def _random_ids(*sides: _Runner) -> Tensor:
    sizes = [side.vocab for side in sides if side.vocab is not None]
    if not sizes:
        rule = "token ids must be given where no side knows its vocabulary"
        raise KvxformError("KVX822", rule, where="assert_equivalent", hint="give inputs=")
    return make_probe(min(sizes), LENGTHS).input_ids


def _complaints(found: Difference, rtol: float | None, max_kl: float | None) -> list[str]:
    wrong = []
    if rtol is not None and not found.relative <= rtol:
        what = "logits of B differ from those of A by"
        wrong.append(f"{what} {found.relative:.2e} of the largest logit; {rtol:.2e} is allowed")
    if max_kl is not None and not found.kl <= max_kl:
        wrong.append(f"KL of B from A is {found.kl:.2e} nats; {max_kl:.2e} is allowed")
    if wrong:
        wrong.append(f"{found.top1:.1%} of the likeliest tokens are the same")
    return wrong


def _explain(a: SideLike, b: SideLike, ids: Tensor) -> str:
    """Return the whole diff as text, or nothing where models cannot be captured."""
    with contextlib.suppress(KvxformError):
        return render_text(diff(a, b, inputs=ids, progress=False))
    return ""
