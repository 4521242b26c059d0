"""Bad input: one coded line on stderr, nothing on stdout, exit code 2, no file left behind."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import write_llama
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

import kvxform
from kvxform.cli.main import main

LINE = re.compile(r"KVX\d{3} .*\.")
RECIPE = """\
version: 1
name: mine
passes:
  - insert-cache
  - quantize-kv:
      key: {codec: int, bits: 4, axis: token}
      value: {codec: int, bits: 4, axis: token}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("errors")


@pytest.fixture(scope="module")
def model(folder) -> Path:
    return write_llama(folder / "model")


@pytest.fixture(scope="module")
def artifact(folder, model) -> Path:
    out = folder / "artifact"
    kvxform.optimize(str(model), "int8", verify="none", progress=False).save(out)
    return out


@pytest.fixture
def copy(artifact, tmp_path) -> Path:
    return Path(shutil.copytree(artifact, tmp_path / "copy"))


@pytest.fixture
def recipe(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def refusal(capsys):
    """Return `refusal(code, *words)`: run a command that must fail and return its one line."""

    def call(code: str, *words: str) -> str:
        assert main(list(words)) == 2
        out, err = capsys.readouterr()
        coded = [line for line in err.splitlines() if line.startswith("KVX")]
        assert out == ""
        assert len(coded) == 1, err
        assert err.splitlines()[-1] == coded[0]
        assert "Traceback" not in err
        assert LINE.fullmatch(coded[0])
        assert coded[0].startswith(code)
        return coded[0]

    return call


def test_unknown_recipe(model, tmp_path, refusal):
    line = refusal("KVX101", "optimize", str(model), "-r", "kv44", "-o", str(tmp_path / "o"))
    assert "did you mean 'kv4'" in line
    assert list(tmp_path.iterdir()) == []


def test_misspelt_key(model, tmp_path, recipe, refusal):
    path = recipe(RECIPE.replace("axis: token}", "axes: token}", 1))
    line = refusal("KVX102", "optimize", str(model), "-r", path, "-o", str(tmp_path / "o"))
    assert "did you mean 'axis'" in line
    assert "mine.yaml:6" in line


def test_wrong_order_of_passes(model, recipe, refusal):
    path = recipe(RECIPE + "  - rotate-qk\n")
    line = refusal("KVX214", "plan", str(model), "-r", path)
    assert "Hint: move rotate-qk above quantize-kv" in line


class BagConfig(PretrainedConfig):
    model_type = "kvxform-bag"


class BagModel(PreTrainedModel):
    """A causal model without attention: it sees the last token alone."""

    config_class = BagConfig

    def __init__(self, config: BagConfig) -> None:
        super().__init__(config)
        self.embed = torch.nn.Embedding(20, 8)
        self.head = torch.nn.Linear(8, 20)
        self.post_init()

    def forward(self, input_ids, position_ids=None, **kwargs):
        return CausalLMOutput(logits=self.head(self.embed(input_ids)))


def test_model_without_attention(tmp_path, refusal):
    AutoConfig.register("kvxform-bag", BagConfig, exist_ok=True)
    AutoModelForCausalLM.register(BagConfig, BagModel, exist_ok=True)
    BagModel(BagConfig()).save_pretrained(tmp_path / "bag")
    words = ("optimize", str(tmp_path / "bag"), "-r", "kv4", "-o", str(tmp_path / "out"))
    refusal("KVX303", *words)
    assert not (tmp_path / "out").exists()


def test_head_dim_that_a_codec_cannot_take(tmp_path, recipe, refusal):
    model = write_llama(tmp_path / "odd", head_dim=6)
    path = recipe(RECIPE.replace("bits: 4", "bits: 2"))
    line = refusal("KVX203", "optimize", str(model), "-r", path, "-o", str(tmp_path / "out"))
    assert "multiple of 4; got 6" in line
    assert not (tmp_path / "out").exists()


def test_damaged_artifact(copy, refusal):
    path = copy / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "weights.safetensors" in refusal("KVX602", "generate", str(copy), "-p", "a")


def test_artifact_with_a_file_gone(copy, refusal):
    (copy / "plan.json").unlink()
    assert "plan.json" in refusal("KVX601", "export", str(copy), "-o", str(copy / "o"))


def test_path_that_leaves_the_folder(copy, refusal):
    checksums = json.loads((copy / "checksums.json").read_text())
    checksums["files"]["../secret"] = "0" * 64
    (copy / "checksums.json").write_text(json.dumps(checksums))
    assert "'../secret'" in refusal("KVX603", "generate", str(copy), "-p", "a")


def test_prompt_longer_than_the_session(artifact, refusal):
    words = ("-p", "much too long", "--max-seq-len", "8")
    assert "8 tokens; got 13" in refusal("KVX703", "generate", str(artifact), *words)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["optimise"], "KVX801 No such command 'optimise'"),
        (["optimize", "x", "-r", "kv4"], "KVX801 Missing option '--out'"),
        (["generate", "x", "-p", "a", "--top-k", "many"], "KVX801 Invalid value"),
        (["optimize", "x", "-r", "kv4", "-o", "o", "--verify", "some"], "KVX801 Invalid value"),
        (["optimize", "/no/such/model", "-r", "kv4", "-o", "o"], "KVX301 "),
        (["generate", "/no/such/model", "-r", "kv4", "-p", "a"], "KVX301 "),
        (["export", "/no/such/model", "-o", "o"], "KVX801 "),
        (["recipes", "show", "kv5"], "KVX101 "),
    ],
)
def test_other_bad_words(words, code, refusal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refusal(code, *words)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_target_takes_no_recipe(artifact, refusal):
    refusal("KVX801", "eval", str(artifact), "-r", "kv4")


def test_session_room_is_a_matter_of_sessions(model, refusal):
    refusal("KVX801", "generate", str(model), "-p", "a", "--max-seq-len", "9")


def test_empty_prompt_and_missing_template(artifact, refusal):
    refusal("KVX801", "generate", str(artifact), "-p", "")
    refusal("KVX801", "generate", str(artifact), "-p", "a", "--chat")


def test_an_occupied_folder_is_refused_before_the_work(model, tmp_path, refusal, capsys):
    (tmp_path / "mine.txt").write_text("precious")
    refusal("KVX601", "optimize", str(model), "-r", "kv4", "-o", str(tmp_path))
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_unforeseen_errors_are_one_line_too(monkeypatch, capsys):
    def explode(*args, **kwargs):
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr("kvxform.cli.recipes._bundled", explode)
    assert main(["recipes"]) == 70
    line = capsys.readouterr().err
    assert line.startswith("KVX800 internal error: ZeroDivisionError: two lines. Hint:")
    assert main(["recipes", "--debug"]) == 70
    assert "Traceback" in capsys.readouterr().err


def test_debug_shows_where_a_coded_error_comes_from(capsys):
    assert main(["--debug", "recipes", "show", "kv5"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_interruption(monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("kvxform.cli.recipes._bundled", interrupt)
    assert main(["recipes"]) == 130


def test_the_installed_command_gives_the_exit_code():
    command = [
        sys.executable,
        "-c",
        "import sys; from kvxform.cli.main import main; sys.exit(main())",
    ]
    done = subprocess.run([*command, "recipes", "--jsn"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("KVX801 No such option: --jsn")


def test_a_reader_that_has_gone_is_no_error():
    command = (
        f"{sys.executable} -c 'import sys; from kvxform.cli.main import main; sys.exit(main())'"
    )
    script = f"set -o pipefail; {command} recipes schema | head -c 1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "{", "")


def test_options_of_a_package_are_checked_before_the_model_is_read(tmp_path, refusal):
    words = ("export", str(tmp_path / "none"), "-r", "onnx-fp16", "-o", str(tmp_path / "out"))
    assert "opset must be 18 to 25; got 17" in refusal("KVX403", *words, "--opset", "17")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    refusal("KVX601", *words)


def test_a_model_that_is_not_there(tmp_path, refusal):
    line = refusal("KVX301", "export", str(tmp_path / "none"), "-r", "kv4", "-o", "out")
    assert "no such file or folder, and no such id in the local cache" in line


def test_an_artifact_takes_no_text(artifact, tmp_path, refusal):
    words = ("export", str(artifact), "-o", str(tmp_path / "o"), "--calibration", "text.txt")
    assert "drop --calibration" in refusal("KVX801", *words)


def test_bench_of_more_tokens_than_the_model_takes(artifact, refusal):
    line = refusal("KVX801", "bench", str(artifact), "--prompt-tokens", "100000")
    assert "--prompt-tokens" in line


def test_a_package_is_not_exported_again(tmp_path, refusal):
    (tmp_path / "genai_config.json").write_text("{}")
    line = refusal("KVX801", "export", str(tmp_path), "-o", str(tmp_path / "o"))
    assert "an ONNX package is finished" in line
    refusal("KVX601", "generate", str(tmp_path), "-p", "a")  # its graph is missing


def test_a_package_of_another_level_than_that_of_the_recipe(model, tmp_path, refusal):
    """The recipe asks for CUDA, L4; what is asked for here is looked at instead."""
    words = ("export", str(model), "-r", "onnx-paged-int8", "-o", str(tmp_path / "o"))
    line = refusal("KVX403", *words, "--provider", "cpu")
    assert "level L4 is not legal here: runs on cuda alone" in line
