"""The table of codecs and lowerings in the docs is that of the code."""

from __future__ import annotations

from pathlib import Path

from kvxform.cli.lowerings import lowering_table

PAGE = Path(__file__).parents[2] / "docs" / "codecs.md"


def expected_table():
    """Return the lines of the table, from the tables by which lowerings refuse codecs."""
    known = {name: set(names.split(", ")) for name, names in lowering_table()["codecs"].items()}
    lines = [f"| codec | {' | '.join(known)} |", f"| --- {'| --- ' * len(known)}|"]
    for codec in sorted(set.union(*known.values())):
        cells = ["yes" if codec in names else "-" for names in known.values()]
        lines.append(f"| `{codec}` | {' | '.join(cells)} |")
    return lines


def test_the_docs_say_which_lowering_runs_which_codec():
    content = PAGE.read_text(encoding="utf-8")
    shown = content.partition("<!-- lowerings -->\n")[2].partition("<!-- /lowerings -->")[0]
    expected = expected_table()
    assert shown.splitlines() == expected, "the table must be\n" + "\n".join(expected)
