"""What `kvxform bisect` prints, and its exit codes; nothing is searched here."""

from __future__ import annotations

import json
from pathlib import Path

import kvxform
from kvxform.bisecting.records import BisectResult, Culprit, StageRow, Subgraph
from kvxform.cli.bisect import report_lines
from kvxform.cli.main import main

PART = Subgraph(
    nodes=3,
    nodes_before=90,
    inputs=("q",),
    output="attention in layers.4.attn",
    steps=("rotate-qk",),
    tokens=5,
    failure="KVX212 on the part",
    changes=("scale of layer 4: 0.25 -> 0.5",),
)


def found(*layers: int, **fields: object) -> BisectResult:
    culprits = tuple(
        Culprit((layer,), (layer,), f"layers.{layer}.attn", "KVX212 here") for layer in layers
    )
    stages = (StageRow("insert-cache", 1e-7, 2e-9), StageRow("rotate-qk", 0.5, 0.25, True))
    result = BisectResult("toy", "mine", stages, "rotate-qk", "rotate-qk", "KVX212 broken", 30)
    return BisectResult(**{**vars(result), "culprits": culprits, **fields})


def test_one_site_is_said_in_one_sentence():
    lines = report_lines(found(4, subgraph=PART, repro=Path("out")))
    assert lines == [
        "KVX212 broken",
        "It fails at layer 4 (layers.4.attn): 1 of 30 places.",
        "3 of 90 operations show it, at attention in layers.4.attn.",
        "  scale of layer 4: 0.25 -> 0.5",
        "Run it: python out/repro.py",
    ]


def test_many_sites_are_folded_and_the_worst_are_listed():
    lines = report_lines(found(*range(4, 12), note="no part of the model fails on its own"))
    assert lines[1].startswith("It fails at layers 4-11 (layers.4.attn, layers.5.attn, layers.6")
    assert lines[2] == "  layers.4.attn: KVX212 here"
    assert lines[7:] == ["  and 3 more", "Note: no part of the model fails on its own."]


def test_every_site_and_no_site_are_said_as_such():
    assert found(0, 1, matches=2).where == "It fails wherever it applies, at 2 places."
    assert found().where == "Where it fails is not known."


def test_exit_codes_and_what_goes_where(monkeypatch, capsys):
    asked = {}

    def fake(model, recipe, **options):
        asked.update(options, model=model, recipe=recipe)
        return answers.pop(0)

    clean = BisectResult("toy", "mine", (StageRow("insert-cache", 0.0, 0.0),))
    answers = [found(4, subgraph=PART), found(4, subgraph=PART, repro=Path("out")), clean]
    monkeypatch.setattr(kvxform, "bisect", fake, raising=False)
    assert main(["bisect", "toy", "-r", "mine", "--max-kl", "0.5"]) == 1
    text = capsys.readouterr().out
    assert "rotate-qk" in text
    assert "FAILS" in text
    assert asked["bound"] == {"max_kl": 0.5}
    assert main(["bisect", "toy", "-r", "mine", "-o", "out", "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["culprits"][0]["layers"] == [4]
    assert data["repro"] == "out"
    assert asked["bound"] is None
    assert asked["out"] == Path("out")
    assert main(["bisect", "toy", "-r", "mine"]) == 0
    assert "No pass of mine fails on toy." in capsys.readouterr().out
