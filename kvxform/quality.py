"""Quality per true bit: one source model, and every cache format that is measured against it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvxform.calibrate import CalibrationLike, make_calibration
from kvxform.calibrate.sources import LONGEST_WINDOW
from kvxform.capture import capture, open_source
from kvxform.errors import KvxformError
from kvxform.evaluate.peers import PEERS, PREFIX, find_peer, is_installed
from kvxform.evaluate.scorecard import Bench, Effort, Subject, heading
from kvxform.ir.calibration import Calibration
from kvxform.order import plan_passes
from kvxform.pipeline import run_pipeline
from kvxform.recipe import Recipe, RecipeLike, bundled_recipes, load_recipe
from kvxform.runtime.loading import move_program, parse_device
from kvxform.runtime.model import OptimizedModel
from kvxform.texts import read_text
from kvxform.tokenizer import load_tokenizer

SOURCE = "source"
ALL = "all"


class QualityRun:
    """A source model, opened and captured once; `measure` takes one format at a time.

    Args:
        model: `smollm2-135m`, a Hugging Face folder or a .gguf file.
        effort: How much is measured.
        text: UTF-8 file that is measured on; help topics of the standard library by default.
        calibration: What statistics are collected on, as for `kvxform.optimize`.
        tokenizer: Folder of the tokenizer; that of the model by default.

    Raises:
        KvxformError: KVX801 if there is no tokenizer, and all of the library's.
    """

    def __init__(
        self,
        model: str,
        effort: Effort,
        *,
        text: Path | None = None,
        calibration: CalibrationLike = None,
        tokenizer: Path | None = None,
    ) -> None:
        words_to_measure = read_text(text)
        opened = open_source(model)
        path = opened.info.tokenizer_path if tokenizer is None else str(tokenizer)
        words = load_tokenizer(path)
        if words is None or not isinstance(opened.model, nn.Module):
            rule = "a quality table needs a model with a tokenizer"
            raise KvxformError("KVX801", rule, got=repr(model))
        program = capture(opened.model, name=opened.info.name).program
        info = dataclasses.replace(program.info, tokenizer_path=path)
        self._module, self._program = opened.model, dataclasses.replace(program, info=info)
        self._given = calibration
        self._calibrations: dict[tuple[object, ...], Calibration] = {}
        self._gradients = False  # whether some format will ask for them
        self._bench = Bench(opened.model, words, words_to_measure, effort)

    def move(self, device: str | torch.device) -> None:
        """Let everything that follows run on `device`."""
        place = parse_device(device)
        assert place is not None, "a device is given"
        self._module.to(place)
        self._program = move_program(self._program, place)

    def expect(self, names: Iterable[str]) -> None:
        """Say which formats will come, so that what they need is collected at once for all."""
        recipes = [load_recipe(name) for name in names if is_recipe(name)]
        self._gradients = any(self._needs(recipe)[1] for recipe in recipes)

    def open(self, name: str) -> Subject:
        """Return `source`, a peer (`hf-...`), or a recipe (bundled name or file) to be measured.

        Raises:
            KvxformError: As for `kvxform.optimize`; KVX801 for a peer that is not installed.
        """
        if name == SOURCE:
            return self._bench.source()
        if name.startswith(PREFIX):
            return self._bench.peer(name)
        return self._bench.recipe(name, self.optimize(name))

    def measure(self, subject: Subject, *parts: str) -> dict[str, Any]:
        """Return parts of the scorecard of a format as plain data, all of them by default."""
        return {**heading(subject), **self._bench.measure(subject, parts)}

    def optimize(self, recipe: RecipeLike) -> OptimizedModel:
        """Return the model under a recipe; nothing is verified on the way."""
        loaded = load_recipe(recipe)
        program, report = run_pipeline(
            self._program,
            loaded,
            executor=OptimizedModel,
            verify="none",
            calibration=self._calibration_for(loaded),
        )
        return OptimizedModel(program, report=report)

    def _needs(self, recipe: Recipe) -> tuple[bool, bool]:
        """Return whether passes of `recipe` need statistics, and gradients."""
        steps = plan_passes(recipe.passes, self._program.facts, auto_order=recipe.auto_order)
        passes = [step.graph_pass for step in steps]
        return any(p.needs_calibration for p in passes), any(p.needs_fisher for p in passes)

    def _calibration_for(self, recipe: Recipe) -> Calibration | None:
        """Return the statistics that `recipe` asks for; those of an earlier one if they fit."""
        is_needed, needs_fisher = self._needs(recipe)
        if not is_needed:
            return None
        wanted = recipe.calibration
        longest = self._program.info.context_length or LONGEST_WINDOW
        window = wanted.window or min(LONGEST_WINDOW, longest)
        key = (wanted.tokens, window, wanted.seed)
        found = self._calibrations.get(key)
        if found is None or (needs_fisher and not found.has_gradients):
            found = make_calibration(
                self._program,
                self._given,
                tokens=wanted.tokens,
                window=window,
                seed=wanted.seed,
                fisher=self._gradients or needs_fisher,
            )
        self._calibrations[key] = found
        return found


def is_recipe(name: str) -> bool:
    """Return whether a format is a recipe, neither the source nor a peer."""
    return name != SOURCE and not name.startswith(PREFIX)


def check_names(names: Iterable[str]) -> None:
    """Refuse formats that cannot be measured, before any work.

    Raises:
        KvxformError: KVX101 or KVX801 for an unknown one, KVX801 for a peer that is not installed.
    """
    for name in names:
        if is_recipe(name):
            load_recipe(name)
        elif name != SOURCE:
            find_peer(name)


def expand_names(names: str) -> list[str]:
    """Return formats from a list with commas; `all` is the source, recipes and installed peers."""
    found: list[str] = []
    for name in filter(None, (name.strip() for name in names.split(","))):
        if name == ALL:
            peers = [peer for peer, setting in PEERS.items() if is_installed(setting)]
            found += [SOURCE, *bundled_recipes(), *peers]
        else:
            found.append(name)
    return list(dict.fromkeys(found))
