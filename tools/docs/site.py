"""Hooks of mkdocs: the site has what the pages in `docs/` link to, wherever in the repository that is.

A page is written to be read in the repository: links are relative, `../CONTRIBUTING.md` leaves `docs/`. In the site, files
outside of `docs/` that a page links to are pages below `repository/`: Markdown as it is, other text as a listing.
README.md is the front page. The reference of commands and the list of decisions are generated.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from tools.docs.commands import commands_page

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)\s#]+)(#[^)\s]*)?(?=\))")
"""A relative link of Markdown: its path and its anchor."""
FENCE = re.compile(r"^( *```\w+) +([^\n`]+)$", re.MULTILINE)
CODE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
LANGUAGES = {".py": "python", ".toml": "toml", ".yml": "yaml", ".yaml": "yaml", ".json": "json", ".ipynb": "json"}
FRONT = "README.md"
GENERATED = ("index.md", "reference/commands.md", "decisions/index.md", "repository/")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Leave out of the navigation what this copy has no page for."""

    def written(item: Any) -> Any:
        if isinstance(item, str):
            return item if item.startswith(GENERATED) or (ROOT / "docs" / item).is_file() else None
        if isinstance(item, list):
            return [each for each in map(written, item) if each]
        return {title: found for title, each in item.items() if (found := written(each))}

    config.nav = written(config.nav)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and those for files of the repository that pages link to."""
    files.append(File.generated(config, "reference/commands.md", content=commands_page()))
    files.append(File.generated(config, "decisions/index.md", content=decisions_page()))
    waiting = [FRONT, "CHANGELOG.md", "SECURITY.md", "CODE_OF_CONDUCT.md", *(f"docs/{f.src_uri}" for f in files)]
    seen: set[str] = set()
    while waiting:
        path = waiting.pop()
        if path in seen or not (ROOT / path).is_file():
            continue
        seen.add(path)
        if not path.startswith("docs/"):
            files.append(File.generated(config, page_of(path), content=as_page(path)))
        if path.endswith(".md"):
            waiting += [target for target, _ in links((ROOT / path).read_text("utf-8"), path)]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to where their targets are in the site, and leave the language alone at the head of a block."""
    here = page.file.src_uri
    path = next((each for each in (FRONT, *outside(here)) if page_of(each) == here), f"docs/{here}")

    def moved(match: re.Match[str]) -> str:
        target = resolved(path, match[1])
        return posixpath.relpath(page_of(target), posixpath.dirname(here) or ".") + (match[2] or "")

    return FENCE.sub(r"\1", LINK.sub(moved, markdown))


def outside(here: str) -> Iterator[str]:
    """The file of the repository that a page below `repository/` shows."""
    if here.startswith("repository/"):
        path = here.removeprefix("repository/")
        yield path if (ROOT / path).is_file() else path.removesuffix(".md")


def links(markdown: str, path: str) -> Iterator[tuple[str, str]]:
    """Every relative link outside of code: the path in the repository that it leads to, and its anchor."""
    for match in LINK.finditer(CODE.sub("", markdown)):
        yield resolved(path, match[1]), match[2] or ""


def resolved(path: str, link: str) -> str:
    """The path in the repository that a link on a page leads to; of a folder, its README.md."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
    return f"{target}/README.md" if (ROOT / target).is_dir() else target


def page_of(path: str) -> str:
    """Where the site has a file of the repository."""
    if path == FRONT:
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/").replace("decisions/README.md", "decisions/index.md")
    return f"repository/{path}" if path.endswith(".md") else f"repository/{path}.md"


def as_page(path: str) -> str:
    """A file of the repository as Markdown."""
    text = (ROOT / path).read_text("utf-8")
    if path.endswith(".md"):
        return text
    return f"# {path}\n\n````{LANGUAGES.get(Path(path).suffix, 'text')}\n{text.rstrip()}\n````\n"


def decisions_page() -> str:
    """The list of decisions, by number."""
    rows = []
    for file in sorted((ROOT / "docs" / "decisions").glob("0*.md")):
        number, _, title = file.read_text("utf-8").splitlines()[0].removeprefix("# ").partition(". ")
        rows.append(f"{number}. [{title}]({file.name})")
    return '# Decisions\n\nWhat a later reader would ask "why?" about, one screen each.\n\n' + "\n".join(rows) + "\n"
