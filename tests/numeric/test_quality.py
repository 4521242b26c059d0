"""Scorecards of a tiny model: every part against a computation of its own."""

from __future__ import annotations

import json

import pytest
import torch
from models import tiny_hf
from tiny_tokenizers import byte_pair_tokenizer
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvxform.cli.main import main
from kvxform.codecs.base import make_codec
from kvxform.errors import KvxformError
from kvxform.evaluate.attention import measure_attention
from kvxform.evaluate.encoding import EncodeCost, measure_encoding
from kvxform.evaluate.peers import Peer, is_installed, make_peer_runner
from kvxform.evaluate.runners import Remembered, SourceRunner
from kvxform.evaluate.scorecard import Effort
from kvxform.evaluate.tables import HEADINGS, table_rows
from kvxform.quality import QualityRun, check_names, expand_names
from kvxform.texts import default_text

VOCAB = 150
INT3 = {"codec": "int", "bits": 3, "axis": "token"}
RECIPE = {
    "version": 1,
    "name": "int3",
    "passes": ["insert-cache", {"quantize-kv": {"key": INT3, "value": INT3}}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_hf("llama", vocab_size=VOCAB, max_position_embeddings=1024).save_pretrained(path)
    byte_pair_tokenizer([default_text()[:20000]], VOCAB).save_pretrained(path)
    (path / "int3.json").write_text(json.dumps(RECIPE))
    return path


@pytest.fixture(scope="module")
def run(folder):
    effort = Effort(window=48, windows=2, decode_window=24, passkey_lengths=(400,), encoding=False)
    return QualityRun(str(folder), effort)


@pytest.fixture(scope="module")
def model(folder, run):
    return run.optimize(str(folder / "int3.json"))


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, VOCAB, (1, 40), generator=torch.Generator().manual_seed(0))


def test_attention_of_the_first_layer_by_hand(model, ids):
    module = tiny_hf("llama", vocab_size=VOCAB, max_position_embeddings=1024)
    layer, codec = module.model.layers[0], make_codec(INT3)
    with torch.no_grad():
        x = layer.input_layernorm(module.model.embed_tokens(ids))
        q, k, v = (
            getattr(layer.self_attn, f"{name}_proj")(x).unflatten(-1, (-1, 8)).transpose(1, 2)
            for name in "qkv"
        )
        q, k = apply_rotary_pos_emb(q, k, *module.model.rotary_emb(x, torch.arange(40)[None]))
        k2, v2 = (codec.decode(codec.encode(x), torch.float32) for x in (k, v))
        exact, coded = (
            scaled_dot_product_attention(q, *kv, is_causal=True, enable_gqa=True)
            for kv in ((k, v), (k2, v2))
        )
    expected = float(cosine_similarity(exact, coded, dim=-1).mean())
    found = measure_attention(model, ids)
    assert found.by_layer[0] == pytest.approx(expected, abs=1e-6)
    assert 0.5 < found.worst <= found.mean < 0.999


def test_attention_over_an_exact_cache_has_no_error(run, ids):
    assert measure_attention(run.optimize("exact"), ids).worst == pytest.approx(1.0, abs=1e-9)


@pytest.mark.slow
def test_encoding_is_timed(model):
    cost = measure_encoding(model.plan, block=16, repeats=1)
    assert cost.cpu_tokens_per_s > 0
    assert cost.gpu_tokens_per_s is None
    assert 0 <= cost.build_s < 30


def test_scorecards_of_source_and_recipe(folder, run):
    names = ("source", str(folder / "int3.json"))
    source, ours = (run.measure(run.open(name)) for name in names)
    exact = source["prefill"]["perplexity"]
    assert exact == source["prefill"]["reference_perplexity"]
    decoded = source["decode"]
    assert decoded["perplexity"] == pytest.approx(decoded["reference_perplexity"], rel=1e-5)
    assert ours["prefill"]["reference_perplexity"] == exact
    assert ours["prefill"]["kl"] > 1e-5
    assert ours["decode"]["window"] == 24
    assert ours["footprint"]["bits_long"] == 3 + 32 / 8
    assert len(ours["passkeys"][0]["found"]) == 5
    rows = table_rows([ours, source])
    assert [len(row) for row in rows] == [len(HEADINGS)] * 2
    assert rows[0][0] == "source"
    assert rows[1][1:3] == ("7.00", "7.00")


def test_the_command_measures_each_format_once(folder, capsys, monkeypatch):
    cost = EncodeCost(0.5, 1000.0, None, 8)
    monkeypatch.setattr("kvxform.evaluate.scorecard.measure_encoding", lambda *_: cost)
    small = ["--window", "32", "--windows", "1", "--decode-window", "8", "--passkey", ""]
    names = ["source", str(folder / "int3.json")]
    words = ["eval", str(folder), "--recipes", ",".join([*names, "source"]), *small]
    assert main([*words, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in data["rows"]] == names
    assert data["rows"][1]["decode"]["window"] == 8
    assert data["rows"][1]["encoding"] == cost.to_dict()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-r", "kv4"], "one source model"),
        (["--passkey", "1k"], "whole numbers"),
    ],
)
def test_tables_that_cannot_be_made_are_refused(folder, capsys, words, says):
    assert main(["eval", str(folder), "--recipes", "source", *words]) == 2
    assert says in capsys.readouterr().err


def test_names_are_expanded_and_peers_are_checked():
    found = expand_names("kv4, all,kv4")
    assert found[:2] == ["kv4", "source"]
    assert found.count("kv4") == 1
    with pytest.raises(KvxformError, match="hf-quanto-4"):
        check_names(["source", "kv4", "hf-quanto-5"])
    with pytest.raises(KvxformError, match="did you mean 'kv4'"):
        check_names(["source", "kv5", "hf-quanto-5"])


def test_a_remembered_source_runs_once(ids):
    calls = []

    class Counted(SourceRunner):
        def logits(self, input_ids):
            calls.append(input_ids)
            return super().logits(input_ids)

    runner = Remembered(Counted(tiny_hf("llama", vocab_size=VOCAB)))
    first = runner.logits(torch.cat([ids, ids]))
    assert torch.equal(runner.logits(ids), first[:1])
    assert len(calls) == 1


def test_peers_fill_rows_and_read_codes(ids):
    peer = Peer("hqq", 2, 1, "hqq", group=8, residual=16)
    if not is_installed(peer):
        pytest.skip("hqq is not installed")
    module = tiny_hf("llama", vocab_size=VOCAB)
    runner, exact = make_peer_runner(module, peer), SourceRunner(module)
    for one in (runner, exact):
        one.prefill(ids[:, :8])
    for token in ids[0, 8:30]:
        out, wanted = runner.decode(token[None]), exact.decode(token[None])
    assert out.shape == wanted.shape == (1, VOCAB)
    assert float((out - wanted).abs().max()) > 1e-3, "a cache of 2 bits shows"
    assert runner.cache.layers[0].keys.shape[0] == 4, "rows are filled up to four"
