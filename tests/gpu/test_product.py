"""Products of a few rows with a weight on a CUDA device, and in compiled decode steps."""

from __future__ import annotations

import pytest
import torch
from lowered import both, lowered_program, prompts, relative

from kvxform.codegen.triton import compiled
from kvxform.codegen.triton.emit import emit
from kvxform.codegen.triton.loading import load
from kvxform.codegen.triton.product import ProductSpec
from kvxform.codegen.triton.products import product, use_products
from kvxform.verify.tolerances import TOLERANCES

pytestmark = pytest.mark.gpu


def random(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda").to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [(4096, 4096), (1024, 14336), (4848, 640)])
def test_products(size, dtype):
    weight = random(*size, dtype=dtype)
    for rows in (1, 7, 8, 9, 16):
        x, bias = random(rows, 1, size[1], dtype=dtype), random(size[0], dtype=dtype)
        expected = x.double() @ weight.double().T
        tolerance = 3 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            product(x, weight), expected.to(dtype), rtol=tolerance, atol=tolerance
        )
        torch.testing.assert_close(
            product(x, weight, bias), (expected + bias).to(dtype), rtol=tolerance, atol=tolerance
        )


def test_every_launch_parameter():
    module = load(emit(ProductSpec(4096, 1536, "bfloat16")))
    x, weight = random(8, 4096), random(1536, 4096)
    expected = (x.double() @ weight.double().T).bfloat16()
    for config in module.CONFIGS:
        out = torch.full((8, 1536), float("nan"), device="cuda", dtype=torch.bfloat16)
        module.product(x, weight, out, config=config)
        torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


def test_compiled_steps_use_them(monkeypatch):
    taken = []
    monkeypatch.setattr(
        compiled, "use_products", lambda *args: taken.append(use_products(*args)) or taken[-1]
    )
    program = lowered_program("exact", torch.float16)
    eager, triton = both(program, compile=True)
    ids = prompts(program, 2, 40)
    sessions = [model.new_session(2, 60) for model in (eager, triton)]
    for session in sessions:
        session.prefill(ids)
    for column in range(4):
        expected, got = (session.decode(ids[:, column]) for session in sessions)
        assert relative(got, expected) <= TOLERANCES[torch.float16].logits
    assert triton._executable.why_direct == ""
    assert taken == [2], "o of both layers; the others have too few channels"
