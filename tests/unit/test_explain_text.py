"""Explanations as text: golden pages, folding of layers, exceptions, refusals."""

from __future__ import annotations

import dataclasses
import json

import pytest
from programs import gpt2_program, llama_program

import kvxform.ir.ops as kvx
from kvxform.errors import CaptureError, KvxformError
from kvxform.explain import explain_failure, explain_program, make_question
from kvxform.ir.folding import fold_names, fold_sentence
from kvxform.ir.program import Program, RejectedSite
from kvxform.recipe import load_recipe

ODD = RejectedSite(
    "layers.2.attn",
    "the mask is neither causal nor a sliding window",
    "softmax (toy.py:40)",
    ("core: softmax of scores with scale 0.25",),
    "triu (toy.py:33)",
    "use a causal mask",
)


def as_captured(program: Program) -> Program:
    """Give attentions the same op name, as those of a captured model have."""
    for node in program.calls(kvx.ATTENTION):
        node.meta["origin"] = "softmax (toy.py:40)"
    return program


def example() -> Program:
    """Five layers: 1 and 3 with a window, 4 with a scale of its own; two left alone; one mixer."""
    program = as_captured(llama_program(layers=5))
    sites = list(program.sites)
    for layer in (1, 3):
        sites[layer] = dataclasses.replace(sites[layer], window=8)
    sites[4] = dataclasses.replace(sites[4], scale=0.5, rope=None, notes=("rotary embedding kept",))
    program.sites = tuple(sites)
    other = dataclasses.replace(ODD, module="layers.5.attn")
    mixer = RejectedSite("layers.6.conv", "tokens meet in it", "conv1d (toy.py:9)", kind="mixer")
    program.rejected = (ODD, other, mixer)
    return program


def test_page_of_a_llama(golden):
    golden(
        "explain/llama.txt", explain_program(as_captured(llama_program(layers=4))).to_text() + "\n"
    )


def test_page_of_gpt2(golden):
    golden("explain/gpt2.txt", explain_program(as_captured(gpt2_program())).to_text() + "\n")


def test_page_with_exceptions(golden):
    golden("explain/exceptions.txt", explain_program(example()).to_text() + "\n")


def test_page_of_a_recipe(golden):
    codec = {"codec": "int", "bits": 4, "axis": "token"}
    quantize = {"quantize-kv": {"key": codec, "value": codec, "regions": {"recent": 8}}}
    passes = ["insert-cache", "page-cache", quantize, "simplify"]
    question = make_question(None, load_recipe({"version": 1, "name": "mine", "passes": passes}))
    explanation = explain_program(llama_program(head_dim=64, kv_heads=1), question)
    golden("explain/recipe.txt", explanation.to_text() + "\n")


def test_json_has_every_layer_and_keeps_its_form(golden):
    program = llama_program(layers=2)
    program.rejected = (ODD,)
    data = explain_program(program, make_question("rotate-v", None)).to_data()
    assert [site["layer"] for site in data["sites"]] == [0, 1]
    assert data["version"] == 1
    data["sites"] = data["sites"][:1]
    golden("explain/llama.json", json.dumps(data, indent=1) + "\n")


def test_a_model_without_attention_has_its_candidates():
    rule, hint = "a model must have attention", "kvxform explain"
    error = CaptureError("KVX303", rule, hint=hint, rejected=[ODD])
    explanation = explain_failure(error, "toy")
    assert not explanation.is_fine
    assert explanation.to_text().splitlines() == [
        "toy: attention: 0 raised, 1 rejected",
        "KVX303 a model must have attention.",
        "",
        "rejected    layers.2.attn",
        "  candidate  softmax (toy.py:40)",
        "  + core     softmax of scores with scale 0.25",
        "  - mask     the mask is neither causal nor a sliding window",
        "  differs    first at triu (toy.py:33)",
        "  to change  use a causal mask",
    ]


@pytest.mark.parametrize(
    ("layer", "modules"),
    [
        (1, ["layers.1.attn"]),
        ("1", ["layers.1.attn"]),
        ("layers.3.attn", ["layers.3.attn"]),
        ("3.attn", ["layers.3.attn"]),
        ("layers.5.attn", ["layers.5.attn"]),
        ("attn", [f"layers.{i}.attn" for i in (0, 1, 3, 4, 2, 5)]),
    ],
)
def test_one_layer_alone(layer, modules):
    program = example()
    program.sites = tuple(s for s in program.sites if s.layer != 2)  # there ODD was left alone
    found = explain_program(program, layer=layer)
    assert [s.module for s in (*found.sites, *found.rejected)] == modules


@pytest.mark.parametrize(
    ("layer", "hint"),
    [("7", "indices are 0 to 4"), ("-1", "0 to 4"), ("layers.9.attn", "did you mean 'layers.")],
)
def test_a_layer_that_is_not_there_is_refused(layer, hint):
    with pytest.raises(KvxformError, match=hint) as caught:
        explain_program(example(), layer=layer)
    assert caught.value.code == "KVX801"


def test_a_layer_takes_its_norms_along():
    found = explain_program(llama_program(), make_question("fuse-norms", None), layer=1)
    (finding,) = found.passes
    assert {place.module for place in finding.places} == {"layers.1.attn", "layers.1.mlp"}


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        (["a.0.b", "a.1.b", "a.3.b"], ["a.(0-1, 3).b"]),
        (["a.0.b", "c", "a.1.b"], ["a.0-1.b", "c"]),
        (["h.2.x"], ["h.2.x"]),
        (["a.0.1", "a.1.0"], ["a.*.*"]),
        (["v2.0.b", "v2.1.b"], ["v2.0-1.b"]),
        ([], []),
    ],
)
def test_names_are_folded(names, folded):
    assert fold_names(names) == folded


def test_sentences_keep_their_figures():
    text = "scale 0.353553, window 8, model.py:181, layers.12.attn, add_7"
    assert fold_sentence(text) == "scale 0.353553, window 8, model.py:181, layers.*.attn, add_*"
