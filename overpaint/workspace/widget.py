"""A recipe in a notebook: a switch and a strength for each patch, and pictures of base and recipe beside them."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from overpaint.core.errors import OverpaintError
from overpaint.registry.records import HistoryRecord, PatchRecord, RecipeRecord
from overpaint.workspace.evaluating import Studio
from overpaint.workspace.opened import OpenRegistry


class RecipeWidget(anywidget.AnyWidget):
    """What `Recipe.widget` returns. `patches` has what is switched: a list of {id, concept, about, on, strength}.

    `keep` makes strengths by id, seen at a revision, the recipe's next one, with a reason. Setting `patches`, as the controls
    do, draws `rows` again: a list of {prompt, pictures}, a picture of {column, source}.
    """

    _esm = Path(__file__).with_name("widget.js")
    _css = Path(__file__).with_name("widget.css")
    name = traitlets.Unicode().tag(sync=True)
    patches: Any = traitlets.List().tag(sync=True)
    rows: Any = traitlets.List().tag(sync=True)
    problem = traitlets.Unicode().tag(sync=True)

    def __init__(
        self,
        opened: OpenRegistry,
        record: RecipeRecord,
        patches: Sequence[tuple[PatchRecord, float]],
        keep: Callable[[Mapping[str, float], int, str], list[HistoryRecord]],
        prompts: Sequence[str],
        *,
        seed: int,
        steps: int,
        guidance: float | None,
        device: str,
    ) -> None:
        self._base, self._revision, self._keep, self._prompts = record.base, record.revision, keep, prompts
        self._folder = tempfile.TemporaryDirectory(prefix="overpaint-widget-")
        self._studio = Studio(opened, Path(self._folder.name), device=device)
        liked = self._studio.guidance(record.base) if guidance is None else guidance
        self._how: dict[str, Any] = {"steps": steps, "guidance": liked}
        self._seed = seed
        shown = [
            {
                "id": patch.id,
                "concept": patch.concept,
                "about": f"{patch.solver}, {patch.id[:8]}",
                "on": True,
                "strength": s,
            }
            for patch, s in patches
        ]
        super().__init__(name=record.name, patches=shown)
        self.observe(self._draw, "patches")
        self._draw()

    @property
    def strengths(self) -> dict[str, float]:
        """What is on: strengths by patch id."""
        return {each["id"]: float(each["strength"]) for each in self.patches if each["on"]}

    def save(self, *, why: str = "") -> list[HistoryRecord]:
        """Keep the switches as the recipe's next revision; returns its lines.

        Raises StaleRevision when somebody changed the recipe since the widget was made.
        """
        lines = self._keep(self.strengths, self._revision, why)
        self._revision = lines[0].revision if lines else self._revision
        return lines

    def _draw(self, change: object = None) -> None:
        columns = {"base": {}, self.name: self.strengths}
        try:
            rows = []
            for prompt in self._prompts:
                pictures = [
                    {"column": column, "source": self._source(strengths, prompt)}
                    for column, strengths in columns.items()
                ]
                rows.append({"prompt": prompt, "pictures": pictures})
            self.rows, self.problem = rows, ""
        except OverpaintError as error:
            self.problem = str(error)

    def _source(self, strengths: dict[str, float], prompt: str) -> str:
        picture = self._studio.draw(self._base, strengths, prompt, self._seed, **self._how)
        return f"data:image/png;base64,{base64.b64encode(picture.file.read_bytes()).decode('ascii')}"
