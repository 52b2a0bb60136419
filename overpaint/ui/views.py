"""The parts of the page that are HTML: pictures side by side, the history, the heat map. Everything that is shown is escaped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from overpaint.core import __version__
from overpaint.evaluation.crosstalk import WARN_ABOVE, Crosstalk
from overpaint.evaluation.report_page import templates
from overpaint.registry.records import HistoryRecord, RecipeRecord
from overpaint.workspace.evaluating import DrawnPicture

PAIRS = 8
"""How many of the strongest pairs are written out under a heat map."""


@dataclass
class Column:
    """Pictures under one set of patches: its name, strengths by patch id, and once they are known the weights or an error."""

    name: str
    strengths: Mapping[str, float]
    weights: str = ""
    error: str = ""


@dataclass
class Sheet:
    """Pictures of prompts with their seeds, a row each, under the patches of every column; None where it is to be drawn."""

    columns: list[Column]
    asked: list[tuple[str, int]]
    pictures: dict[tuple[int, int], DrawnPicture] = field(default_factory=dict)

    def html(self, fingerprint: str) -> str:
        """The sheet; a column whose weights have the fingerprint of the base says so."""
        return _rendered("sheet", sheet=self, fingerprint=fingerprint, address=address)


def address(file: Path) -> str:
    """Where Gradio serves a file of a folder that it may serve, seen from the page."""
    return f"gradio_api/file={quote(str(file))}"


def history_html(record: RecipeRecord, lines: Sequence[HistoryRecord]) -> str:
    """Every revision of a recipe, the newest first: what it did to which patches, who, when and why."""
    revisions: dict[int, list[HistoryRecord]] = {}
    for line in reversed(lines):
        revisions.setdefault(line.revision, []).append(line)
    return _rendered("history", record=record, revisions=revisions, change=change_in_words)


def change_in_words(line: HistoryRecord) -> str:
    """What a revision did to one patch."""
    strength = "" if line.strength_after in (None, 1.0) else f" at {line.strength_after:g}"
    source = f" from {line.source}" if line.source else ""
    if line.patch is None:
        return f"{line.action}{source}"
    if line.strength_before is None:
        return f"added {line.concept}{strength}{source}"
    if line.strength_after is None:
        return f"removed {line.concept}{source}"
    if line.strength_before != line.strength_after:
        return f"{line.concept} from {line.strength_before:g} to {line.strength_after:g}{source}"
    return f"{line.concept} expires {line.until_after or 'never'}{source}"


def crosstalk_html(measured: Crosstalk) -> str:
    """The heat map, and the strongest pairs in words."""
    caption = "How much each patch (row) moves what the model reads of each concept (column), relative to its own"
    heat = measured.heat_map(caption)
    strong = measured.above()
    return _rendered("crosstalk", heat=heat, strong=strong[:PAIRS], more=len(strong[PAIRS:]), limit=WARN_ABOVE)


def files_html(title: str, files: Sequence[Path], note: str = "") -> str:
    """Links by which files are downloaded."""
    listed = [(file.name, address(file), _size(file.stat().st_size)) for file in files]
    return _rendered("files", title=title, files=listed, note=note)


def report_html(page: str) -> str:
    """A report within the page, which can run no script."""
    return _rendered("report", page=page)


def status_html(record: RecipeRecord, concepts: Sequence[str], digest: str) -> str:
    """One line about a recipe."""
    return _rendered("status", record=record, concepts=concepts, digest=digest)


def note_html(text: str) -> str:
    """A sentence."""
    return _rendered("note", text=text)


def style() -> str:
    """The style sheet of what this module makes."""
    return templates("overpaint.ui").get_template("page.css").render()


def title(where: str) -> str:
    """The head of the page."""
    return _rendered("title", where=where, version=__version__)


def _size(nbytes: int) -> str:
    power = 0 if nbytes < 1000 else min(3, int(math.log10(nbytes)) // 3)
    return f"{nbytes / 1000**power:.3g} {('bytes', 'KB', 'MB', 'GB')[power]}"


def _rendered(part: str, **values: object) -> str:
    return str(getattr(templates("overpaint.ui").get_template("parts.html.j2").module, part)(**values))
