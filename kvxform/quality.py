"""Quality per true bit: one source model, and every cache format that is measured against it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from kvxform.calibrate import CalibrationLike, make_calibration
from kvxform.capture import capture, open_source
from kvxform.errors import KvxformError
from kvxform.evaluate.peers import PEERS, PREFIX, is_installed
from kvxform.evaluate.scorecard import Bench, Effort, Scorecard
from kvxform.ir.calibration import Calibration
from kvxform.order import plan_passes
from kvxform.pipeline import run_pipeline
from kvxform.recipe import Recipe, RecipeLike, bundled_recipes, load_recipe
from kvxform.runtime.loading import move_program, parse_device
from kvxform.runtime.model import OptimizedModel
from kvxform.texts import encode_text, read_text
from kvxform.tokenizer import load_tokenizer

SOURCE = "source"
ALL = "all"
Tell = Callable[[str], None]


class QualityRun:
    """A source model, opened and captured once; `measure` takes one format at a time.

    Args:
        model: `smollm2-135m`, a Hugging Face folder or a .gguf file.
        effort: How much is measured.
        text: UTF-8 file that is measured on; help topics of the standard library by default.
        calibration: What statistics are collected on, as for `kvxform.optimize`.
        tokenizer: Folder of the tokenizer; that of the model by default.
        device: Where everything runs; the CPU by default.
        tell: Called with a word before each part.

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
        device: str | torch.device | None = None,
        tell: Tell | None = None,
    ) -> None:
        self._tell = tell or (lambda part: None)
        words_to_measure = read_text(text)
        self._tell("reading the model")
        opened = open_source(model)
        path = opened.info.tokenizer_path if tokenizer is None else str(tokenizer)
        words = load_tokenizer(path)
        if words is None or not isinstance(opened.model, torch.nn.Module):
            rule = "a quality table needs a model with a tokenizer"
            raise KvxformError("KVX801", rule, got=repr(model))
        place = torch.device("cpu") if device is None else parse_device(device)
        program = capture(opened.model, name=opened.info.name).program
        info = dataclasses.replace(program.info, tokenizer_path=path)
        self._program = move_program(dataclasses.replace(program, info=info), place)
        self._given = calibration
        self._calibrations: dict[tuple[object, ...], Calibration] = {}
        tokens = encode_text(words, words_to_measure)
        self._bench = Bench(opened.model.to(place), words, tokens, effort, self._tell)

    def measure(self, name: str) -> Scorecard:
        """Measure `source`, a peer (`hf-...`), or a recipe: a bundled name or a file.

        Raises:
            KvxformError: As for `kvxform.optimize`; KVX801 for a peer that is not installed.
        """
        if name == SOURCE:
            return self._bench.measure_source()
        if name.startswith(PREFIX):
            return self._bench.measure_peer(name)
        return self._bench.measure_model(name, self.optimize(name))

    def optimize(self, name: RecipeLike) -> OptimizedModel:
        """Return the model under a recipe; nothing is verified on the way."""
        recipe = load_recipe(name)
        calibration = self._calibrate(recipe)
        self._tell("passes")
        program, report = run_pipeline(
            self._program, recipe, executor=OptimizedModel, verify="none", calibration=calibration
        )
        return OptimizedModel(program, report=report)

    def _calibrate(self, recipe: Recipe) -> Calibration | None:
        """Return the statistics that the passes of `recipe` ask for; alike ones are kept."""
        steps = plan_passes(recipe.passes, self._program.facts, auto_order=recipe.auto_order)
        if not any(step.graph_pass.needs_calibration for step in steps):
            return None
        wanted = recipe.calibration
        fisher = any(step.graph_pass.needs_fisher for step in steps)
        key = (wanted.tokens, wanted.window, wanted.seed, fisher)
        if key not in self._calibrations:
            self._tell("calibration")
            self._calibrations[key] = make_calibration(
                self._program,
                self._given,
                tokens=wanted.tokens,
                window=wanted.window,
                seed=wanted.seed,
                fisher=fisher,
            )
        return self._calibrations[key]


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
