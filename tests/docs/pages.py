"""The pages for people: every Markdown file that the repository shows, and the blocks in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w+)? ?([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
REASONS = {"gpu": "a graphics card", "network": "the network", "slow": "minutes", "shown": "nothing: it is to be read"}
"""What a block that does not run in the tests needs, by the word behind its language."""


class Block(NamedTuple):
    """A fenced block: its language, what stands beside it (`file=PATH`, `gpu`, `network`), its text."""

    language: str
    about: str
    text: str


def pages() -> list[Path]:
    """README.md and its kin, the pages of docs/, and the example's README."""
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])


def name_of(page: Path) -> str:
    """A page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    return [Block(*parts) for parts in FENCE.findall(page.read_text("utf-8"))]


if __name__ == "__main__":
    for page in pages():
        for block in blocks(page):
            if block.about in REASONS:
                print(f"{name_of(page)} needs {REASONS[block.about]}: {block.text.splitlines()[0]}")
