"""What the graph file says about itself: versions, level, recipe."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import onnx_ir as ir

from kvxform.codegen.onnx.capability import takes_padding
from kvxform.codegen.onnx.forms import Form
from kvxform.ir.plan import CachePlan


def label_model(model: ir.Model, plan: CachePlan, recipe: Any, form: Form) -> None:
    """Enter the metadata of the graph file.

    Args:
        model: What is labelled.
        plan: What is cached.
        recipe: A `kvxform.recipe.Recipe`, or None.
        form: What the package is.
    """
    model.producer_name, model.producer_version = "kvxform", metadata.version("kvxform")
    model.metadata_props.update(
        {
            "kvxform.cache": form.cache,
            "kvxform.ir_version": str(model.ir_version),
            "kvxform.level": form.level,
            "kvxform.logits": form.logits,
            "kvxform.minimum_onnxruntime": form.runtime,
            "kvxform.opset": str(form.opset),
            "kvxform.padding": padding_of(plan, form),
            "kvxform.provider": form.provider,
            "kvxform.recipe": "none" if recipe is None else str(recipe.name),
            "kvxform.weights": form.weights,
        }
    )


def padding_of(plan: CachePlan, form: Form) -> str:
    """Return on which side rows of a batch may be padded: `left`, `right` or `none`."""
    if form.cache != "grow":
        return "right" if form.cache == "buffer" else "none"
    return "left" if takes_padding(plan) else "none"
