"""Large checkpoints are rewritten from file to file: equal results, little memory, clear errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_llama
from models import tiny_hf
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import kvxform
from kvxform.capture import sources
from kvxform.capture.sources import open_source
from kvxform.errors import CaptureError
from kvxform.ir.store import WeightStore

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Stream every checkpoint, whatever its size; return the folder for new weights."""
    scratch = tmp_path / "scratch"
    monkeypatch.setattr(
        sources, "open_store", lambda _folder: WeightStore(scratch, limit=1 << 16, smallest=1)
    )
    return scratch


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def state(model: Any) -> dict[str, torch.Tensor]:
    assert isinstance(model, nn.Module)
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def test_a_streamed_run_writes_the_same_bytes(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = write_llama(tmp_path / "model", tie_word_embeddings=False)
    kvxform.optimize(str(model), "kv4", progress=False).save(tmp_path / "plain")
    scratch = request.getfixturevalue("streamed")
    opt = kvxform.optimize(str(model), "kv4", progress=False)
    assert opt.program.store is not None
    assert list(scratch.iterdir()) == []
    assert len(opt.report.passes) > 5
    opt.save(tmp_path / "streamed")
    assert content(tmp_path / "streamed") == content(tmp_path / "plain")
    ids = torch.tensor([[5, 17, 42]])
    assert torch.equal(kvxform.load(tmp_path / "streamed")(ids), opt(ids))


def test_tied_weights_stay_tied(streamed: Path, tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model", tie_word_embeddings=True)
    found = open_source(model).model
    assert isinstance(found, nn.Module)
    assert found.lm_head.weight is found.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
def test_a_streamed_checkpoint_is_the_checkpoint_in_any_dtype(
    dtype: torch.dtype | None, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = write_llama(tmp_path / "model")
    plain = state(open_source(model, dtype=dtype).model)
    request.getfixturevalue("streamed")
    source = open_source(model, dtype=dtype)
    assert source.store is not None
    source.store.release()
    found = state(source.model)
    assert found.keys() == plain.keys()
    for name, weight in plain.items():
        assert found[name].dtype == weight.dtype
        assert torch.equal(found[name], weight), name


def test_experts_that_the_loader_joins_are_streamed(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    plain = state(open_source(tmp_path / "model").model)
    scratch = request.getfixturevalue("streamed")
    source = open_source(tmp_path / "model")
    assert scratch.is_dir(), "joined experts have been put into files"
    assert source.store is not None
    source.store.release()
    found = state(source.model)
    assert all(torch.equal(found[name], weight) for name, weight in plain.items())


def write_shards(folder: Path) -> list[Path]:
    tiny_hf("llama").save_pretrained(folder, max_shard_size="20KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    return shards


def cut(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-1])


def spoil(shard: Path) -> None:
    shard.write_bytes(b"\xff" * 64)


def drop_weight(shard: Path) -> None:
    index = shard.parent / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    lost = next(name for name, file in data["weight_map"].items() if file == shard.name)
    data["weight_map"] = {k: v for k, v in data["weight_map"].items() if v != shard.name}
    assert lost
    index.write_text(json.dumps(data))
    shard.unlink()


@pytest.mark.parametrize("damage", [cut, spoil, Path.unlink, drop_weight])
def test_a_damaged_shard_is_one_clear_error(damage: Any, streamed: Path, tmp_path: Path) -> None:
    damage(write_shards(tmp_path / "model")[1])
    with pytest.raises(CaptureError) as caught:
        open_source(tmp_path / "model")
    assert caught.value.code == "KVX301"
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "model") in str(caught.value)


@pytest.mark.slow
def test_peak_memory_is_less_than_the_model(tmp_path: Path) -> None:
    script = REPOSITORY / "benchmarks" / "streaming_memory.py"
    command = [sys.executable, script, "--gigabytes", "1.6", "--folder", tmp_path]
    subprocess.run([*command, "--json", tmp_path / "result.json"], check=True)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["checkpoint_bytes"] > 1.4e9
    assert result["peak_resident_bytes"] < 1.4e9
