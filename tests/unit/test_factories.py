"""Models made by a function in a file, `FILE.py:FUNCTION`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from kvxform.capture.factories import call_factory, split_factory
from kvxform.capture.sources import open_source
from kvxform.errors import CaptureError

SOURCE = """
import dataclasses
import torch
from torch import nn
from beside import WIDTH

@dataclasses.dataclass
class Sizes:
    width: int = WIDTH

def make_model():
    return nn.Linear(Sizes().width, 2).train()

def needs(argument):
    return nn.Linear(argument, 2)

def broken():
    raise ValueError("no weights\\nhere")

def text():
    return "a model"
"""


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "beside.py").write_text("WIDTH = 3\n")
    path = tmp_path / "model.py"
    path.write_text(SOURCE)
    return path


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("model.py:make_model", ("model.py", "make_model")),
        ("a b/m.py:f", ("a b/m.py", "f")),
        ("C:/m.py:f", ("C:/m.py", "f")),
        ("model.py", None),
        ("model.py:", None),
        ("model.py:a.b", None),
        ("model.gguf:f", None),
        ("org/model", None),
        (".py:f", None),
    ],
)
def test_what_names_a_factory(text, parts):
    assert split_factory(text) == parts


def test_modules_beside_the_file_are_found_and_nothing_stays_behind(file):
    before, path = set(sys.modules), list(sys.path)
    model = call_factory(str(file), "make_model")
    assert isinstance(model, nn.Linear)
    assert model.in_features == 3
    assert sys.path == path
    assert set(sys.modules) - before <= {"beside"}
    del sys.modules["beside"]


def test_a_model_is_the_same_every_time_and_the_callers_numbers_stay(file):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, two = (call_factory(str(file), "make_model") for _ in range(2))
    assert torch.equal(one.weight, two.weight)
    assert torch.equal(torch.rand(3), expected)


def test_it_is_a_source_in_evaluation_mode_with_the_name_of_file_and_function(file):
    opened = open_source(f"{file}:make_model")
    assert opened.info.name == "model.py:make_model"
    assert not opened.model.training
    assert open_source(f"{file}:make_model", name="mine").info.name == "mine"


@pytest.mark.parametrize(
    ("function", "got"),
    [
        ("missing", "AttributeError"),
        ("needs", "TypeError"),
        ("broken", "ValueError: no weights at"),
        ("text", "a str"),
    ],
)
def test_one_line_says_what_is_wrong(file, function, got):
    with pytest.raises(CaptureError, match="KVX301") as caught:
        call_factory(str(file), function)
    assert got in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(CaptureError, match="no such file"):
        call_factory(str(tmp_path / "model.py"), "make_model")
