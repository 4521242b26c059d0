"""Packages on the CUDA provider of ONNX Runtime: logits of the CPU, with captured graphs or not."""

from __future__ import annotations

import pytest
import torch
from onnx_forms import FORMS
from programs import token_ids

from kvxform.runtime.model import OptimizedModel
from kvxform.runtime.onnx_runtime import CUDA
from kvxform.runtime.onnx_session import OnnxSession

onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        CUDA not in onnxruntime.get_available_providers(),
        reason="this build of ONNX Runtime has no CUDA provider",
    ),
]
STEPS = 12
# float16, and codes that turn over where sums are rounded in another order
TOLERANCE = {"": 5e-3, "int8": 4e-2, "int4": 0.12}


def run(session, ids, mask):
    """Return logits of a ragged prompt and of forced steps, float32 `[1 + STEPS, B, vocab]`."""
    found = [session.prefill(ids, mask)]
    found += [session.decode(ids[:, step % ids.shape[1]]) for step in range(STEPS)]
    return torch.stack([x.float().cpu() for x in found])


@pytest.fixture(scope="module", params=FORMS)
def case(request, tmp_path_factory):
    """A form, its package, a ragged batch, and the logits of the eager lowering in float32."""
    form = FORMS[request.param]
    folder = form.export(tmp_path_factory.mktemp("forms") / "package", "cuda", "last")
    ids, program = token_ids(form.program(), 3, 9), form.program(torch.float32)
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[2, :7] = 0
    expected = run_eager(program, ids, mask)
    if form.level == "L3":  # there, a first prompt attends to its K and V before they are rounded
        expected[0] = run_eager(FORMS["L3"].program(torch.float32), ids, mask)[0]
    return request.param, folder, (ids, mask), expected


def run_eager(program, ids, mask):
    return run(OptimizedModel(program).new_session(max_batch_size=3, max_seq_len=64), ids, mask)


def test_logits_are_those_of_the_eager_lowering(case):
    name, folder, batch, expected = case
    session = OnnxSession(folder, max_length=64)
    assert session.provider == "cuda"
    bits = name.split()[1] if "int" in name else ""
    for _ in range(2):  # the second time in the same memory
        torch.testing.assert_close(run(session, *batch), expected, rtol=0, atol=TOLERANCE[bits])
        session.reset()


def test_captured_graphs_change_nothing(case):
    _, folder, batch, _ = case
    session = OnnxSession(folder, max_length=64)
    if session.description["onnx"]["cache"] == "grow":
        pytest.skip("planes that grow have no fixed shape")
    plain = OnnxSession(folder, max_length=64, cuda_graph=False)
    torch.testing.assert_close(run(session, *batch), run(plain, *batch), rtol=0, atol=1e-3)


def test_buffers_grow_under_captured_graphs(case, monkeypatch):
    _, folder, batch, _ = case
    monkeypatch.setattr("kvxform.runtime.onnx_buffers.FIRST_CAPACITY", 10)
    session = OnnxSession(folder)
    whole = OnnxSession(folder, max_length=64)
    torch.testing.assert_close(run(session, *batch), run(whole, *batch), rtol=0, atol=1e-3)
