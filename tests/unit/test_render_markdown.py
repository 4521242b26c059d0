"""A diff as a comment: read without the docs, and nothing in it can change the comment."""

from __future__ import annotations

import dataclasses
import re

import pytest
from diff_samples import ALL, bare, recipe_change, rope_fault, same
from markdown_it import MarkdownIt

from kvxform.diffing.records import CountChange, Finding, NodeChange
from kvxform.diffing.render_markdown import render_markdown


def page(text: str) -> str:
    """Return the HTML that CommonMark with tables makes of `text`."""
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(text)


@pytest.mark.parametrize("name", ["rope_fault", "over_limits"])
def test_markdown(golden, name):
    golden(f"diff/{name}.md", render_markdown(ALL[name]) + "\n")


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("same", "### ✅ kvxform diff: same"),
        ("within_limits", "### ⚠️ kvxform diff: within limits"),
        ("over_limits", "### ❌ kvxform diff: over limits"),
    ],
)
def test_the_first_line_is_the_answer(name, start):
    assert render_markdown(ALL[name]).splitlines()[0] == start


def test_details_are_folded_away_and_close():
    text = render_markdown(recipe_change())
    assert text.count("<details>") == text.count("</details>") == 2
    html = page(text)
    assert "<table>" in html
    assert html.index("<details>") > html.index("Both sides on the same inputs")


def test_code_stays_in_its_block():
    html = page(render_markdown(recipe_change()))
    blocks = re.findall(r"<pre><code[^>]*>(.*?)</code></pre>", html, re.DOTALL)
    assert len(blocks) == 4
    assert any("kvx.cached_attention(%, %, %, window=128)" in block for block in blocks)


def test_nothing_breaks_out_of_tables_code_or_text():
    html = page(render_markdown(ALL["hostile"]))
    assert "<b>&" not in html
    assert "@all" not in re.sub(r"<code.*?</code>", "", html, flags=re.DOTALL)
    rows = re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL)
    assert {row.count("<td") + row.count("<th") for row in rows} <= {2, 3, 4, 5}
    assert "\x1b" not in html
    assert html.count("<h3>") == 1
    assert "<h1>" not in html


@pytest.mark.parametrize(
    "text",
    [
        "[x](https://a.b)",
        "![x](y)",
        "[x][y]",
        "> quoted",
        "_em_ and *em* and ~~gone~~",
        "a_b_c stays [2, 3] -> [4]",
        "`code` &lt; <i>",
        "# heading",
        "\\*",
    ],
)
def test_text_is_shown_as_it_is(text):
    finding = Finding("rule", "error", text)
    html = page(render_markdown(dataclasses.replace(same(), findings=(finding,))))
    row = re.findall(r"<td>(.*?)</td>", html)
    assert html_of(text) in row
    assert f"<p>{html_of(text)}; ".lower() in html.lower()  # a sentence begins large


def html_of(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def test_a_fence_in_a_name_does_not_end_the_block():
    nodes = (NodeChange("added", 0, "op", "", after="```` <script>"),)
    structure = dataclasses.replace(recipe_change().structure, nodes=nodes)
    html = page(render_markdown(recipe_change(structure=structure)))
    assert "<script>" not in html
    assert "```` &lt;script&gt;" in html


def test_a_comment_is_never_longer_than_github_takes():
    counts = tuple(CountChange(f"operation number {i}", i, 0) for i in range(5000))
    structure = dataclasses.replace(recipe_change().structure, histogram=counts)
    text = render_markdown(recipe_change(structure=structure))
    assert len(text) < 65536
    assert "Too long for a comment" in text
    assert "Plan of the cache" in text


def test_what_was_not_run_is_said():
    assert "Not run" in render_markdown(dataclasses.replace(same(), numeric=None))
    assert "Not run" not in render_markdown(bare())


def test_the_text_both_write_is_shown_where_it_parts():
    text = render_markdown(rope_fault())
    assert "Generated text parts after 2 tokens" in text
    assert "France is Paris" in text
