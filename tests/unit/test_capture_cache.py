from __future__ import annotations

import os
import time

import pytest
import torch

from kvxform.errors import PassError
from kvxform.folders import cache_folder
from kvxform.ir.capture_cache import load_capture, save_capture
from kvxform.ir.text import format_program
from kvxform.ir.verify import verify_program
from tests.programs import llama_program


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("KVXFORM_CACHE_DIR", str(tmp_path))
    return tmp_path / "captures"


def test_a_capture_comes_back_without_weights():
    program = llama_program(tied=True)
    program.weights["norm.weight"] = program.weights["layers.0.norm1.weight"]
    save_capture("key", program)
    loaded = load_capture("key")
    assert loaded is not None
    verify_program(loaded)
    assert format_program(loaded) == format_program(program)
    assert loaded.weights.keys() == program.weights.keys()
    for name, weight in loaded.weights.items():
        if name == "inv_freq":  # small, and `explain` reads theta from it
            assert torch.equal(weight, program.weights[name])
        else:
            assert weight.is_meta
    assert loaded.weights["norm.weight"] is loaded.weights["layers.0.norm1.weight"]
    save_capture("again", loaded)
    assert format_program(load_capture("again")) == format_program(program)


def test_an_unknown_key_has_no_capture():
    save_capture("key", llama_program())
    assert load_capture("other") is None
    assert load_capture("../../etc/passwd") is None


def test_a_key_is_any_text(folder):
    save_capture("../a b\n" + "x" * 1000, llama_program())
    assert load_capture("../a b\n" + "x" * 1000) is not None
    assert len(os.listdir(folder)) == 1


@pytest.mark.parametrize("position", [0, 70, 500, -3])
def test_a_damaged_entry_is_ignored_and_written_again(folder, position):
    save_capture("key", llama_program())
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[position] ^= 1
    path.write_bytes(damaged)
    assert load_capture("key") is None
    path.write_bytes(whole[:position])
    assert load_capture("key") is None
    save_capture("key", llama_program())
    assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_no_error(folder):
    folder.write_text("in the way")
    save_capture("key", llama_program())
    assert load_capture("key") is None


def test_an_invalid_program_is_not_given_out(folder):
    program = llama_program()
    program.sites = program.sites[:1]
    with pytest.raises(PassError):
        verify_program(program)
    save_capture("key", program)
    assert load_capture("key") is None


def test_a_capture_of_many_layers_loads_fast_enough_for_plan():
    save_capture("key", llama_program(layers=30))
    start = time.perf_counter()
    assert load_capture("key") is not None
    assert time.perf_counter() - start < 2.0  # seconds; 0.2 on an idle machine


def test_the_folder_of_the_user_is_the_default(monkeypatch):
    monkeypatch.delenv("KVXFORM_CACHE_DIR")
    assert cache_folder().name == "kvxform"
    assert cache_folder().is_absolute()
