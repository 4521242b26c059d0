"""Every node of a package for CUDA has a CUDA kernel, told without a GPU.

Needs gcc, and in `KVXFORM_ORT_GPU` a folder made by `pip install --no-deps --target FOLDER
onnxruntime-gpu` for this Python.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from buffer_graphs import write_graph
from cuda_placement import place
from onnx_forms import FORMS, export_recipe

from kvxform.runtime.onnx_runtime import SIZE_OPS

RECIPES = (
    *("onnx-fp16", "onnx-int8", "onnx-int4", "kivi2", "kvx-3", "kvquant-3", "zipcache"),
    *("turboquant-3", "octopus-3", "fibquant-3"),
)
SITE = os.environ.get("KVXFORM_ORT_GPU")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SITE, reason="KVXFORM_ORT_GPU names no folder with onnxruntime-gpu"),
]


@pytest.fixture(scope="module")
def placed(tmp_path_factory):
    """What the runtime says of each form, by name and kind of logits; one process for all."""
    top = tmp_path_factory.mktemp("forms")
    keys = [(name, logits) for name in FORMS for logits in ("all", "last")]
    folders = [FORMS[n].export(top / f"{n} {logits}", "cuda", logits) for n, logits in keys]
    found = place(Path(str(SITE)), [folder / "model.onnx" for folder in folders])
    caches = [json.loads((f / "kvxform.json").read_text())["onnx"]["cache"] for f in folders]
    return {key: (cache, x) for key, cache, x in zip(keys, caches, found, strict=True)}


@pytest.mark.parametrize("logits", ["all", "last"])
@pytest.mark.parametrize("name", FORMS)
def test_no_node_falls_back(name, logits, placed):
    cache, found = placed[name, logits]
    assert "error" not in found, found
    assert found["nodes"] > 30
    assert set(found["off"]) <= SIZE_OPS
    assert found["captures"] or cache == "grow", "steps over buffers and blocks can be CUDA graphs"


def test_recipes_stay_on_the_gpu(tmp_path):
    graphs = [export_recipe(name, tmp_path / name) / "model.onnx" for name in RECIPES]
    for name, found in zip(RECIPES, place(Path(str(SITE)), graphs), strict=True):
        assert "error" not in found, (name, found)
        assert set(found["off"]) <= SIZE_OPS, name


def test_a_node_without_a_kernel_is_seen(tmp_path):
    folder = write_graph(tmp_path)  # GroupQueryAttention in float32
    (found,) = place(Path(str(SITE)), [folder / "model.onnx"])
    assert "GroupQueryAttention" in found["off"]
    assert not found["captures"]
