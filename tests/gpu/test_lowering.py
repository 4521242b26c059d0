"""The Triton lowering on a CUDA device: against the eager one, and its recorded decode steps."""

from __future__ import annotations

import pytest
import torch
from lowered import both, divergence, lowered_program, prompts, relative

from kvxform.verify.tolerances import TOLERANCES

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
RECIPES = ["exact", "int8", "kv4", "kivi2", "kivi4"]


@pytest.fixture(autouse=True)
def _no_tuning(monkeypatch):
    """Take the first config of each kernel: results are the same, and tests are quicker."""
    import kvxform.codegen.triton.modules as modules

    monkeypatch.setattr(modules, "tune", lambda module, *_, **__: module.CONFIGS[0])


def feed(session, ids, prompt, steps):
    """Return the logits of a ragged, chunked prefill and of decode steps, `[n, vocab]`."""
    mask = torch.ones_like(ids[:, :prompt])
    mask[1, : prompt // 3] = 0
    chunk = prompt // 2 + 3
    logits = [session.prefill(ids[:, :prompt], mask, chunk_size=chunk)]
    logits += [session.decode(ids[:, prompt + i]) for i in range(steps)]
    return torch.cat(logits)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_gives_what_eager_gives(recipe, dtype):
    program = lowered_program(recipe, dtype)
    eager, triton = both(program)
    ids = prompts(program, 2, 230)
    expected = feed(eager.new_session(2, 230), ids, 150, 80)
    session = triton.new_session(2, 230)
    got = feed(session, ids, 150, 80)
    assert triton._executable.why_direct == "", "decode steps are replayed"
    if recipe == "exact":
        assert relative(got, expected) <= TOLERANCES[dtype].logits
    else:
        assert divergence(got, expected) <= TOLERANCES[dtype].lossy_kl
    assert session.cache_bytes() == triton.plan.bytes_at(session.sequence_lengths(), 230)
