"""lm-evaluation-harness scores the adapter as it scores the source model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from models import tiny_hf
from tiny_tokenizers import byte_pair_tokenizer

import kvxform

pytestmark = [pytest.mark.lm_eval, pytest.mark.filterwarnings("ignore")]

DATA = Path(__file__).parent.parent / "data" / "lm_eval"
FACTS = [json.loads(line) for line in (DATA / "facts.jsonl").read_text("utf-8").splitlines()]


def train(model, tokenizer):
    """Teach the model half of the facts, so that scores are neither 0 nor 1."""
    known = FACTS[::2]
    texts = [f"{f['prompt']} {f['choices'][f['answer']]}." for f in known]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(60):
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def score(model, tokenizer):
    """Run both tasks; returns scores, and the answers to every request."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tasks = []
    for name in ("choose", "continue"):
        task = yaml.safe_load((DATA / f"{name}.yaml").read_text("utf-8"))
        files = {"data_files": {"test": str(DATA / "facts.jsonl")}}
        tasks.append({**task, "dataset_kwargs": files})
    results = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3),
        tasks=tasks,
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )
    scores = {
        (task, metric): float(value)
        for task, found in results["results"].items()
        for metric, value in found.items()
        if metric in ("acc,none", "acc_norm,none", "exact_match,none")
    }
    samples = results["samples"]
    answers = {task: [s["filtered_resps"] for s in found] for task, found in samples.items()}
    return scores, answers


@pytest.fixture
def offline(monkeypatch, tmp_path):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def test_the_harness_gives_the_same_scores_for_the_source_and_for_exact(offline):
    tokenizer = byte_pair_tokenizer(f"{f['prompt']} {' '.join(f['choices'])}." for f in FACTS)
    source = train(tiny_hf("llama"), tokenizer)
    compiled = kvxform.optimize(source, "exact", progress=False).as_huggingface()
    expected, expected_answers = score(source, tokenizer)
    found, answers = score(compiled, tokenizer)
    assert len(found) == 3
    assert found == expected
    assert all(0.3 < value < 1 for value in found.values()), found
    assert answers["kvxform_continue"] == expected_answers["kvxform_continue"]
    for mine, theirs in zip(
        answers["kvxform_choose"], expected_answers["kvxform_choose"], strict=True
    ):
        assert [greedy for _, greedy in mine] == [greedy for _, greedy in theirs]
        ours, reference = (torch.tensor([float(x) for x, _ in side]) for side in (mine, theirs))
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-3)
