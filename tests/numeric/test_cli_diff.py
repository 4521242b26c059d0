"""`kvxform diff`: exit codes, formats, files, thresholds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from cached import cached_program

from kvxform.cli.main import main
from kvxform.diffing.records import DiffResult
from kvxform.runtime.model import OptimizedModel


@pytest.fixture(scope="module")
def sides(tmp_path_factory) -> tuple[str, str]:
    """Return two artifacts; the second has another weight in layer 1."""
    folder = tmp_path_factory.mktemp("sides")
    program = cached_program(dtype=torch.float32, page_size=None)
    OptimizedModel(program).save(folder / "a")
    weights = dict(program.weights)
    weights["layers.1.attn.q.weight"] = -weights["layers.1.attn.q.weight"]
    OptimizedModel(dataclasses.replace(program, weights=weights)).save(folder / "b")
    return str(folder / "a"), str(folder / "b")


def run(capsys, *words: object) -> tuple[int, str, str]:
    code = main(["diff", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_exit_codes_say_same_different_and_error(sides, capsys):
    a, b = sides
    code, out, err = run(capsys, a, a, "--no-numeric")
    assert (code, out.split(":")[0]) == (0, "SAME")
    assert "comparing graphs" in err
    code, out, _ = run(capsys, a, b, "--no-numeric")
    assert (code, out.split(":")[0]) == (1, "DIFFERENT")
    code, out, err = run(capsys, a, "nowhere/at/all", "--no-numeric")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("KVX301")


def test_json_is_the_whole_result(sides, capsys):
    code, out, _ = run(capsys, *sides, "--json", "--generate", 3)
    result = DiffResult.from_data(json.loads(out))
    assert code == result.exit_code == 1
    assert [(w.layer, w.role, w.cause) for w in result.weights] == [(1, "q", "negated")]
    assert result.numeric is not None
    assert result.numeric.first_layer == 1
    assert len(result.numeric.text.before.split()) == 3
    assert run(capsys, *sides, "--format", "json", "--generate", 3)[1] == out


def test_one_run_writes_every_format(sides, capsys, tmp_path):
    names = ["d.txt", "d.json", "d.md", "d.xml", "new/d.sarif", "d.html"]
    files = [tmp_path / name for name in names]
    words = [word for file in files for word in ("-o", file)]
    code, out, err = run(capsys, *sides, "--no-numeric", "--format", "markdown", *words)
    assert code == 1
    assert out == (tmp_path / "d.md").read_text("utf-8").rstrip("\n") + "\n"
    assert json.loads(files[1].read_text("utf-8"))["weights"]
    assert ElementTree.fromstring(files[3].read_text("utf-8")).tag.startswith("testsuite")
    assert json.loads(files[4].read_text("utf-8"))["version"] == "2.1.0"
    assert "<html" in files[5].read_text("utf-8")
    assert all(f"wrote {file}" in err.replace("\n", "") for file in files)


def test_thresholds_decide_the_exit_code(sides, capsys, tmp_path):
    limits = tmp_path / "limits.yaml"
    limits.write_text("max_weights_changed: 1\n", encoding="utf-8")
    assert run(capsys, *sides, "--no-numeric", "--thresholds", limits)[0] == 0
    limits.write_text("max_weights_changed: 0\n", encoding="utf-8")
    code, out, _ = run(capsys, *sides, "--no-numeric", "--thresholds", limits)
    assert code == 1
    assert "max_weights_changed" in out or "weights" in out.splitlines()[0]
    limits.write_text("max_weight_changed: 0\n", encoding="utf-8")
    code, _, err = run(capsys, *sides, "--thresholds", limits)
    assert (code, err.startswith("KVX111 [thresholds]")) == (2, True)
    limits.write_text("max_kl: 1\n", encoding="utf-8")
    assert run(capsys, *sides, "--no-numeric", "--thresholds", limits)[2].count("KVX113") == 1


def test_a_file_without_a_format_is_refused_before_any_work(sides, capsys, tmp_path):
    code, out, err = run(capsys, *sides, "-o", tmp_path / "diff.doc")
    assert (code, out) == (2, "")
    assert err.startswith("KVX801")
    assert "end it in .txt" in err


def test_a_file_that_cannot_be_written_is_an_error(sides, capsys, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    code, _, err = run(capsys, *sides, "--no-numeric", "-o", tmp_path / "file" / "d.md")
    assert (code, "KVX801" in err) == (2, True)


def test_names_of_sides_have_no_folders_of_this_machine(sides, capsys):
    out = run(capsys, *sides, "--no-numeric", "--json")[1]
    assert str(Path(sides[0]).parent) not in out
