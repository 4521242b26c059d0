"""What must hold for a family of `families`, each check against the unrewritten model.

Each check raises AssertionError or a KvxformError that says why, so that the coverage table can
quote it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from families import Family
from models import VOCAB
from onnx_tools import open_export
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedModel

from kvxform.capture import capture
from kvxform.ir.program import Program
from kvxform.pipeline import Verify, run_pipeline
from kvxform.recipe import Recipe, load_recipe
from kvxform.runtime.model import OptimizedModel
from kvxform.runtime.onnx_session import OnnxSession
from kvxform.verify.probe import Reference
from kvxform.verify.tolerances import tolerance_for

NEW_TOKENS = 48
PROMPTS = (13, 6, 1)  # tokens of the rows of a ragged batch; the longest wraps the windows
BOUNDS = {torch.float64: 1e-8, torch.float32: 1e-4}  # logits, as a share of the largest
aten = torch.ops.aten


class AttentionCounter(TorchDispatchMode):
    """Counts attentions that run: fused ones, and softmaxes over as many columns as tokens."""

    FUSED = (
        aten._scaled_dot_product_flash_attention_for_cpu,
        aten._scaled_dot_product_attention_math,
        aten._native_multi_head_attention,
    )
    SOFTMAX = (aten._softmax, aten._safe_softmax)

    def __init__(self, length: int) -> None:
        super().__init__()
        self.columns = (length, length + 1)  # one more with a learned sink
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        is_softmax = packet in self.SOFTMAX and args[0].shape[-1] in self.columns
        self.count += is_softmax or packet in self.FUSED
        return func(*args, **(kwargs or {}))


def count_attentions(model: nn.Module) -> int:
    """Return how many attentions one run of the unrewritten model makes."""
    with torch.no_grad(), AttentionCounter(11) as counter:
        model(token_ids(1, 11))
    return counter.count


def token_ids(rows: int, length: int, seed: int = 0) -> Tensor:
    """Return token ids that are no special ones, int64 `[rows, length]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (rows, length), generator=generator)


def source_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Return logits `[B, S, vocab]` of the unrewritten model."""
    with torch.no_grad():
        out = model(ids)
    return out if isinstance(out, Tensor) else out.logits


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a share of the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max())


def family_recipe(name: str) -> Recipe:
    """Return a bundled recipe without bounds, which are for trained models of head_dim 64."""
    return load_recipe({**load_recipe(name).to_data(), "bounds": {}})


@dataclass
class Subject:
    """One family in one dtype: the unrewritten model and what was captured of it."""

    model: nn.Module
    program: Program

    @classmethod
    def of(cls, family: Family, dtype: torch.dtype) -> Subject:
        """Build and capture."""
        model = family.build(dtype)
        return cls(model, capture(model).program)

    def optimise(self, recipe: str, verify: Verify = "none") -> OptimizedModel:
        """Return the model after a bundled recipe."""
        wanted = family_recipe(recipe)
        program, report = run_pipeline(self.program, wanted, executor=OptimizedModel, verify=verify)
        return OptimizedModel(program, report=report, recipe=wanted)


def check_sites(subject: Subject) -> None:
    """Every attention of the model was raised, or refused with a reason."""
    rejected = [r for r in subject.program.rejected if r.kind == "attention"]
    assert all(r.reason for r in rejected)
    found, there = len(subject.program.sites) + len(rejected), count_attentions(subject.model)
    assert found == there, f"{found} of {there} attentions accounted for"


def check_logits(subject: Subject, optimised: OptimizedModel) -> None:
    """Logits of whole and of padded prompts equal those of the source, row by row."""
    ids = token_ids(2, 40)
    bound = BOUNDS[subject.program.dtype]
    error = relative(optimised(ids), source_logits(subject.model, ids))
    assert error <= bound, f"logits differ by {error:.1e}"
    prompts, mask = ragged_prompts("left")
    found = optimised(prompts, mask)
    for row, real in enumerate(mask.bool()):
        alone = source_logits(subject.model, prompts[row : row + 1, real])
        error = relative(found[row : row + 1, real], alone)
        assert error <= bound, f"logits of padded row {row} differ by {error:.1e}"


def ragged_prompts(side: str) -> tuple[Tensor, Tensor]:
    """Return prompts of `PROMPTS` tokens, padded on one side, and their mask."""
    width = max(PROMPTS)
    ids, mask = torch.zeros(len(PROMPTS), width, dtype=torch.int64), []
    for row, count in enumerate(PROMPTS):
        columns = slice(width - count, width) if side == "left" else slice(count)
        ids[row, columns] = token_ids(1, count, seed=row + 1)[0]
        mask.append((torch.arange(width) >= width - count) == (side == "left"))
    return ids, torch.stack(mask).long()


def check_tokens(
    subject: Subject, continued: Sequence[OptimizedModel | OnnxSession], count: int = NEW_TOKENS
) -> None:
    """Greedy tokens of a ragged batch equal those of the source with its own cache, row by row."""
    prompts, mask = ragged_prompts("left")
    options: dict[str, Any] = {"max_new_tokens": count, "eos_token_id": ()}
    found = [m.generate(prompts, mask, **options)[:, prompts.shape[1] :] for m in continued]
    for row, real in enumerate(mask.bool()):
        expected, leads = greedy(subject.model, prompts[row : row + 1, real], count)
        for tokens in found:
            same = int((tokens[row] == expected).long().cumprod(0).sum())
            lead = f"{float(leads[same]):.0e} of the largest logit" if same < count else ""
            assert same == count, f"tokens of row {row} part after {same}, at a lead of {lead}"


def greedy(model: nn.Module, prompt: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Continue one prompt with the source itself.

    Returns:
        The new tokens `[count]`, and by how much each led, `[count]`, as a share of the largest
        logit: where that is no more than rounding, another seed is due.
    """
    if isinstance(model, PreTrainedModel):
        logits = generate_cached(model, prompt, count)
    else:
        ids, steps = prompt, []
        for _ in range(count):
            steps.append(source_logits(model, ids)[0, -1])
            ids = torch.cat([ids, steps[-1].argmax()[None, None]], 1)
        logits = torch.stack(steps)
    best = logits.topk(2, -1).values
    return logits.argmax(-1), (best[:, 0] - best[:, 1]) / logits.abs().max()


def generate_cached(model: PreTrainedModel, prompt: Tensor, count: int) -> Tensor:
    """Return the logits `[count, vocab]` by which transformers chose tokens, with its own cache."""
    config = copy.deepcopy(model.generation_config)
    config.update(
        do_sample=False,
        max_new_tokens=count,
        min_new_tokens=count,
        eos_token_id=None,
        use_cache=True,
        return_dict_in_generate=True,
        output_logits=True,
    )
    with torch.no_grad():
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), generation_config=config
        )
    assert isinstance(out.past_key_values, DynamicCache), "transformers ran with its own cache"
    logits = torch.cat(out.logits)
    assert torch.equal(logits.argmax(-1), out.sequences[0, prompt.shape[1] :])
    return logits


def check_export(optimised: OptimizedModel, folder: Path, *, lossy: bool) -> OnnxSession:
    """Logits of the ONNX package equal those of the eager lowering, padded rows too."""
    session = open_export(optimised.program, folder)
    ids = token_ids(2, 40)
    compare_export(session.prefill(ids, all_logits=True), optimised(ids), lossy=lossy)
    prompts, mask = ragged_prompts("left")
    session.reset()
    found = session.prefill(prompts, mask, all_logits=True)
    real = mask.bool()
    compare_export(found[real], optimised(prompts, mask)[real], lossy=lossy)
    session.reset()
    return session


def compare_export(found: Tensor, expected: Tensor, *, lossy: bool) -> None:
    """Compare logits; two forms of a lossy program may differ by a few codes."""
    if not lossy:
        error = relative(found, expected)
        assert error <= BOUNDS[torch.float32], f"ONNX logits differ by {error:.1e}"
        return
    flat = (x.reshape(-1, x.shape[-1]) for x in (expected, found))
    eager, onnx = (Reference(x) for x in flat)
    kl, bound = eager.compare(onnx).kl, tolerance_for(torch.float32).lossy_kl
    assert kl <= bound, f"ONNX logits differ by {kl:.1e} nats"
