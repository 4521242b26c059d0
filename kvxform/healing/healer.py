"""Healing of one program: attentions alone, then the whole model, measured before and after.

Source: layer-wise reconstruction, CSKV, arXiv 2409.10593, section 2.2; the divergence from the
source as a loss, arXiv 1503.02531.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from kvxform.evaluate.perplexity import evaluate
from kvxform.evaluate.runners import Remembered, SessionRunner
from kvxform.healing.checkpoints import load_checkpoint
from kvxform.healing.checks import require_source, require_touched, require_windows
from kvxform.healing.options import HealOptions
from kvxform.healing.parameters import Parameters
from kvxform.healing.tasks import LocalTask, LogitsTask
from kvxform.healing.training import Batches, Schedule, Stage, train
from kvxform.healing_record import HealedLayer, HealedQuality, HealingRecord
from kvxform.ir.program import Program
from kvxform.runtime.model import OptimizedModel

HELD_OUT = 8  # windows that are measured on, at most; at most a tenth of the text, one at least


def heal_program(
    program: Program,
    source: Program,
    token_ids: Tensor,
    options: HealOptions,
    *,
    text: str = "token ids",
    checkpoint: Path | None = None,
    resume: bool = False,
    talk: Callable[[str], None] | None = None,
) -> tuple[Program, HealingRecord]:
    """Train what structure passes touched, and measure before and after.

    Args:
        program: What is healed; it is not changed.
        source: The program it was made from, on the same device.
        token_ids: Text without labels, int64 `[n]`; its last windows are only measured on.
        options: How.
        text: What the text is called in the record.
        checkpoint: Where the state of the run is kept while it runs, or None.
        resume: Go on from that file if it is there.
        talk: Takes lines of progress.

    Returns:
        The healed program and the record. Where training made the divergence on held-out text
        larger, the weights are those that came in, and the record says so.

    Raises:
        ArtifactError: KVX605 if there is nothing to heal, KVX606 for another source, KVX607 for a
            checkpoint of another run.
        KvxformError: KVX704 for a text that is too short.
    """
    require_touched(program)
    require_source(program, source)
    device = next(iter(program.weights.values())).device
    windows = require_windows(token_ids, options.window, program.info.vocab_size).to(device)
    held = max(1, min(HELD_OUT, len(windows) // 10))
    training, kept = windows[:-held], windows[-held:]
    say = talk if talk is not None else _say_nothing
    parameters = Parameters(program, options.rank, options.seed)
    local, logits = LocalTask(program, source, parameters.names), LogitsTask(program, source)
    run = _identity(options, training, parameters)
    start = load_checkpoint(checkpoint, run) if checkpoint is not None and resume else None
    say("heal: before")
    judge = _Judge(source, local, kept)
    before = judge(program)
    stages = [
        Stage("attentions", options.steps_local if local.layers else 0, local.loss),
        Stage("logits", options.steps, logits.loss),
    ]
    schedule = Schedule(options.rate, options.batch_size, options.seed, options.every)
    batches = Batches(training, options.batch_size, options.seed)
    train(parameters, stages, batches, schedule, run=run, start=start, path=checkpoint, talk=say)
    healed = dataclasses.replace(program.clone(), weights=parameters.merged())
    say("heal: after")
    after, notes = judge(healed), [local.note] if local.note else []
    if not after.quality.kl < before.quality.kl:
        notes.append(f"weights are as they were: training led to a KL of {after.quality.kl:.3g}")
        healed, after = program, before
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    record = HealingRecord(
        text=text,
        steps_local=stages[0].steps,
        steps=options.steps,
        learning_rate=options.rate,
        rank=options.rank,
        seed=options.seed,
        batch_size=batches.size,
        window=options.window,
        weights=len(parameters.names),
        parameters=parameters.count,
        trained_windows=len(training),
        held_out_windows=held,
        source_perplexity=judge.source_perplexity,
        before=before.quality,
        after=after.quality,
        layers=_layers(local, before, after),
        notes=tuple(notes),
    )
    return healed, record


@dataclass(frozen=True)
class _Standing:
    """What was measured of a program: all of it, and its attentions alone."""

    quality: HealedQuality
    errors: list[float]


class _Judge:
    """Measures programs, cache and codecs included, on windows that nothing was trained on."""

    def __init__(self, source: Program, local: LocalTask, windows: Tensor) -> None:
        self._local, self._windows = local, windows
        self._source = Remembered(SessionRunner(OptimizedModel(source), windows.shape[1]))
        self.source_perplexity = float("nan")

    def __call__(self, program: Program) -> _Standing:
        count, window = self._windows.shape
        found = evaluate(
            SessionRunner(OptimizedModel(program), window),
            self._windows.flatten(),
            window=window,
            windows=count,
            reference=self._source,
        )
        assert found.kl is not None, "there is a reference"
        assert found.top1_agreement is not None, "there is a reference"
        assert found.reference_perplexity is not None, "there is a reference"
        self.source_perplexity = found.reference_perplexity
        quality = HealedQuality(found.perplexity, found.kl, found.top1_agreement)
        return _Standing(quality, self._local.errors(program.weights, self._windows))


def _layers(local: LocalTask, before: _Standing, after: _Standing) -> tuple[HealedLayer, ...]:
    errors = zip(local.layers, before.errors, after.errors, strict=True)
    return tuple(HealedLayer(*layer) for layer in errors)


def _identity(options: HealOptions, training: Tensor, parameters: Parameters) -> str:
    """Return a hash of all that decides how a run goes."""
    digest = hashlib.sha256(repr(options).encode())
    for name, tensor in (("text", training), *parameters.tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _say_nothing(_: str) -> None:
    return None
