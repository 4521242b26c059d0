"""Make the packages that `onnx_cpu.py` compares: ours, a plain export, those of GenAI's builder.

    python benchmarks/onnx_packages.py --folder out/onnx --only l3-int8,builder-fp32

A package that is there already is kept. All are made from one float32 checkpoint. Those of the
builder need `pip install onnxruntime-genai`; its int8 and int4 caches are calibrated by its own
tool, on its own texts.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from results import is_wanted

import kvxform
from kvxform.capture.smollm2 import smollm2_folder
from kvxform.onnx_options import Level, OnnxOptions

BUILDER = "builder-fp32"
MODEL = "smollm2-135m"
CALIBRATION_SEQUENCES = 8  # of 512 tokens, by the tool of the builder


def main() -> None:
    """Make what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="packages go into it")
    parser.add_argument("--only", default="", help="comma separated names; all by default")
    options = parser.parse_args()
    for name in PACKAGES:
        if is_wanted(name, options.only):
            make_package(name, options.folder)


def make_package(name: str, folder: Path) -> Path:
    """Make a package below `folder` unless it is there; return its path."""
    path = folder / name
    if not (path / "model.onnx").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"make {name}", file=sys.stderr, flush=True)
        PACKAGES[name](path)
    return path


def export_ours(path: Path, recipe: str, level: Level) -> None:
    """Export a recipe at a level, float32."""
    model = kvxform.optimize(MODEL, recipe, verify="none", progress=False)
    options = OnnxOptions(level=level, logits="all" if level == "L1" else "last")
    model.export_onnx(path, options, verify="none")  # tests verify; here it is time alone


def export_plain(path: Path) -> None:
    """Export with `torch.onnx.export` as its documentation shows, past and present as tensors."""
    from transformers import DynamicCache

    from kvxform.capture import load_source_module

    model = load_source_module(MODEL)
    config = model.config
    assert hasattr(config, "num_key_value_heads"), "a decoder of Hugging Face"

    class Step(torch.nn.Module):
        """One call of the model with the cache as lists of tensors."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self, input_ids: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]
        ) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
            cache = DynamicCache()
            for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
                cache.update(key, value, layer)
            logits = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True).logits
            return logits, [x.keys for x in cache.layers], [x.values for x in cache.layers]

    layers, dynamic = int(config.num_hidden_layers), torch.export.Dim.DYNAMIC
    head_dim = config.hidden_size // config.num_attention_heads
    past = [torch.zeros(2, int(config.num_key_value_heads), 5, head_dim) for _ in range(layers)]
    axes = {0: dynamic, 2: dynamic}
    program = torch.onnx.export(
        Step().eval(),
        (torch.zeros(2, 3, dtype=torch.int64), past, list(past)),
        dynamo=True,
        dynamic_shapes=({0: dynamic, 1: dynamic}, [axes] * layers, [axes] * layers),
    )
    assert program is not None, "dynamo"
    path.mkdir()
    program.save(str(path / "model.onnx"), external_data=True)


def build(path: Path, *more: str) -> None:
    """Run the model builder of ONNX Runtime GenAI for the CPU, float32."""
    own = ["-i", str(smollm2_folder()), "-o", str(path), "-p", "fp32", "-e", "cpu"]
    extra = ["--extra_options", *more] if more else []
    cache = ["-c", str(path.parent / "builder-cache")]
    _run("onnxruntime_genai.models.builder", *own, *cache, *extra)


def build_quantized(path: Path, scheme: str) -> None:
    """Calibrate a cache with the tool of the builder, then build."""
    base = make_package(BUILDER, path.parent)
    scales = path.parent / f"{path.name}-scales.json"
    _run(
        "onnxruntime_genai.models.quantization.kv_cache_calibration",
        *("--model", str(base), "--tokenizer", str(base), "--out", str(scales)),
        *("--quant-type", scheme, "--num-seqs", str(CALIBRATION_SEQUENCES)),
    )
    build(path, f"kv_cache_quant_scheme={scheme}", f"kv_cache_scale_file={scales}")


def _run(module: str, *arguments: str) -> None:
    """Run a module in a process of its own.

    Raises:
        RuntimeError: With the last line that it prints, if it fails.
    """
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = next(iter(done.stderr.strip().splitlines()[-1:]), "")
        raise RuntimeError(f"{module} failed: {last}")


PACKAGES: dict[str, Callable[[Path], None]] = {
    "plain": export_plain,
    "l1": lambda path: export_ours(path, "onnx-fp16", "L1"),
    "l3": lambda path: export_ours(path, "onnx-fp16", "L3"),
    "l3-int8": lambda path: export_ours(path, "onnx-int8", "L3"),
    "l3-int4": lambda path: export_ours(path, "onnx-int4", "L3"),
    BUILDER: build,
    "builder-int8": lambda path: build_quantized(path, "int8_per_channel"),
    "builder-int4": lambda path: build_quantized(path, "int4_per_channel"),
}


if __name__ == "__main__":
    main()
