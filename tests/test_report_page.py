"""The report for those who read it on a phone, on paper, by keyboard or by ear."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from tests.sweep.settings import swept
from tests.sweep.test_report import contrast, made_up
from token_superposition.report import write_report
from token_superposition.report.figures import COLOURS

VOID = {"meta", "br", "hr", "img", "input", "link"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    inside: list[Element] = field(default_factory=list)
    text: str = ""

    def all(self, *tags: str) -> list[Element]:
        return [e for child in self.inside for e in ([child] if child.tag in tags else []) + child.all(*tags)]

    @property
    def words(self) -> str:
        return " ".join((self.text + " ".join(e.words for e in self.inside)).split())


class Page(HTMLParser):
    def __init__(self, content: str):
        super().__init__()
        self.open = [Element("", {})]
        self.feed(content)
        assert len(self.open) == 1, [e.tag for e in self.open]  # every element is closed
        self.root = self.open[0]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs))
        self.open[-1].inside.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].inside.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].text += data


@pytest.fixture(scope="module", params=["comparison", "sweep"])
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Element:
    directory = tmp_path_factory.mktemp("report") / "out"
    if request.param == "comparison":
        shutil.copytree(request.getfixturevalue("two_seeds")[1], directory, ignore=shutil.ignore_patterns("model"))
    else:
        config = swept((0, 1, 2, 3), bag_sizes=(2, 4, 8), ratios=(0.1, 0.3), schedules=("switch", "halving"), keep=0.4)
        made_up(directory, config, lambda cell, seed: 3.0 - 0.0123 * cell.bag_size * cell.ratio)
    return Page(write_report(directory).read_text()).root


def test_structure(page: Element) -> None:
    (html,) = page.all("html")
    assert html.attributes["lang"] == "en" and len(page.all("main")) == 1
    viewports = [m.attributes["content"] for m in page.all("meta") if m.attributes.get("name") == "viewport"]
    assert viewports == ["width=device-width, initial-scale=1"]  # and a reader may enlarge it
    levels = [int(h.tag[1]) for h in page.all("h1", "h2", "h3")]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b <= a + 1 for a, b in pairwise(levels))
    assert all(h.words for h in page.all("h1", "h2", "h3", "summary", "figcaption"))


def test_every_picture_has_words(page: Element) -> None:
    figures = page.all("figure")
    assert len(figures) >= 3 and len(page.all("svg")) == len(figures) and not page.all("img")
    for figure in figures:
        (svg,), (caption,) = figure.all("svg"), figure.all("figcaption")
        title, description = svg.inside[:2]
        assert svg.attributes["role"] == "img" and (title.tag, description.tag) == ("title", "desc")
        assert title.words == caption.words and svg.attributes["aria-label"] == description.words
        assert re.search(r"\d\.\d{3}", description.words), description.words  # it says what the picture shows
    drawn = [text.words for text in page.all("text")]
    axes = {"FLOPs", "training time (s)", "raw tokens read"}, {"bag size s", "ratio r"}
    assert axes[0] <= set(drawn) or axes[1] <= set(drawn)


def test_every_table_can_be_read_by_ear_and_scrolled_by_keyboard(page: Element) -> None:
    scrolled = [e for e in page.all("div") if e.attributes.get("class") == "scroll"]
    assert len(page.all("table")) == len(scrolled) == len({e.attributes["aria-label"] for e in scrolled}) >= 1
    for region in scrolled:
        assert region.attributes["role"] == "region" and region.attributes["tabindex"] == "0"
        (table,) = region.all("table")
        head, *rows = [row.inside for row in table.all("tr")]
        assert rows and all(len(row) == len(head) for row in rows)
        for cells, scope in ((head, "col"), *((row[:1], "row") for row in rows)):
            for cell in cells:
                assert cell.tag == "th" and cell.attributes["scope"] == scope if cell.words else cell.tag == "td"


def test_contrast(page: Element) -> None:
    """WCAG 2 AA: 4.5 to 1 for text on every background of the page, 3 to 1 for lines."""
    style = page.all("style")[0]
    variables = dict(re.findall(r"--(\w+): (#\w+)", style.text))
    text = [variables[name] for name in re.findall(r"[ {]color: var\(--(\w+)\)", style.text)]
    backgrounds = re.findall(r"background: (#\w+)", style.text)
    assert set(text) == {variables["ink"], variables["soft"]} and len(backgrounds) == 3, (text, backgrounds)
    assert not re.findall(r"[ {]color: #", style.text)
    for colour in text:
        assert all(contrast(rgb(colour), rgb(background)) >= 4.5 for background in backgrounds)
    for colour in (*COLOURS, variables["accent"]):
        assert contrast(rgb(colour), rgb("#ffffff")) >= 3, colour


def test_nothing_is_wider_than_a_phone_or_lost_on_paper(page: Element) -> None:
    """Only tables are; they scroll by themselves, and on paper they are shown whole."""
    style = page.all("style")[0]
    screen, paper = style.text.split("@media print")
    assert ".scroll { overflow-x: auto" in screen and "overflow-wrap: anywhere" in screen
    assert ".scroll { overflow: visible" in paper and "details::details-content { content-visibility: visible" in paper
    assert not [w for w in re.findall(r"[^-]width: ([^;]+)", screen) if w != "100%"]
    assert not [e for e in page.all("p", "pre", "dl", "div", "figure") if "style" in e.attributes]


def rgb(colour: str) -> tuple[float, ...]:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
    return tuple(int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4))
