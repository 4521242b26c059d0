"""A recipe with a search per layer, from the command line: text in, artifact and preset out."""

from __future__ import annotations

import json

import pytest
from checkpoints import write_llama

import kvxform
from kvxform.cli.main import main
from kvxform.texts import default_text

INT4 = {"codec": "int", "bits": 4}
RECIPE = {
    "version": 1,
    "name": "tuned",
    "calibration": {"tokens": 128, "window": 32, "seed": 2},
    "passes": [
        "insert-cache",
        "rotate-qk",
        {"quantize-kv": {"key": INT4, "value": INT4, "regions": {"sink": 2, "recent": 8}}},
        {"per-layer-bits": {"budget": 7, "method": "kvtuner", "tokens": 64, "trials": 8}},
    ],
}


@pytest.mark.slow
def test_optimize_calibrates_on_the_file_it_is_given(tmp_path, capsys):
    model, recipe, text = (tmp_path / name for name in ("model", "recipe.json", "words.txt"))
    write_llama(model, head_dim=16)
    recipe.write_text(json.dumps(RECIPE))
    text.write_text(default_text()[:2000])
    words = ["optimize", str(model), "-r", str(recipe), "-o", str(tmp_path / "out"), "--json"]
    assert main([*words, "--calibration", str(text)]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["calibration"].startswith("words.txt (")
    assert data["calibration"].endswith("4 x 32 tokens, seed 2")
    assert data["bits_per_value"] <= 7
    loaded = kvxform.load(tmp_path / "out")
    assert loaded.report.calibration == data["calibration"]
    assert data["calibration"] in loaded.report.to_html()
    assert "words.txt" not in (tmp_path / "out" / "plan.json").read_text(), "int needs no fitting"


@pytest.mark.slow
def test_optimize_takes_the_scales_of_a_file(tmp_path, capsys):
    model, scales, out = (tmp_path / name for name in ("model", "scales.json", "out"))
    write_llama(model, head_dim=16)
    layers = kvxform.optimize(model, "exact", verify="none", progress=False).plan.sites
    entries = {"k_scales": [0.5 + s.layer for s in layers], "v_scales": [0.25] * len(layers)}
    scales.write_text(json.dumps({"scales": entries, "qmax": 8.0}))
    words = ["optimize", str(model), "-r", "onnx-int8", "-o", str(out), "--json", "--onnx"]
    assert main([*words, "--kv-scales", str(scales)]) == 0
    assert "calibration" not in json.loads(capsys.readouterr().out), "no text was read"
    found = json.loads((out / "onnx" / "kv_cache_scales.json").read_text())
    assert found["qmax"] == 128.0
    assert found["scales"]["k_scales"] == [(0.5 + s.layer) / 16 for s in layers]
    assert main([*words, "--kv-scales", str(model / "config.json")]) == 2
    assert "KVX109 [config.json] a scale file must have scales" in capsys.readouterr().err
