"""Texts: the default one, files, and what cannot be read."""

from __future__ import annotations

import pytest
import torch

from kvxform.errors import KvxformError
from kvxform.texts import default_text, encode_text, read_text


def test_the_default_text_is_long_and_always_the_same():
    assert len(default_text()) > 400_000
    assert default_text() == default_text() == read_text(None)


def test_a_file_is_read_as_it_is(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text(" Größe <unk>\n", encoding="utf-8")
    assert read_text(path) == " Größe <unk>\n"


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00bad"])
def test_what_is_not_a_text_is_refused(tmp_path, content):
    path = tmp_path / "t.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(KvxformError, match="readable UTF-8 file") as caught:
        read_text(path)
    assert caught.value.code == "KVX801"


def test_no_special_tokens_are_added():
    calls = []

    def tokenizer(text, **options):
        calls.append(options)
        return {"input_ids": [len(word) for word in text.split()]}

    assert torch.equal(encode_text(tokenizer, "a bb ccc"), torch.tensor([1, 2, 3]))
    assert calls[0]["add_special_tokens"] is False
