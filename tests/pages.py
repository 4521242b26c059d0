"""Reads HTML pages for tests."""

from __future__ import annotations

import re
from html.parser import HTMLParser


class Page(HTMLParser):
    """Collects tags, links and text; complains about tags that do not close."""

    VOID = ("meta", "line", "rect", "circle", "polyline", "link", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    @property
    def is_self_contained(self) -> bool:
        """Whether the page needs no script, no other file and no network."""
        loads = {"script", "img", "link", "iframe"} & {tag for tag, _ in self.tags}
        names = {"src", "href", "srcset", "onclick"}
        return not loads and not any(names & attributes.keys() for _, attributes in self.tags)
