"""Damaged packages: one clear line, or the same as before."""

from __future__ import annotations

import random
import shutil

import pytest
import torch
from cached import cached_program
from programs import token_ids

from kvxform.codegen.onnx import export_onnx
from kvxform.codegen.onnx.forms import OnnxOptions
from kvxform.diffing.outline_onnx import read_onnx
from kvxform.errors import ArtifactError, KvxformError
from kvxform.runtime.onnx_session import OnnxSession

STATIC = {"codec": "static-int", "bits": 8, "scale": [0.1]}
READ_BY_GENAI = "genai_config.json"  # and by nobody else


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    program = cached_program({"key": STATIC, "value": STATIC}, None, dtype=torch.float32, layers=1)
    tokenizer = tmp_path_factory.mktemp("tokenizer")
    (tokenizer / "tokenizer.json").write_text("{}")
    (tokenizer / "chat_template.jinja").write_text("{{ messages }}")
    target = tmp_path_factory.mktemp("package") / "out"
    return export_onnx(program, target, OnnxOptions(level="L3"), tokenizer_path=tokenizer)


def logits(package):
    ids = token_ids(cached_program(None, None, dtype=torch.float32, layers=1), 1, 5)
    return OnnxSession(package, threads=1).prefill(ids)


def damage(content: bytes, how: str, draw: random.Random) -> bytes:
    """Return other bytes than `content`."""
    place = draw.randrange(len(content))
    if how == "cut":
        return content[:place]
    if how == "flip":
        return (
            content[:place]
            + bytes([content[place] ^ 1 << draw.randrange(8)])
            + content[place + 1 :]
        )
    if how == "insert":
        return content[:place] + draw.randbytes(draw.randrange(1, 9)) + content[place:]
    size = draw.randrange(1, 9)
    return content[:place] + draw.randbytes(size) + content[place + size :]


def damaged(folder, target, seed):
    """Copy a package with one damaged file; return its name, or None if it is as it was."""
    draw = random.Random(seed)
    shutil.copytree(folder, target)
    path = draw.choice(sorted(target.iterdir()))
    before = path.read_bytes()
    after = damage(before, draw.choice(["cut", "flip", "insert", "overwrite"]), draw)
    path.write_bytes(after)
    return None if after == before else path.name


def outcome(action):
    """Return what an action gives, or the error that it raises on purpose."""
    try:
        return action()
    except KvxformError as error:
        return error


def is_clear(error: KvxformError) -> bool:
    codes = ("KVX601", "KVX602", "KVX603", "KVX604")
    return isinstance(error, ArtifactError) and error.code in codes and "\n" not in str(error)


def check(folder, target, seed):
    name = damaged(folder, target, seed)
    found = outcome(lambda: logits(target))
    if isinstance(found, KvxformError):
        assert is_clear(found), str(found)
        assert name not in (None, READ_BY_GENAI)
    else:
        assert torch.equal(found, logits(folder))
        assert name in (None, READ_BY_GENAI, "kvxform.json")


@pytest.mark.parametrize("seed", range(8))
def test_damage_gives_one_clear_line_or_changes_nothing(seed, folder, tmp_path):
    check(folder, tmp_path / "copy", seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8, 208))
def test_much_damage_gives_one_clear_line_or_changes_nothing(seed, folder, tmp_path):
    check(folder, tmp_path / "copy", seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
def test_a_damaged_package_that_is_compared_gives_one_clear_line_or_is_read(seed, folder, tmp_path):
    damaged(folder, tmp_path / "copy", seed)
    found = outcome(lambda: read_onnx(tmp_path / "copy"))
    if isinstance(found, KvxformError):
        assert is_clear(found), str(found)
    else:
        assert found.outline.nodes
