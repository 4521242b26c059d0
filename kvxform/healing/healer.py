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
from kvxform.healing.checkpoints import Checkpoint, load_checkpoint
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
    run, say = _Run(program, source, windows, options), talk or _say_nothing
    start = load_checkpoint(checkpoint, run.identity) if checkpoint is not None and resume else None
    say("heal: before")
    before = run.judge(program)
    run.train(start, checkpoint, say)
    say("heal: after")
    healed = dataclasses.replace(program.clone(), weights=run.parameters.merged())
    after, notes = run.judge(healed), run.notes
    if not after.quality.kl < before.quality.kl:
        notes.append(f"weights are as they were: training led to a KL of {after.quality.kl:.3g}")
        healed, after = program, before
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return healed, run.record(text, before, after, tuple(notes))


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


class _Run:
    """What one run works with: texts, parameters, and what is minimised in which stage."""

    def __init__(
        self, program: Program, source: Program, windows: Tensor, options: HealOptions
    ) -> None:
        held = max(1, min(HELD_OUT, len(windows) // 10))
        self._training, self._held_out = windows[:-held], windows[-held:]
        self._options = options
        self.parameters = Parameters(program, options.rank, options.seed)
        self._local = LocalTask(program, source, self.parameters.names)
        logits = LogitsTask(program, source)
        self._stages = [
            Stage("attentions", options.steps_local if self._local.layers else 0, self._local.loss),
            Stage("logits", options.steps, logits.loss),
        ]
        self._batches = Batches(self._training, options.batch_size, options.seed)
        self.judge = _Judge(source, self._local, self._held_out)
        self.identity = _identity(options, self._training, self.parameters)

    @property
    def notes(self) -> list[str]:
        """What was left out, and why."""
        return [self._local.note] if self._local.note else []

    def train(
        self, start: Checkpoint | None, path: Path | None, talk: Callable[[str], None]
    ) -> None:
        """Train the parameters in place, from a checkpoint on if there is one."""
        options = self._options
        schedule = Schedule(options.rate, options.every)
        train(
            self.parameters,
            self._stages,
            self._batches,
            schedule,
            run=self.identity,
            start=start,
            path=path,
            talk=talk,
        )

    def record(
        self, text: str, before: _Standing, after: _Standing, notes: tuple[str, ...]
    ) -> HealingRecord:
        """Return what the report says of the run."""
        options = self._options
        errors = zip(self._local.layers, before.errors, after.errors, strict=True)
        return HealingRecord(
            text=text,
            steps_local=self._stages[0].steps,
            steps=options.steps,
            learning_rate=options.rate,
            rank=options.rank,
            seed=options.seed,
            batch_size=self._batches.size,
            window=options.window,
            weights=len(self.parameters.names),
            parameters=self.parameters.count,
            trained_windows=len(self._training),
            held_out_windows=len(self._held_out),
            source_perplexity=self.judge.source_perplexity,
            before=before.quality,
            after=after.quality,
            layers=tuple(HealedLayer(*layer) for layer in errors),
            notes=notes,
        )


def _identity(options: HealOptions, training: Tensor, parameters: Parameters) -> str:
    """Return a hash of all that decides how a run goes."""
    digest = hashlib.sha256(repr(options).encode())
    for name, tensor in (("text", training), *parameters.tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _say_nothing(_: str) -> None:
    return None
