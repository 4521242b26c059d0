"""Every example runs and prints what it promises."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    """Return `run(name)`: the lines that the `main` of an example prints."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def call(name: str) -> list[str]:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.main()
        return capsys.readouterr().out.splitlines()

    return call


def test_optimize_tiny_llama(run):
    lines = run("optimize_tiny_llama")
    assert lines[0] == "288 bytes per token, 4.5 bits per value"
    assert lines[-2] == "lengths (12, 11), 36864 bytes of cache"
    assert lines[-1].endswith(": True")


def test_custom_recipe(run):
    lines = run("custom_recipe")
    assert lines[1] == "3.50 bits per value in a long sequence"
    assert lines[-1].startswith("refused: KVX104")


def test_export_onnx(run):
    files, torch_line, onnx_line = run("export_onnx")
    assert "model.onnx" in files
    assert torch_line.split(maxsplit=1)[1] == onnx_line.split(maxsplit=1)[1]


def test_every_example_is_run_here():
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in EXAMPLES.glob("*.py")} <= tested
