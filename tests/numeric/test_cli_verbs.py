"""Every verb, run through `main` on a tiny model in a Hugging Face folder."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path

import pytest
import torch
from checkpoints import byte_tokenizer, write_llama
from transformers import LlamaForCausalLM

from kvxform.cli.main import main
from kvxform.texts import default_text

PROMPT = "hello"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def model(folder) -> str:
    return str(write_llama(folder / "model"))


@pytest.fixture(scope="module")
def optimized(folder, model) -> tuple[str, dict]:
    """An artifact with its ONNX package, and what the command printed."""
    out, stdout = folder / "out", io.StringIO()
    words = ["optimize", model, "-r", "kv4", "-o", str(out), "--onnx", "--verify", "none", "--json"]
    with contextlib.redirect_stdout(stdout):
        assert main(words) == 0
    return str(out), json.loads(stdout.getvalue())


@pytest.fixture
def run(capsys):
    """Return `run(*words)`: the JSON that a command prints."""

    def call(*words: str) -> dict:
        assert main([*words, "--json"]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    return call


def test_optimize_writes_an_artifact_and_a_package(optimized):
    out, data = optimized
    assert data["bits_per_value"] == 4.5
    assert data["bytes_per_token_before"] == 2 * 2 * 64 * 2  # two layers, K and V, 16 bit
    assert data["files"] == {"artifact": out, "report": f"{out}/report.html", "onnx": f"{out}/onnx"}
    for name in ("checksums.json", "report.html", "recipe.yaml", "onnx/model.onnx"):
        assert (Path(out) / name).is_file(), name


def test_optimize_prints_rows_for_people(folder, model, capsys):
    out = str(folder / "exact")
    assert main(["optimize", model, "-r", "exact", "-o", out]) == 0
    printed = capsys.readouterr()
    rows = dict(line.split(maxsplit=1) for line in printed.out.splitlines())
    assert rows["artifact"] == out
    assert rows["same"] == "greedy token       100.0% (probe inputs)"
    assert "insert-cache" in printed.err
    assert "insert-cache" in rows["passes"]


def test_export_writes_what_optimize_wrote(folder, optimized, run):
    target = folder / "package"
    data = run("export", optimized[0], "-o", str(target), "--verify", "none")
    assert "model.onnx" in data["files"]
    for name in data["files"]:
        assert (target / name).read_bytes() == (Path(optimized[0]) / "onnx" / name).read_bytes()


def test_export_takes_what_is_asked_of_the_package(folder, optimized, run):
    target = folder / "asked"
    words = ("--level", "L0", "--opset", "19", "--runtime", "1.24", "--verify", "none")
    run("export", optimized[0], "-o", str(target), *words)
    form = json.loads((target / "kvxform.json").read_text(encoding="utf-8"))["onnx"]
    assert (form["level"], form["opset"], form["runtime"]) == ("L0", 19, "1.20")


@pytest.mark.parametrize("source", ["artifact", "model"])
def test_levels_are_shown_and_nothing_is_written(source, folder, model, optimized, run, capsys):
    target = (optimized[0],) if source == "artifact" else (model, "-r", "kv4")
    data = run("export", *target, "--levels", "--opset", "24")
    legal = {row["level"]: row["legal"] for row in data["levels"]}
    assert legal == {"L0": True, "L1": False, "L2": True, "L3": False, "L4": False, "L5": True}
    assert (data["form"]["level"], data["form"]["cache"]) == ("L2", "buffer")
    assert main(["export", *target, "--levels"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "streams must be unquantised or static-int (layer 0)" in lines[4]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ((), "KVX801 an export needs --out"),
        (("-o", "x", "--level", "L1"), "KVX403 [onnx] level L1 is not legal here: streams must be"),
        (("-o", "x", "--opset", "17"), "KVX403 [onnx] opset must be 18 to 25; got 17"),
        (("--levels", "--provider", "rocm"), "KVX403 [onnx] provider must be one of cpu, cuda"),
    ],
)
def test_an_export_that_cannot_be_is_one_line(
    words, error, optimized, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(["export", optimized[0], *words]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(error)
    assert printed.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_options_of_packages_need_a_package(folder, model, capsys):
    words = ["optimize", model, "-r", "kv4", "-o", str(folder / "none"), "--level", "L0"]
    assert main(words) == 2
    assert "options of packages need --onnx; got --level" in capsys.readouterr().err


def test_generate_source_equals_hugging_face(model, run):
    data = run("generate", model, "-p", PROMPT, "--max-new-tokens", "6")
    source = LlamaForCausalLM.from_pretrained(model)
    ids = torch.tensor([[token_of(char) for char in PROMPT]])
    expected = source.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert data["token_ids"] == expected.tolist()


def test_generate_artifact_and_package_agree(optimized, run):
    words = ("-p", PROMPT, "--max-new-tokens", "6")
    artifact = run("generate", optimized[0], *words)
    package = run("generate", f"{optimized[0]}/onnx", *words)
    assert artifact == package
    assert len(artifact["token_ids"]) == 6


def test_generate_draws_by_seed(optimized, run):
    words = ("generate", optimized[0], "-p", PROMPT, "--temperature", "2", "--top-k", "0")
    first, again, other = (run(*words, "--seed", seed) for seed in ("1", "1", "2"))
    assert first == again
    assert first["token_ids"] != other["token_ids"]


def test_generate_prints_the_new_text_alone(optimized, run, capsys):
    words = ("generate", optimized[0], "-p", PROMPT, "--max-new-tokens", "6")
    text = run(*words)["text"]
    assert main(list(words)) == 0
    assert capsys.readouterr().out == text + "\n"


def test_plan_figures(model, run):
    data = run("plan", model, "-r", "kv4", "--batch", "2", "--tokens", "128")
    cache = data["cache"]
    assert data["sites_raised"] == 2
    assert cache["bytes_per_token"] == {"before": 512.0, "after": 144.0}
    assert cache["total_bytes"] == {"before": 512.0 * 256, "after": 144 * 256}
    assert cache["read_bytes_per_step"]["before"] == 512.0 * 128
    assert cache["added_per_step"] == (
        "one hadamard(64) on q and on new k; rotation of V folded into weights"
    )


def test_plan_text_and_no_model_the_second_time(model, capsys, monkeypatch):
    assert main(["plan", model, "-r", "int8"]) == 0
    first = capsys.readouterr().out

    def no_capture(*args, **kwargs):
        raise AssertionError("the capture is cached")

    monkeypatch.setattr("kvxform.capture.capture", no_capture)
    assert main(["plan", model, "-r", "int8"]) == 0
    assert capsys.readouterr().out == first
    assert first.splitlines()[0] == (
        "2 attention sites raised, 0 rejected    2 q heads / 1 kv heads / d 64"
    )
    assert "1.88x smaller    8.50 bits per value" in first
    assert "approximate: quantize-kv (measured after the pass)" in first


def test_eval_source_equals_hugging_face(model, run):
    data = run("eval", model, "--window", "32", "--windows", "2")
    ids = [token_of(char) for char in default_text()[:64]]
    rows = torch.tensor(ids).view(2, 32)
    with torch.no_grad():
        loss = LlamaForCausalLM.from_pretrained(model)(rows, labels=rows).loss
    assert data["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert data["kl"] is None


def test_eval_protocols_and_lowerings_agree(optimized, model, run, tmp_path):
    text = tmp_path / "t.txt"
    text.write_text("the quick brown fox " * 5, encoding="utf-8")
    words = ("--window", "24", "--windows", "2", "--text", str(text), "--reference", model)
    results = [
        run("eval", target, *words, "--protocol", protocol)
        for target in (optimized[0], f"{optimized[0]}/onnx")
        for protocol in ("quantized-prefill", "decode")
    ]
    for result in results[1:]:
        for key in ("perplexity", "kl", "reference_perplexity"):
            assert result[key] == pytest.approx(results[0][key], rel=1e-4)
    assert results[0]["kl"] > 1e-4
    assert results[0]["scored_tokens"] == 46


def test_demo_table(folder, model, capsys):
    out = folder / "demo"
    words = ["demo", "--model", model, "-o", str(out), "--window", "16", "--windows", "1"]
    assert main([*words, "-r", "int8", "-p", PROMPT, "--max-new-tokens", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line[:24].strip(): line[24:].split() for line in lines}
    assert lines[0].split() == ["model,", "int8", "source", "torch", "onnx"]
    assert rows["true bits per value"] == ["16.00", "8.50", "8.50"]
    source, torch_ppl, onnx_ppl = (float(p) for p in rows["perplexity"])
    assert torch_ppl == pytest.approx(source, rel=0.05)
    assert onnx_ppl == pytest.approx(torch_ppl, rel=1e-3)
    assert all(float(rate) > 0 for rate in rows["decode, tokens/s"])
    assert (out / "artifact" / "report.html").is_file()
    assert {line[: line.index("]") + 1] for line in lines if line.startswith("[")} == {
        "[source]",
        "[torch]",
        "[onnx]",
    }


def token_of(char: str) -> int:
    """Return the token of a printable ASCII character, a space or a line end."""
    return byte_tokenizer()(char)["input_ids"][0]
