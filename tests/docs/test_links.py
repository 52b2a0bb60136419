"""No link is dead: every relative link leads to a file that is there, and every anchor to a heading."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, name_of, pages

LINK = re.compile(r"\]\((?!\w+:)([^)\s#]*)(?:#([^)\s]*))?\)")
HTML = re.compile(r"(?:src|href)=\"(?!\w+:)([^\"#]+)\"")
CODE = re.compile(r"^ *```.*?^ *```|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub and the site make them."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title) for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = CODE.sub("", page.read_text("utf-8"))
    dead = []
    for path, anchor in [*LINK.findall(text), *((each, "") for each in HTML.findall(text))]:
        target = (page.parent / path).resolve() if path else page
        generated = path.endswith("reference/commands.md") or path == "commands.md"
        known_to_the_site = anchor.startswith("overpaint.")
        if not (target.exists() or generated) or (
            anchor
            and not known_to_the_site
            and target.suffix == ".md"
            and not generated
            and anchor not in headings(target)
        ):
            dead.append((path, anchor))
    assert dead == []


def test_paths_in_the_text_are_those_of_files() -> None:
    """`overpaint/...`, `tests/...`, `docs/...` in backquotes, but for patterns and made-up names."""
    gone = []
    for page in pages():
        if name_of(page) == "CHANGELOG.md":
            continue
        for path in re.findall(
            r"`((?:overpaint|tests|docs|examples|tools|benchmarks)/[\w./-]+)`", page.read_text("utf-8")
        ):
            if not (ROOT / path).exists() and "NAME" not in path:
                gone.append((name_of(page), path))
    assert gone == []
