"""Export a quantised cache to ONNX and continue it step by step in stock ONNX Runtime.

Run: python examples/export_onnx.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from optimize_tiny_llama import make_model

import kvxform

PROMPT, NEW_TOKENS = [[0, 17, 42, 99]], 8


def decode_with_onnxruntime(folder: Path) -> list[int]:
    """Return the greedy continuation; nothing of kvxform is used here."""
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    inputs = {x.name: x for x in session.get_inputs()}
    dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}
    past = {
        name: np.zeros((1, x.shape[1], 0, x.shape[3]), dtypes[x.type])  # an empty cache
        for name, x in inputs.items()
        if name.startswith("past_key_values.")
    }
    names = [x.name for x in session.get_outputs()]
    ids, seen, tokens = np.array(PROMPT), 0, []
    while len(tokens) < NEW_TOKENS:
        feed = {
            "input_ids": ids,
            "attention_mask": np.ones((1, seen + ids.shape[1]), np.int64),
            "position_ids": np.arange(seen, seen + ids.shape[1])[None],
        }
        outputs = dict(zip(names, session.run(None, {**feed, **past}), strict=True))
        seen += ids.shape[1]
        tokens.append(int(outputs.pop("logits")[0, -1].argmax()))
        past = {name.replace("present.", "past_key_values."): x for name, x in outputs.items()}
        ids = np.array([[tokens[-1]]])
    return tokens


def main() -> None:
    """Run the example."""
    optimized = kvxform.optimize(make_model(), "kv4", verify="none", progress=False)
    expected = optimized.generate(torch.tensor(PROMPT), max_new_tokens=NEW_TOKENS)[0, 4:].tolist()
    with tempfile.TemporaryDirectory() as name:
        folder = optimized.export_onnx(Path(name) / "package")
        print("files    ", sorted(path.name for path in folder.iterdir()))
        tokens = decode_with_onnxruntime(folder)
    print("torch    ", expected)
    print("onnx     ", tokens)


if __name__ == "__main__":
    main()
