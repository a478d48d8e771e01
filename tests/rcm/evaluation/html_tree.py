"""Elements of an HTML page, and parts of the page of `python -m rcm.report`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"img", "meta", "link"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None] = field(default_factory=dict)
    children: list[Element | str] = field(default_factory=list)

    def all(self, tag: str, class_: str | None = None) -> Iterator[Element]:
        for child in self.children:
            if isinstance(child, Element):
                if child.tag == tag and class_ in (None, *(child["class"] or "").split()):
                    yield child
                yield from child.all(tag, class_)

    def one(self, tag: str, class_: str | None = None) -> Element:
        [found] = self.all(tag, class_)
        return found

    def named(self, label: str) -> Element:
        """The region of that name."""
        [found] = [x for x in self.all("div") if x["aria-label"] == label]
        return found

    def rows(self) -> list[list[str]]:
        """The cells of a table, as text."""
        cells = ("th", "td")
        return [
            [x.text() for x in row.children if isinstance(x, Element) and x.tag in cells]
            for row in self.all("tr")
        ]

    def text(self) -> str:
        return "".join(x if isinstance(x, str) else x.text() for x in self.children)

    def __getitem__(self, attribute: str) -> str | None:
        return self.attributes.get(attribute)


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open = [Element("page")]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag, "elements are nested"

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def parse(page: bytes) -> Element:
    parser = _Parser()
    parser.feed(page.decode())
    parser.close()
    [root] = parser.open
    return root


def scores(page: Element) -> list[list[str]]:
    """The rows of the students, without the marks of the best values."""
    body, _ = page.one("table", "sortable").all("tbody")
    return [[cell.removesuffix(" best") for cell in row] for row in body.rows()]


def notes(page: Element) -> str:
    return " ".join(x.text() for x in page.all("ul", "notes"))
