"""One row of the table of ONNX forms: every form of one family, and why not.

A form holds if its package continues a ragged batch with the tokens of the eager lowering of the
same program. The eager lowering itself is held to the unrewritten model by `family_rows`. Of a
lossy cache a row may part from it where two tokens are all but equal: rounding moves one code in
some ten thousand, and that decides.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from families import Family
from family_checks import Subject, ragged_prompts, token_ids
from torch import Tensor

from kvxform.codegen.onnx import export_onnx
from kvxform.codegen.onnx.forms import OnnxOptions, legal_levels
from kvxform.pipeline import run_pipeline
from kvxform.recipe import load_recipe
from kvxform.runtime.model import OptimizedModel
from kvxform.runtime.onnx_session import OnnxSession
from kvxform.verify.cache_state import is_lossy

NEW_TOKENS = 16
TIE = 0.01  # of the largest logit; a lead up to here may be turned by one code
STATIC = {"codec": "static-int", "bits": 8}
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "exact": {"passes": ["insert-cache"]},
    "kv4": load_recipe("kv4").to_data(),
    "int8": {"passes": ["insert-cache", {"quantize-kv": {"key": STATIC, "value": STATIC}}]},
}


@dataclass(frozen=True)
class FormCase:
    """A column of the table.

    Attributes:
        name: Its head.
        recipe: Key of `RECIPES`.
        level: Emission level.
        opset: Version of the default domain.
    """

    name: str
    recipe: str
    level: str
    opset: int

    @property
    def options(self) -> OnnxOptions:
        """What is asked of the export."""
        return OnnxOptions(level=self.level, opset=self.opset)  # type: ignore[arg-type]


CASES = (
    FormCase("L0 18", "exact", "L0", 18),
    FormCase("L1 23", "exact", "L1", 23),
    FormCase("L1 24", "exact", "L1", 24),
    FormCase("L3", "exact", "L3", 24),
    FormCase("L0 18 kv4", "kv4", "L0", 18),
    FormCase("L2 23 kv4", "kv4", "L2", 23),
    FormCase("L2 24 kv4", "kv4", "L2", 24),
    FormCase("L5 kv4", "kv4", "L5", 23),
    FormCase("L3 int8", "int8", "L3", 24),
)
COLUMNS = tuple(case.name for case in CASES)


@dataclass
class OnnxRow:
    """What one family showed.

    Attributes:
        name: The family.
        failed: By column, the first thing that failed.
        illegal: By column, the rule that the family is outside of.
    """

    name: str
    failed: dict[str, str] = field(default_factory=dict)
    illegal: dict[str, str] = field(default_factory=dict)

    @property
    def cells(self) -> tuple[str, ...]:
        """The cells of `COLUMNS`: `yes`, `-` if the form is not legal, `no` if it fails."""
        return tuple(
            "no" if name in self.failed else "-" if name in self.illegal else "yes"
            for name in COLUMNS
        )


def measure(family: Family) -> OnnxRow:
    """Export one family in every form and run all of it."""
    row = OnnxRow(family.name)
    try:
        subject = Subject.of(family, torch.float32)
    except Exception as error:  # a table must be able to quote any failure
        row.failed |= dict.fromkeys(COLUMNS, _reason(error))
        return row
    for recipe in RECIPES:
        cases = [case for case in CASES if case.recipe == recipe]
        try:
            model = optimise(subject, recipe)
            tokens = continued(model)
        except Exception as error:
            row.failed |= dict.fromkeys((case.name for case in cases), _reason(error))
            continue
        for case in cases:
            _measure_form(row, case, model, tokens)
    return row


def _measure_form(row: OnnxRow, case: FormCase, model: OptimizedModel, tokens: Tensor) -> None:
    reason = dict(legal_levels(model.program, case.options))[case.level]  # type: ignore[index]
    if reason is not None:
        row.illegal[case.name] = reason
        return
    try:
        check_form(case, model, tokens)
    except Exception as error:
        row.failed[case.name] = _reason(error)


def optimise(subject: Subject, recipe: str) -> OptimizedModel:
    """Return the model after one of `RECIPES`; statistics are collected on random tokens."""
    data = {"version": 1, "name": recipe, **RECIPES[recipe], "bounds": {}}
    program, _ = run_pipeline(
        subject.program,
        load_recipe(data),
        executor=OptimizedModel,
        verify="none",
        calibration=token_ids(4, 64, seed=9),
    )
    return OptimizedModel(program)


def continued(model: OptimizedModel | OnnxSession) -> Tensor:
    """Return the greedy tokens of a ragged batch, int64 `[B, NEW_TOKENS]`."""
    prompts, mask = ragged_prompts("left")
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "eos_token_id": ()}
    return model.generate(prompts, mask, **options)[:, prompts.shape[1] :]


def leads(model: OptimizedModel, tokens: Tensor) -> Tensor:
    """Return by how much each token led, `[B, NEW_TOKENS]`, as a share of the largest logit."""
    prompts, mask = ragged_prompts("left")
    whole = torch.cat([prompts, tokens], 1), torch.cat([mask, torch.ones_like(tokens)], 1)
    logits = model(*whole)[:, prompts.shape[1] - 1 : -1]
    best = logits.topk(2, -1).values
    return (best[..., 0] - best[..., 1]) / logits.abs().amax(-1)


def check_form(case: FormCase, model: OptimizedModel, tokens: Tensor) -> None:
    """Export a model in one form; its package continues with `tokens`."""
    with tempfile.TemporaryDirectory() as folder:
        package = export_onnx(model.program, Path(folder, "package"), case.options)
        found = continued(OnnxSession(package, threads=1))
    same = (found == tokens).long().cumprod(1).sum(1).tolist()
    assert model.plan is not None, "the model has a cache"
    bound = TIE if is_lossy(model.plan, model.program.dtype) else 0.0
    for row, count in enumerate(same):
        lead = 0.0 if count == NEW_TOKENS else float(leads(model, tokens)[row, count])
        text = f"tokens of row {row} part after {count}, at a lead of {lead:.0e}"
        assert count == NEW_TOKENS or lead <= bound, text


def _reason(error: Exception) -> str:
    text = re.sub(r"/tmp/\S*/", "", str(error).strip())  # a folder of this run alone
    return next(iter(text.splitlines()), type(error).__name__)
