"""Both sides run: on what inputs, what they give, and what they write after the same prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvxform.differ.row_caches import compare_rows
from kvxform.differ.sides import Side
from kvxform.diffing.caches import cache_lengths, compare_caches
from kvxform.diffing.numeric import Pairs, compare_runs, default_probe
from kvxform.diffing.records import NumericDiff, TextDiff
from kvxform.diffing.symptoms import CacheDiff
from kvxform.diffing.walking import WalkingModel
from kvxform.errors import KvxformError
from kvxform.runtime.inputs import make_batch
from kvxform.texts import encode_text
from kvxform.verify.probe import Probe, make_probe
from kvxform.verify.protocols import ModelLike

InputsLike = Tensor | tuple[Tensor, Tensor] | Probe | str | None
LENGTHS = (40, 12, 24)  # of random rows, where neither side can write a text itself
WINDOW = 256  # tokens of a text that both sides are run on
FEWEST, SHORTEST = 2, 5  # sequences, and tokens of each, for a comparison of caches
PROMPT = "The first thing to know about a cache is"
PROMPT_TOKENS = 8  # of random tokens, where there is no tokenizer


def run_sides(a: Side, b: Side, inputs: InputsLike, pairs: Pairs) -> NumericDiff:
    """Run both sides, which have a model, on the same inputs.

    Args:
        a: The first side.
        b: The second one.
        inputs: See `make_inputs`.
        pairs: Layers that belong together, (layer of A, layer of B).

    Raises:
        KvxformError: KVX822 for inputs that cannot be used.
    """
    assert a.model is not None, "asked for only where both run"
    assert b.model is not None, "asked for only where both run"
    probe, words = make_inputs(inputs, a, b)
    caches = None
    if a.whole is not None and b.whole is not None and a.whole.plan and b.whole.plan:
        has_rows = a.onnx is not None or b.onnx is not None
        compare = compare_rows if has_rows else _compare_caches
        caches = compare(a.whole, b.whole, _cache_probe(a.whole, b.whole, probe), pairs)
    return compare_runs(a.model, b.model, probe, pairs=pairs, caches=caches, words=words)


def make_inputs(inputs: InputsLike, a: Side, b: Side) -> tuple[Probe, str]:
    """Return what both sides are run on, and what that is in words (empty for text by A).

    Args:
        inputs: Token ids `[B, S]`, alone or with a mask `[B, S]`; a probe; a text for the tokenizer
            of one of the sides; or None for text that A writes itself.
        a: The first side.
        b: The second one.

    Raises:
        KvxformError: KVX822 for inputs that cannot be used.
    """
    vocab = _vocab_size(a, b)
    if isinstance(inputs, Probe):
        return inputs, _words("given", inputs)
    if isinstance(inputs, str):
        ids = _encode(inputs, a, b)[:WINDOW]
        if not len(ids):
            raise _refuse("a text to compare on must have tokens", repr(inputs))
        return Probe(ids[None], (len(ids),)), f"a given text, {len(ids)} tokens"
    if inputs is not None:
        return _given(inputs, vocab)
    if a.whole is not None and b.whole is not None:
        return default_probe(a.whole, b.whole), ""
    probe = make_probe(vocab, LENGTHS)
    return probe, _words("random", probe)


def compare_texts(a: Side, b: Side, tokens: int) -> TextDiff | None:
    """Return what both sides write after the same prompt, greedily.

    Args:
        a: The first side.
        b: The second one.
        tokens: How many tokens they write.

    Returns:
        None if one of them cannot run.
    """
    if a.model is None or b.model is None:
        return None
    tokenizer = a.load_tokenizer() or b.load_tokenizer()
    if tokenizer is None:
        ids = make_probe(_vocab_size(a, b), (PROMPT_TOKENS,)).input_ids
    else:
        ids = encode_text(tokenizer, PROMPT)[None]
    written = [_write(side, ids, tokens) for side in (a, b)]
    pairs = zip(*written, strict=True)
    parted = next((i for i, (x, y) in enumerate(pairs) if x != y), None)
    prompt, before, after = (_decode(tokenizer, t) for t in (ids[0].tolist(), *written))
    return TextDiff(prompt, before, after, parted)


def _cache_probe(a: ModelLike, b: ModelLike, probe: Probe) -> Probe:
    """Return the probe, or random tokens if it has too few sequences to compare caches on."""
    if len(probe.lengths) >= FEWEST and min(probe.lengths) >= SHORTEST:
        return probe
    vocab = min(a.program.info.vocab_size, b.program.info.vocab_size)
    return make_probe(vocab, cache_lengths(a, b))


def _compare_caches(a: ModelLike, b: ModelLike, probe: Probe, pairs: Pairs) -> CacheDiff:
    # The same runtime on both sides has the same faults: graph, plan and weights say what differs.
    is_same_runtime = isinstance(a, WalkingModel) and isinstance(b, WalkingModel)
    return compare_caches(a, b, probe, pairs=pairs, symptoms=not is_same_runtime)


def _given(inputs: Tensor | tuple[Tensor, Tensor], vocab: int) -> tuple[Probe, str]:
    ids, mask = (inputs, None) if isinstance(inputs, Tensor) else inputs
    try:
        batch = make_batch(ids, mask, vocab)
    except KvxformError as error:
        raise _refuse(error.rule, error.got) from error
    probe = Probe(batch.input_ids, tuple(batch.counts))
    return probe, _words("given", probe)


def _words(kind: str, probe: Probe) -> str:
    return f"{kind} tokens, rows of {', '.join(map(str, probe.lengths))} tokens"


def _vocab_size(a: Side, b: Side) -> int:
    """Return the number of tokens that both sides know."""
    sizes = [side.vocab_size for side in (a, b) if side.vocab_size is not None]
    if not sizes:
        rule = "the vocabulary of one side must be known"
        raise _refuse(rule, "none", "run the diff without numbers")
    return min(sizes)


def _encode(text: str, a: Side, b: Side) -> Tensor:
    tokenizer = a.load_tokenizer() or b.load_tokenizer()
    if tokenizer is None:
        raise _refuse("a text needs a side with a tokenizer", "none", "give token ids")
    return encode_text(tokenizer, text)


def _decode(tokenizer: Any, tokens: list[int]) -> str:
    if tokenizer is None:
        return " ".join(map(str, tokens))
    return str(tokenizer.decode(tokens))


def _write(side: Side, ids: Tensor, tokens: int) -> list[int]:
    """Return the likeliest tokens after `ids` `[1, S]`, one by one."""
    model = side.whole
    found: list[int] = []
    if model is not None and model.plan is not None:
        session = model.new_session(max_batch_size=1, max_seq_len=ids.shape[1] + tokens)
        logits = session.prefill(ids)
        for _ in range(tokens):
            token = logits.argmax(-1)
            found.append(int(token))
            logits = session.decode(token)
        return found
    assert side.model is not None, "checked"
    for _ in range(tokens):
        token = side.model(ids)[:, -1].argmax(-1)
        found.append(int(token))
        ids = torch.cat([ids, token[:, None]], 1)
    return found


def _refuse(rule: str, got: object, hint: str = "") -> KvxformError:
    return KvxformError("KVX822", rule, where="diff", got=got, hint=hint)
