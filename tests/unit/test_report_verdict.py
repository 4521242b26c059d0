"""What a report says in words at its top, and how each of its claims is known."""

from __future__ import annotations

import dataclasses
import re

import pytest
from reports import EXACT, LOSSY, make_pass, make_report

from kvxform.formats import format_number
from kvxform.healing_record import HealedQuality, HealingRecord
from kvxform.report import BoundRecord, Report
from kvxform.report_claims import claims
from kvxform.report_verdict import verdict

TIMES = "\N{MULTIPLICATION SIGN}"


def said(report: Report) -> dict[str, tuple[str, str]]:
    return {p.label: (p.tone, re.sub(r"\s", " ", p.text)) for p in verdict(report).points}


def test_verdict_of_an_exact_recipe():
    report = make_report(passes=(make_pass("a", "exact", EXACT),), bounds=())
    source = dataclasses.replace(report.source, sites_rejected=())
    report = dataclasses.replace(report, source=source)
    found = verdict(report)
    assert found.tone == "good"
    assert "the model computes what it did before" in found.title
    assert "up to rounding" in said(report)["Answers"][1]
    assert said(report)["Trust"][1].startswith("The only step changes nothing")


def test_verdict_of_a_lossy_recipe_names_what_changed_the_answers():
    found = said(make_report())
    assert found["Answers"][0] == "warn"
    assert found["Answers"][1].startswith("quantize-kv changes them: a divergence of 0.0625 nats")
    assert found["Limits"] == ("warn", "Not measured: min_top1.")
    assert found["Left alone"] == ("warn", "1 of 4 attentions was not recognised and not changed.")


def test_verdict_of_limits():
    kept = (BoundRecord("max_kl", 0.1, 0.0625),)
    assert said(make_report(bounds=kept))["Limits"] == ("good", "The limit of the recipe is kept.")
    over = (BoundRecord("max_kl", 0.01, 0.0625),)
    assert said(make_report(bounds=over))["Limits"] == ("bad", "Exceeded: max_kl.")
    assert verdict(make_report(bounds=over)).tone == "bad"


@pytest.mark.parametrize(
    ("after", "words"),
    [(46080.0, f"The cache is 2.00{TIMES} larger"), (23040.0, "The cache is as large as before")],
)
def test_verdict_of_a_cache_that_did_not_shrink(after, words):
    plan = dataclasses.replace(make_report().plan, kv_bytes_per_token=after)
    assert verdict(make_report(plan=plan)).title.startswith(words)


def test_a_pass_that_needs_training_is_something_to_do_until_the_model_is_healed():
    passes = (make_pass("share-kv-layers", "needs training", LOSSY),)
    assert "kvxform heal" in said(make_report(passes=passes))["To do"][1]
    before, after = HealedQuality(20.0, 0.5, 0.8), HealedQuality(18.0, 0.25, 0.9)
    healing = HealingRecord(
        "a text", 10, 10, 1e-3, None, 0, 1, 64, 2, 128, 8, 4, 17.0, before, after
    )
    healed = said(make_report(passes=passes, healing=healing))
    assert "To do" not in healed
    assert healed["Healing"] == (
        "good",
        "Training took the divergence on held-out text from 0.5 to 0.25 nats per token.",
    )


def test_claims_say_how_each_is_known():
    found = {claim.what: claim for claim in claims(make_report())}
    assert found["insert-cache changes nothing"].known == "proved"
    assert found["insert-cache changes nothing"].found == format_number(EXACT.relative)
    assert found["what quantize-kv costs"].known == "measured"
    assert found["what quantize-kv costs"].allowed == "no bound of its own"
    assert found["bytes, bits and reads of the cache"].known == "computed"
    assert found["quality on text of people"].known == "not checked"
    order = [claim.known for claim in claims(make_report())]
    assert order == sorted(order, key=["proved", "measured", "computed", "not checked"].index)


def test_exact_passes_share_a_claim_with_the_worst_of_them():
    worse = dataclasses.replace(EXACT, relative=2e-5)
    passes = (make_pass("a", "exact", EXACT), make_pass("b", "exact", worse))
    (claim,) = [c for c in claims(make_report(passes=passes)) if c.known == "proved"]
    assert claim.what == "a, b: 2 steps change nothing"
    assert claim.found == format_number(2e-5)


def test_nothing_is_claimed_as_measured_that_was_not():
    passes = (make_pass("a", "exact", None), make_pass("b", "approximate", None))
    bare = make_report(verify="none", passes=passes, cache=None)
    bare = dataclasses.replace(bare, source=dataclasses.replace(bare.source, capture_error=None))
    assert not [c for c in claims(bare) if c.known == "measured"]
    assert "answers of the model" in [c.what for c in claims(bare)]
