"""Families and plain models against the unrewritten model; the coverage table against the truth."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from families import ALL, NAMED, OTHERS, PLAIN
from family_checks import (
    Subject,
    check_logits,
    check_sites,
    check_tokens,
    compare_export,
    count_attentions,
    generate_cached,
    relative,
    source_logits,
    token_ids,
)
from family_rows import Row, measure
from family_table import read, render
from models import plain

QUICK = (
    "llama", "qwen3", "gemma3_text", "gpt_oss", "gpt2", "bloom", "by hand",
)  # fmt: skip
TABLE = Path(__file__).parents[2] / "docs" / "coverage.md"


def family(name):
    """Return `name` as a parameter; one family of each kind of attention is in the quick set."""
    return name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [family(name) for name in [*NAMED, *PLAIN]])
def test_the_exact_cache_of_a_family(name):
    """In float64, where no two tokens tie; the rows of the table hold the rest."""
    subject = Subject.of(ALL[name], torch.float64)
    check_sites(subject)
    exact = subject.optimise("exact")
    assert len(exact.plan.sites) == count_attentions(subject.model)
    check_logits(subject, exact)
    check_tokens(subject, [exact], count=16)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_a_row_of_the_table_is_true(name):
    assert measure(ALL[name]).cells == read(TABLE.read_text(encoding="utf-8"))[name].cells


def test_the_table_lists_the_registry():
    text = TABLE.read_text(encoding="utf-8")
    assert list(read(text)) == list(ALL)
    assert len(NAMED) == 30
    assert len(ALL) == len(NAMED) + len(PLAIN) + len(OTHERS)


def test_the_table_reads_as_it_was_written():
    rows = {
        "llama": Row("llama", "2 of 2"),
        "by hand": Row("by hand", "1 of 2", {"sites": "a: b, c", "exact": "a: b, c", "kv4": "d"}),
        "jamba": Row("jamba", "1 of 1", {"ONNX": "e"}, ["left alone: f", "g"]),
    }
    text = render(rows)
    assert read(text) == rows
    assert "| by hand | 1 of 2 | no | no | yes |" in text
    assert "- by hand, sites, exact: a: b, c\n" in text
    assert "- jamba: left alone: f\n" in text


def test_every_no_in_the_table_has_a_reason():
    """A cell is `no` exactly if there is a reason, so the page must be what its rows render to."""
    text = TABLE.read_text(encoding="utf-8")
    start = text.index("## Named")
    assert render(read(text)).split("## Named")[1] == text[start:].split("## Named")[1]


# The checks themselves: each must see what it is there for.


def test_attentions_are_counted_however_they_are_written():
    for options in ({"by_hand": True}, {"by_hand": False}, {"layers": 3, "by_hand": True}):
        assert count_attentions(plain("gpt", **options)) == options.get("layers", 2)


@pytest.fixture(scope="module")
def llama():
    return Subject.of(NAMED["llama"], torch.float64).program


def test_an_attention_that_was_not_found_is_missed(llama):
    less = dataclasses.replace(llama, sites=llama.sites[1:])
    with pytest.raises(AssertionError, match="1 of 2 attentions"):
        check_sites(Subject(NAMED["llama"].build(torch.float64), less))


def test_a_model_with_other_weights_is_told_apart(llama):
    subject = Subject(NAMED["llama"].build(torch.float64), llama)
    exact = subject.optimise("exact")
    with torch.no_grad():
        subject.model.model.layers[1].self_attn.k_proj.weight[0, 0] += 1e-3
    with pytest.raises(AssertionError, match="logits differ"):
        check_logits(subject, exact)
    with torch.no_grad():
        subject.model.model.layers[1].self_attn.v_proj.weight += 0.3
    with pytest.raises(AssertionError, match="tokens of row"):
        check_tokens(subject, [exact], count=16)


def test_where_tokens_part_the_lead_is_told(llama):
    subject = Subject(NAMED["llama"].build(torch.float64), llama)
    exact = subject.optimise("exact")
    with torch.no_grad():  # all tokens tie but for rounding
        subject.model.lm_head.weight[:] = subject.model.lm_head.weight[:1]
    with pytest.raises(AssertionError, match="part after 0, at a lead of 0e\\+00"):
        check_tokens(subject, [exact], count=2)


def test_exports_are_compared_by_value_and_lossy_ones_by_distribution():
    expected = torch.randn(2, 5, 97)
    compare_export(expected + 1e-5, expected, lossy=False)
    compare_export(expected + 1e-2, expected, lossy=True)
    with pytest.raises(AssertionError, match="ONNX"):
        compare_export(expected + 1e-2, expected, lossy=False)
    with pytest.raises(AssertionError, match="nats"):
        compare_export(expected.roll(1, -1), expected, lossy=True)


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_windows_of_the_families_matter(name):
    """Else a lost window would go unnoticed: the same weights without one give other logits."""
    model = NAMED[name].build(torch.float64)
    fields = {k: v for k, v in NAMED[name].fields.items() if k not in ("layer_types",)}
    wide = type(NAMED[name])(name, {**fields, "sliding_window": 160}).build(torch.float64)
    ids = token_ids(1, 13)
    assert relative(source_logits(wide, ids), source_logits(model, ids)) > 1e-3


def test_the_reference_continues_with_its_own_cache():
    model = NAMED["llama"].build(torch.float64)
    prompt = token_ids(1, 5)
    logits = generate_cached(model, prompt, 6)
    whole = torch.cat([prompt, logits.argmax(-1)[None]], 1)
    error = relative(logits, source_logits(model, whole)[0, 4:-1])
    assert error < 1e-6  # generate() hands out logits in float32
