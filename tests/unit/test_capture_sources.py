"""Sources: folders, GGUF files, cached ids, and names that are none of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from models import plain, tiny_hf
from torch import Tensor, nn

from kvxform.capture import load_source_module
from kvxform.capture.smollm2 import find_gguf
from kvxform.capture.sources import open_source
from kvxform.errors import CaptureError
from kvxform.folders import cache_folder

IDS = torch.tensor([[5, 17, 42, 3, 96]])


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("KVXFORM_CACHE_DIR", str(tmp_path / "cache"))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_a_module_is_described_by_its_configuration() -> None:
    model = tiny_hf("llama")
    source = open_source(model, name="mine")
    assert source.model is model
    assert (source.info.name, source.info.family) == ("mine", "llama")
    assert source.info.context_length == 256
    assert (source.info.bos_token_id, source.info.eos_token_ids) == (1, (2,))
    assert open_source(plain("gpt")).info.family == "PlainGPT"


def test_a_folder_gives_the_saved_model(tmp_path: Path) -> None:
    model = tiny_hf("llama")
    model.save_pretrained(tmp_path / "tiny")
    source = open_source(str(tmp_path / "tiny"))
    assert source.info.name == "tiny"
    assert torch.equal(logits(source.model), logits(model))
    wide = load_source_module(tmp_path / "tiny", dtype=torch.float64)
    assert next(wide.parameters()).dtype is torch.float64
    assert not wide.training


def write_llama_gguf(path: Path, model: Any) -> None:
    """Write a Llama model as GGUF stores it, with q and k rows in llama.cpp's order."""
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    parts = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
    }
    for layer in range(config.num_hidden_layers):
        names |= {f"blk.{layer}.{k}": f"model.layers.{layer}.{v}" for k, v in parts.items()}
    for short, name in names.items():
        weight = state[f"{name}.weight"]
        if short.endswith(("attn_q", "attn_k")):
            heads = weight.shape[0] // config.head_dim
            weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(f"{short}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_gives_the_model_it_holds(tmp_path: Path) -> None:
    model = tiny_hf("llama", num_key_value_heads=2, tie_word_embeddings=False)
    write_llama_gguf(tmp_path / "tiny.gguf", model)
    source = open_source(str(tmp_path / "tiny.gguf"))
    assert isinstance(source.model, nn.Module)
    assert source.info.tokenizer_path == str(tmp_path / "tiny.gguf")
    assert float((logits(source.model) - logits(model)).abs().max()) < 1e-5
    assert getattr(source.model, "hf_quantizer", None) is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("no-such-model", "no-such-model"),
        ("nobody/no-such-model", "nobody/no-such-model"),
        ("missing.gguf", "no such GGUF file"),
        ("model.pt2", "it cannot be read"),
        (".", "no config.json"),
        (7, "int"),
    ],
)
def test_an_unknown_source_is_one_clear_error(
    name: Any, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CaptureError, match=text) as caught:
        open_source(name)
    assert caught.value.code == "KVX301"
    assert "Hint:" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_gguf_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(CaptureError, match=r"bad\.gguf") as caught:
        open_source(tmp_path / "bad.gguf")
    assert caught.value.code == "KVX301"


def test_a_folder_that_wants_to_run_its_own_code_is_refused(tmp_path: Path) -> None:
    config = '{"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "evil.Model"}}'
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(CaptureError) as caught:
        open_source(tmp_path)
    assert caught.value.code == "KVX301"


def test_the_cache_folder_can_be_moved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("KVXFORM_CACHE_DIR")
    assert cache_folder().name == "kvxform"


def test_a_missing_package_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvxform.capture.smollm2._PACKAGE", "no-such-package-at-all")
    with pytest.raises(CaptureError, match="pip install") as caught:
        find_gguf()
    assert caught.value.code == "KVX301"


@pytest.mark.model
def test_the_gguf_of_smollm2_is_found_by_file() -> None:
    assert find_gguf().suffix == ".gguf"
    assert find_gguf().stat().st_size > 90e6
