"""Progress on stderr: a bar on a terminal, a line per finished stage elsewhere, or nothing."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from kvxform.pipeline import Stage


class ProgressDisplay:
    """Shows what a run is doing; use as a context manager.

    Args:
        enabled: Show anything at all.
    """

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._bar: Progress | None = None
        self._step, self._since = "", 0.0
        if enabled and sys.stderr.isatty():
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description:<24}"),
                BarColumn(),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task("capture", total=None)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            self._end_step()

    def talk(self, text: str) -> None:
        """Show the step before the passes that begins now."""
        if self._bar is not None:
            self._bar.update(self._task, description=text)
            return
        self._end_step()
        self._step, self._since = text, time.perf_counter()

    def _end_step(self) -> None:
        if self._enabled and self._step:
            seconds = time.perf_counter() - self._since
            sys.stderr.write(f"kvxform: {self._step} {seconds:.1f} s\n")
        self._step = ""

    def show_stage(self, stage: Stage) -> None:
        """Show that a stage of the pipeline begins or has ended."""
        if self._bar is not None:
            done = stage.index + (stage.seconds is not None)
            self._bar.update(self._task, description=stage.name, total=stage.total, completed=done)
            return
        self._end_step()
        if self._enabled and stage.seconds is not None:
            place = f"[{stage.index + 1}/{stage.total}]"
            sys.stderr.write(f"kvxform: {place} {stage.name} {stage.seconds:.1f} s\n")
