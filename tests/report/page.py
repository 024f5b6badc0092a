"""A written page as a test reads it."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

_VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Text under each heading, rows of each table under its heading, and all elements with their attributes."""

    def __init__(self, path: Path):
        super().__init__(convert_charrefs=True)
        self.sections: dict[str, str] = {}
        self.tables: dict[str, list[list[str]]] = {}
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.titles: list[str] = []
        self._open: list[str] = []
        self._heading = ""
        self.source = path.read_text()
        self.feed(self.source)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in _VOID:
            return
        self._open.append(tag)
        if tag in ("h1", "h2"):
            self._heading = ""
        elif tag == "tr":
            self.tables.setdefault(self._heading, []).append([])
        elif tag in ("th", "td"):
            self.tables[self._heading][-1].append("")
        elif tag == "title":
            self.titles.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        words = " ".join(data.split())
        if not words or "style" in self._open:
            return
        if "title" in self._open:
            self.titles[-1] += words
        elif {"h1", "h2"} & set(self._open):
            self._heading += words
        else:
            self.sections[self._heading] = f"{self.sections.get(self._heading, '')} {words}".strip()
            if {"th", "td"} & set(self._open):
                cell = self.tables[self._heading][-1]
                cell[-1] = f"{cell[-1]} {words}".strip()

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        """Of all elements of this kind."""
        return [attributes for name, attributes in self.elements if name == tag]
