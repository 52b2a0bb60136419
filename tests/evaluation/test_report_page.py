from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from overpaint.core.errors import OverpaintError
from overpaint.evaluation import report_page
from overpaint.evaluation.report_page import Picture, PictureRow, Report, Section, Table, render, write_report

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)
NASTY = "<script>alert(\"x\")</script> & 'more'"
REPORT = Report(
    NASTY,
    f"{NASTY}\n\nsecond paragraph",
    (
        Section(NASTY, NASTY, Table((NASTY, "rate"), ((NASTY, "98.4%"),), NASTY)),
        Section("pictures", columns=(NASTY,), pictures=(PictureRow(NASTY, (Picture(PIXELS, NASTY),)),)),
    ),
    ((NASTY, NASTY),),
    (NASTY,),
)
VOID = {"meta", "img"}


class Outline(HTMLParser):
    """Every element in order, and whether each is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def test_everything_is_escaped_and_nothing_runs() -> None:
    page = render(REPORT)
    outline = Outline(page)
    assert not outline.open
    assert not outline.all("script")
    assert "<script" not in page
    assert outline.all("img")[0]["alt"] == NASTY


def test_nothing_is_fetched() -> None:
    assert not re.search(r"https?://|url\(|<link|@import", render(REPORT))


def test_readers_of_the_page_find_their_way() -> None:
    outline = Outline(render(REPORT))
    assert outline.all("html")[0]["lang"] == "en"
    assert [name for name, _ in outline.found if re.fullmatch(r"h\d", name)] == ["h1", "h2", "h2", "h2", "h2"]
    assert {cell["scope"] for cell in outline.all("th")} == {"row", "col"}
    assert len(outline.all("main")) == 1


def test_pictures_survive_bit_for_bit() -> None:
    source = Outline(render(REPORT)).all("img")[0]["src"]
    assert source is not None
    data = base64.b64decode(source.removeprefix("data:image/png;base64,"))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), PIXELS)


def test_numbers_line_up_on_the_right_and_words_do_not() -> None:
    table = Table(("name", "rate", "note"), (("cat", "98.4% (97.0% to 99.1%, n=500)", "good"), ("dog", "—", "3 of 4")))
    page = render(Report("t", "", (Section("s", table=table),)))
    assert '<th scope="col" class="n">rate</th><th scope="col">note</th>' in page


def test_light_and_dark_and_paper_are_served() -> None:
    page = render(REPORT)
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "a" / "report.html", tmp_path / "report.html"
    write_report(first, REPORT)
    write_report(second, REPORT)
    write_report(second, REPORT)
    assert first.read_bytes() == second.read_bytes()


def test_a_failure_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    write_report(path, REPORT)
    before = path.read_bytes()

    def broken(report: Report) -> str:
        raise RuntimeError("half way")

    monkeypatch.setattr(report_page, "render", broken)
    with pytest.raises(RuntimeError, match="half way"):
        write_report(path, REPORT)
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["report.html"]


def test_tables_and_picture_rows_must_fit_their_headers() -> None:
    with pytest.raises(OverpaintError, match="1 cells for 2 columns"):
        Table(("a", "b"), (("x",),))
    with pytest.raises(OverpaintError, match="row 'base' has 0 pictures for 1 columns"):
        Section("s", columns=("a",), pictures=(PictureRow("base", ()),))
