"""Batches as ONNX Runtime GenAI feeds them: padded on the right, position 0 at padding.

The mask keeps the hole between a short prompt and what follows. Buffers and planes that grow are
both fed so; nothing of GenAI is needed here.
"""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from cached import cached_program
from programs import run

from kvxform.codegen.onnx import export_onnx
from kvxform.onnx_options import OnnxOptions

LENGTHS, NEXT, CAPACITY = (4, 7), 5, 12
FORMS = {
    "grow": OnnxOptions(level="L1", opset=23),
    "grow-last": OnnxOptions(level="L1", opset=23, logits="last"),
    "buffer": OnnxOptions(level="L1", opset=24),
    "buffer-last": OnnxOptions(level="L1", opset=24, logits="last"),
    "attention-op": OnnxOptions(level="L3", logits="last"),
}


@pytest.fixture(scope="module")
def program():
    """A toy decoder with an unquantised cache."""
    return cached_program(dtype=torch.float32)


class Feeder:
    """A package, fed as GenAI does."""

    def __init__(self, folder, *, in_place: bool) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        ports = [x for x in self.session.get_inputs() if x.name.startswith("past")]
        length = CAPACITY if in_place else 0
        self.names = {x.name for x in self.session.get_inputs()}
        self.past = {
            x.name: np.zeros((len(LENGTHS), x.shape[1], length, x.shape[3]), np.float32)
            for x in ports
        }

    def call(self, ids, mask, positions) -> np.ndarray:
        """Run once; what is present is the past of the next call."""
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        feeds = {name: np.asarray(x, np.int64) for name, x in feeds.items() if name in self.names}
        names = [x.name for x in self.session.get_outputs()]
        found = dict(zip(names, self.session.run(None, {**feeds, **self.past}), strict=True))
        self.past = {name: found[name.replace("past_key_values", "present")] for name in self.past}
        return found["logits"]


@pytest.mark.parametrize("form", FORMS)
def test_short_rows_are_followed_by_a_hole_in_the_mask(program, form, tmp_path):
    options = FORMS[form]
    folder = export_onnx(program, tmp_path / "onnx", options)
    feeder = Feeder(folder, in_place=not form.startswith("grow"))
    rows = [torch.arange(3, 3 + n) for n in LENGTHS]
    width = max(LENGTHS)
    ids = np.array([[*row.tolist(), *[0] * (width - len(row))] for row in rows])
    mask = np.array([[1] * n + [0] * (width - n) for n in LENGTHS])
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0) * mask
    logits = feeder.call(ids, mask, positions)
    for row, tokens in enumerate(rows):
        found = logits[row, -1 if options.logits == "last" else len(tokens) - 1]
        expected = run(program, tokens[None])[0, -1]
        torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-5)
    mask = np.concatenate([mask, np.ones((len(rows), 1), np.int64)], 1)
    step = np.full((len(rows), 1), NEXT)
    logits = feeder.call(step, mask, np.array(LENGTHS)[:, None])
    for row, tokens in enumerate(rows):
        whole = torch.cat([tokens, torch.tensor([NEXT])])
        expected = run(program, whole[None])[0, -1]
        torch.testing.assert_close(torch.tensor(logits[row, -1]), expected, rtol=0, atol=1e-5)
