"""The page itself: its controls, what each of them does, and what one visitor has switched on.

Every visitor has switches of their own; the loaded base, the registry and the files that are made are shared. What a handler
returns becomes the new values of the controls that its event names.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar, cast

import gradio as gr

from overpaint.core.concepts import KINDS, Concept
from overpaint.core.errors import NotFound, OverpaintError
from overpaint.core.names import printed
from overpaint.core.reporting import Progress
from overpaint.evaluation.suites import SUITES
from overpaint.patches.formats.dialects import READERS
from overpaint.registry.records import HistoryRecord, PatchRecord, RecipeRecord
from overpaint.ui import views
from overpaint.ui.views import Column, Sheet
from overpaint.workspace.evaluating import Studio
from overpaint.workspace.recipe import current_user
from overpaint.workspace.workspace import Workspace


@dataclass
class Switch:
    """One patch: whether it is on, how strongly, and its strength in the recipe (None where it is only tried)."""

    patch: PatchRecord
    on: bool
    strength: float
    saved: float | None

    @property
    def is_changed(self) -> bool:
        """Whether the recipe has it otherwise."""
        return (self.strength if self.on else None) != self.saved


class Switches:
    """The switches of one visitor, for one recipe as it was at one revision.

    `version` counts what was switched; `is_stopped` says that the visitor wants their long work to end; `lists` has the
    ids of the patches that stood in the newest lists, line by line, by the number of the list.
    """

    def __init__(self, record: RecipeRecord, patches: Sequence[tuple[PatchRecord, float]]) -> None:
        self.recipe, self.base, self.revision, self.version = record.name, record.base, record.revision, 0
        self.is_stopped = False
        self.lists: dict[int, list[str]] = {}
        self.rows = {patch.id: Switch(patch, True, strength, strength) for patch, strength in patches}

    @property
    def strengths(self) -> dict[str, float]:
        """What is on: strengths by patch id."""
        return {patch_id: row.strength for patch_id, row in self.rows.items() if row.on}

    @property
    def changed(self) -> int:
        """How many patches the recipe has otherwise."""
        return sum(row.is_changed for row in self.rows.values())

    @property
    def label(self) -> str:
        """What a column of pictures under these switches is called."""
        return f"{self.recipe}, as switched" if self.changed else self.recipe

    def matching(self, text: str) -> list[Switch]:
        """The rows whose concept, solver or id has a text in it."""
        wanted = text.strip().casefold()
        return [
            row
            for row in self.rows.values()
            if wanted in row.patch.concept.casefold() or wanted in row.patch.solver or row.patch.id.startswith(wanted)
        ]

    def enlist(self, number: int, rows: Sequence[Switch]) -> None:
        """Remember what stands in the list `number`, the newest, and forget old ones."""
        self.lists[number] = [row.patch.id for row in rows]
        for old in sorted(self.lists)[:-LISTS]:
            del self.lists[old]

    def try_patch(self, patch: PatchRecord) -> None:
        """Switch on a patch that the recipe does not have. Raises OverpaintError for a patch of another base."""
        if patch.base != self.base:
            raise OverpaintError(f"that patch is for the base {patch.base!r}, and {self.recipe!r} is on {self.base!r}")
        self.rows.setdefault(patch.id, Switch(patch, True, 1.0, None))
        self.version += 1

    def switch(self, patch_id: str, *, on: bool | None = None, strength: float | None = None) -> bool:
        """Switch a patch on or off, or give it a strength; returns whether that changed anything."""
        row = self.rows[patch_id]
        before = (row.on, row.strength)
        row.on = row.on if on is None else on
        row.strength = row.strength if strength is None else strength
        self.version += before != (row.on, row.strength)
        return before != (row.on, row.strength)

    def switch_all(self, on: bool) -> None:
        """Switch everything on, or off: the base."""
        for row in self.rows.values():
            row.on = on
        self.version += 1


ROWS = 24
"""Patches shown at once; a filter finds the others."""
MOST_PICTURES = 200
"""How many pictures one sheet may have."""
SHOW_AFTER = 0.15
"""Seconds after which a sheet that is drawn is shown again with the pictures that are done by then."""
SMALL_BASE = 100 << 20
"""Bytes of weights up to which a base draws so fast that pictures follow every switch by themselves."""
SLIDER_STEP = 0.05
"""Between strengths on a slider. A strength between two steps stays as it is until its slider is moved."""
LISTS = 16
"""Lists of patches that are remembered for presses that arrive late."""
ONE_FILE, FOLDER = "Checkpoint, one .safetensors file", "Checkpoint, a diffusers folder (.zip)"
FORMATS = [ONE_FILE, FOLDER, *(f"LoRA for {name}" for name in READERS)]

Handler = TypeVar("Handler", bound=Callable[..., Any])


class Stopped(OverpaintError):
    """Work that its visitor stopped."""


def in_a_sentence(handler: Handler) -> Handler:
    """A handler whose OverpaintError the page shows as a sentence, without secrets."""

    def shown(error: OverpaintError) -> gr.Error:
        return gr.Error(printed(str(error)), duration=None, print_exception=False)

    @functools.wraps(handler)
    def call(*values: Any) -> Any:
        try:
            return handler(*values)
        except OverpaintError as error:
            raise shown(error) from error

    @functools.wraps(handler)
    def each(*values: Any) -> Iterator[Any]:
        try:
            yield from handler(*values)
        except OverpaintError as error:
            raise shown(error) from error

    return cast(Handler, each if inspect.isgeneratorfunction(handler) else call)


class Page:
    """The page over one registry. `folder` is where files are made that visitors download; Gradio must be let serve it."""

    def __init__(self, workspace: Workspace, studio: Studio, folder: Path) -> None:
        self.workspace, self.studio, self.folder = workspace, studio, folder
        # One counter for all visitors: if two handlers each added one to the same number, a change would go unnoticed.
        self._numbers = itertools.count(1)
        with gr.Blocks(title="Overpaint", analytics_enabled=False, fill_width=True) as self.blocks:
            gr.HTML(views.title(str(workspace.registry.folder)), elem_classes="op")
            self._head()
            with gr.Tabs():
                with gr.Tab("Compare"):
                    self._compare_tab()
                with gr.Tab("History"):
                    self._history_tab()
                with gr.Tab("Cross-talk"):
                    self._crosstalk_tab()
                with gr.Tab("Erase"):
                    self._erase_tab()
                with gr.Tab("Download"):
                    self._download_tab()
                with gr.Tab("Report"):
                    self._report_tab()
            self._wire()

    # What is on the page

    def _head(self) -> None:
        # A new number in `relist` makes the list of patches again; one in `redraw`, the pictures.
        self.switches, self.relist, self.redraw = gr.State(None), gr.State(0), gr.State(0)
        with gr.Row(elem_classes="op-line"):
            self.recipe = gr.Dropdown([], label="Recipe", scale=3, elem_id="recipe", interactive=True)
            self.reload = gr.Button("Reload", scale=0, min_width=110)
        self.status = gr.HTML("", elem_classes="op", elem_id="status")

    def _compare_tab(self) -> None:
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                words = "concept, solver or id"
                self.filter = gr.Textbox("", label="Show only", max_lines=1, placeholder=words, render=False)
                self._rows()
                with gr.Row(elem_classes="op-line"):
                    self.all_off = gr.Button("All off (the base)", size="sm", min_width=120)
                    self.all_on = gr.Button("All on", size="sm", min_width=120)
                with gr.Accordion("Other patches", open=False):
                    self.filter.render()  # type: ignore[no-untyped-call]
                    self.attempt = gr.Dropdown([], value=None, label="Try another patch of this base", interactive=True)
                with gr.Accordion("Keep these switches in the recipe", open=False):
                    self.save_why = gr.Textbox("", label="Why", max_lines=1)
                    self.save = gr.Button("Make the next revision", variant="primary")
            with gr.Column(scale=3, min_width=300):
                self.prompts = gr.Textbox(
                    "a photo of a cat", label="Prompts, one per line", lines=1, max_lines=12, elem_id="prompts"
                )
                with gr.Row(elem_classes="op-line"):
                    self.follow = gr.Checkbox(True, label="Draw after every switch", container=False, min_width=200)
                    self.draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=120)
                with gr.Accordion("Seeds, steps and other recipes", open=False):
                    self.others = gr.Dropdown(
                        [],
                        label="Other recipes beside it",
                        multiselect=True,
                        allow_custom_value=True,
                        info="by name, or NAME@REVISION",
                    )
                    with gr.Row():
                        self.seed = gr.Number(0, label="First seed", precision=0, minimum=0, min_width=110)
                        self.count = gr.Number(1, label="Seeds", precision=0, minimum=1, maximum=16, min_width=110)
                        self.steps = gr.Number(20, label="Steps", precision=0, minimum=1, maximum=1000, min_width=110)
                        self.guidance = gr.Number(0, label="Guidance, 0: its own", minimum=0, min_width=110)
                self.sheet = gr.HTML("", elem_classes="op", elem_id="sheet")

    def _rows(self) -> None:
        """As many lines as are shown at most. Lines that are made anew with their events (`gr.render`) would lose what a visitor
        presses while they are, and share their state among visitors."""
        with gr.Column(elem_classes="op-rows", elem_id="patches"):
            # Sent with every press: which list the visitor pressed in.
            self.list_number = gr.Number(0, visible=False)
            self.lines = [self._line() for _ in range(ROWS)]
            self.list_note = gr.HTML("", elem_classes="op")

    def _line(self) -> tuple[gr.Row, gr.Checkbox, gr.Slider]:
        with gr.Row(elem_classes="op-switch", visible=False) as line:
            # Labelled from the start, as Gradio shows no label that a box is given later.
            switch = gr.Checkbox(False, label="a patch", container=False, min_width=130, scale=2, interactive=True)
            slider = gr.Slider(
                0.0, 2.0, 1.0, step=SLIDER_STEP, container=False, min_width=150, scale=3, interactive=True
            )
        return line, switch, slider

    def _history_tab(self) -> None:
        with gr.Row(elem_classes="op-line"):
            self.history_why = gr.Textbox("", label="Why", max_lines=1, scale=3, min_width=240)
            self.undo = gr.Button("Undo the newest change", scale=1, min_width=160)
        with gr.Row(elem_classes="op-line"):
            self.revision = gr.Dropdown([], label="Earlier revision", scale=3, min_width=240, interactive=True)
            self.restore = gr.Button("Restore it", scale=1, min_width=160)
        self.history = gr.HTML("", elem_classes="op", elem_id="history")
        with gr.Accordion("New recipe", open=False):
            with gr.Row():
                self.new_name = gr.Textbox("", label="Name", max_lines=1)
                self.new_base = gr.Dropdown([], label="Base", interactive=True)
            self.create = gr.Button("Make an empty recipe")

    def _crosstalk_tab(self) -> None:
        with gr.Row(elem_classes="op-line"):
            self.everything = gr.Checkbox(label="Also the registry's concepts without a patch here", container=False)
            self.measure = gr.Button("Measure", variant="primary", scale=0, min_width=160)
        self.heat = gr.HTML("", elem_classes="op", elem_id="crosstalk")

    def _erase_tab(self) -> None:
        solvers = [(f"{each.name}: {each.about}", each.name) for each in self.workspace.solvers()]
        with gr.Row():
            self.concept = gr.Textbox("", label="Concept", max_lines=1)
            self.kind = gr.Dropdown(list(KINDS), value=KINDS[0], label="Kind")
        with gr.Row():
            self.synonyms = gr.Textbox("", label="Synonyms", max_lines=1, placeholder="kitty, feline")
            self.anchor = gr.Textbox("", label="What it becomes", max_lines=1, placeholder="nothing")
        self.solver = gr.Dropdown(solvers, value="separable", label="Solver")
        with gr.Accordion("Settings", open=False), gr.Row():
            self.settings = gr.Textbox("", label="Settings, NAME=VALUE, one per line", lines=2)
            self.solve_seed = gr.Number(0, label="Seed", precision=0, minimum=0)
        with gr.Row(elem_classes="op-line"):
            self.add = gr.Checkbox(True, label="Add it to the recipe", container=False)
            self.add_why = gr.Textbox("", label="Why", max_lines=1)
        with gr.Row():
            self.solve = gr.Button("Solve", variant="primary")
            self.stop = gr.Button("Stop")
        self.solved = gr.HTML("", elem_classes="op", elem_id="solved")

    def _download_tab(self) -> None:
        with gr.Row(elem_classes="op-line"):
            self.format = gr.Dropdown(FORMATS, value=ONE_FILE, label="What", scale=3)
            self.build = gr.Button("Build", variant="primary", scale=1, min_width=160)
        self.built = gr.HTML(
            views.note_html("The recipe as it is in the registry is built; keep your switches in it first."),
            elem_classes="op",
            elem_id="built",
        )

    def _report_tab(self) -> None:
        with gr.Row(elem_classes="op-line"):
            self.suite = gr.Dropdown(sorted(SUITES), value="quick", label="Suite", scale=2)
            self.suite_settings = gr.Textbox("", label="Settings, NAME=VALUE, one per line", max_lines=3, scale=2)
            self.evaluate = gr.Button("Evaluate", scale=1, min_width=130)
            self.report = gr.Button("Show the report", variant="primary", scale=1, min_width=160)
        self.reported = gr.HTML("", elem_classes="op", elem_id="report")

    def _wire(self) -> None:
        private: dict[str, Any] = {"api_visibility": "private"}
        opened = [
            *(self.switches, self.relist, self.status, self.history, self.revision, self.others, self.attempt),
            *(self.redraw, self.follow),
        ]
        at = [self.switches, self.relist, self.redraw]
        gr.on(
            [self.blocks.load, self.reload.click],
            self.begin,
            self.recipe,
            [self.recipe, self.new_base, *opened],
            **private,
        )
        self.recipe.input(self.choose, [self.recipe, self.switches], opened, **private)
        self.create.click(
            self.make_recipe, [self.new_name, self.new_base], [self.recipe, self.new_name], **private
        ).success(self.open, self.recipe, opened, **private)
        at_once: dict[str, Any] = {"trigger_mode": "always_last", "show_progress": "hidden", **private}
        shown = [self.list_number, self.list_note, *(part for line in self.lines for part in line)]
        gr.on([self.relist.change, self.filter.change], self.show_list, [self.switches, self.filter], shown, **at_once)
        pressed, again = [self.switches, self.list_number, self.follow], [self.relist, self.redraw]
        for place, (_, switch, slider) in enumerate(self.lines):
            switch.input(functools.partial(self.switch_patch, place), [*pressed, switch], again, **at_once)
            # Not `change`, which a new list causes too; `release` comes where the value is reset or brought into its range.
            gr.on(
                [slider.input, slider.release],
                functools.partial(self.set_strength, place),
                [*pressed, slider],
                again,
                **at_once,
            )
        drawn: dict[str, Any] = {
            "fn": self.draw_sheet,
            "inputs": [
                *(self.switches, self.prompts, self.seed, self.count, self.steps, self.guidance, self.others),
                self.follow,
            ],
            "outputs": self.sheet,
            "trigger_mode": "always_last",
            "show_progress": "hidden",
            "concurrency_limit": 8,
            **private,
        }
        gr.on([self.draw.click, self.redraw.change], **drawn)
        for button, on in ((self.all_off, False), (self.all_on, True)):
            button.click(functools.partial(self.switch_all, on), self.switches, at, **private)
        self.attempt.input(self.try_patch, [self.switches, self.attempt], [*at, self.attempt], **private)
        self.save.click(self.save_switches, [self.switches, self.save_why], [*opened, self.save_why], **private)
        self.undo.click(self.undo_change, [self.switches, self.history_why], [*opened, self.history_why], **private)
        self.restore.click(
            self.restore_revision,
            [self.switches, self.revision, self.history_why],
            [*opened, self.history_why],
            **private,
        )
        self.measure.click(self.measure_crosstalk, [self.switches, self.everything], self.heat, **private)
        self.solve.click(
            self.solve_concept,
            [
                *(self.switches, self.concept, self.kind, self.synonyms, self.anchor, self.solver, self.settings),
                *(self.solve_seed, self.add, self.add_why),
            ],
            self.solved,
            **private,
        ).success(self.open, self.recipe, opened, **private)
        self.stop.click(self.stop_solving, [self.switches], None, **private)
        self.build.click(self.build_file, [self.switches, self.format], self.built, **private)
        self.evaluate.click(
            self.evaluate_recipe, [self.switches, self.suite, self.suite_settings], self.reported, **private
        )
        self.report.click(self.show_report, [self.switches], self.reported, **private)

    # What the controls do

    @in_a_sentence
    def begin(self, name: str | None) -> tuple[Any, ...]:
        """The recipes and bases there are now, and the recipe that was open, or else the first, opened."""
        names, bases = [each.name for each in self.workspace.recipes()], [b.name for b in self.workspace.bases()]
        name = next((each for each in (name, "default", *names) if each in names), None)
        opened = [*self.open(name)]
        if not bases:
            hint = "No base is known yet. Add one, then reload: overpaint base add NAME FOLDER-OR-FILE (or emoji emoji)"
            opened[2] = views.note_html(hint)
        elif name is None:
            opened[2] = views.note_html("There is no recipe yet; make one in the tab History.")
        first = bases[0] if bases else None
        return gr.Dropdown(names, value=name), gr.Dropdown(bases, value=first), *opened

    @in_a_sentence
    def make_recipe(self, name: str, base: str) -> tuple[Any, str]:
        """An empty recipe, which is opened."""
        if not name.strip() or not base:
            raise OverpaintError("a recipe needs a name and a base; fill in both")
        made = self.workspace.create_recipe(name.strip(), base=base)
        return gr.Dropdown([each.name for each in self.workspace.recipes()], value=made.name), ""

    def choose(self, name: str | None, switches: Switches | None) -> tuple[Any, ...]:
        """Open another recipe. Gradio tells of one choice twice, and switches pressed between the two are kept."""
        return self.open(None if switches and switches.recipe == name else name)

    @in_a_sentence
    def open(self, name: str | None) -> tuple[Any, ...]:
        """A recipe as it is now: its switches, its history, and what it can be compared with."""
        if not name:
            return tuple(gr.skip() for _ in range(9))
        recipe = self.workspace.recipe(name)
        record, patches, lines = recipe.record, recipe.patches(), recipe.log()
        switches = Switches(record, patches)
        digest = record.digest or (self.workspace.registry.base(record.base).fingerprint if not patches else "")
        numbers = sorted(
            {line.revision for line in lines} - {record.revision} | ({0} if lines else set()), reverse=True
        )
        revisions = [(_revision_label(number, lines), number) for number in numbers]
        recipes = [each.name for each in self.workspace.recipes() if each.base == record.base]
        beside = [each for each in recipes if each != name] + [f"{name}@{number}" for number in numbers]
        more = [each for each in self.workspace.patches(base=record.base) if each.id not in switches.rows]
        base = self.workspace.base(record.base)
        is_small = sum(place.entry.size for place in base.places.values()) <= SMALL_BASE
        return (
            switches,
            next(self._numbers),
            views.status_html(record, [patch.concept for patch, _ in patches], digest),
            views.history_html(record, lines),
            gr.Dropdown(revisions, value=revisions[0][1] if revisions else None),
            gr.Dropdown(beside),
            gr.Dropdown([(f"{p.concept} ({p.solver}, {p.id[:12]})", p.id) for p in more], value=None),
            next(self._numbers) if is_small else gr.skip(),
            is_small,
        )

    def show_list(self, switches: Switches | None, text: str | None) -> list[Any]:
        """The number of a new list, a note under it, and what its lines show."""
        rows, number = switches.matching(text or "") if switches else [], next(self._numbers)
        if switches:
            # Before its values are read, so that whatever is pressed from now on makes a newer list.
            switches.enlist(number, rows[:ROWS])
        note = ""
        if switches is None or not switches.rows:
            note = "No patch is in this recipe yet."
        elif len(rows) > ROWS or not rows:
            note = f"{min(ROWS, len(rows))} of {len(switches.rows)} patches; find the others by a word"
        found: list[Any] = [number, gr.HTML(views.note_html(note) if note else "")]
        for row in rows[:ROWS]:
            patch, strength = row.patch, row.strength
            about = f"{patch.solver}, {patch.id[:8]}{', not in the recipe' if row.saved is None else ''}"
            slider = gr.Slider(
                minimum=min(0.0, strength),
                maximum=max(2.0, strength),
                value=strength,
                label=f"Strength of {patch.concept}",
            )
            found += [gr.Row(visible=True), gr.Checkbox(value=row.on, label=patch.concept, info=about), slider]
        for _ in range(ROWS - len(rows)):
            found += [gr.Row(visible=False), gr.skip(), gr.skip()]
        return found

    def switch_patch(
        self, place: int, switches: Switches | None, number: int, follow: bool, on: bool
    ) -> tuple[Any, Any]:
        """The patch at a place of a list switched on or off."""
        return self._pressed(place, switches, number, follow, on=on)

    def set_strength(
        self, place: int, switches: Switches | None, number: int, follow: bool, strength: float
    ) -> tuple[Any, Any]:
        """The patch at a place of a list given another strength."""
        return self._pressed(place, switches, number, follow, strength=strength)

    def _pressed(
        self,
        place: int,
        switches: Switches | None,
        number: int,
        follow: bool,
        *,
        on: bool | None = None,
        strength: float | None = None,
    ) -> tuple[Any, Any]:
        """Do what was pressed in the list `number`, unless that was another recipe's; new numbers for the list and the pictures.

        A list is made again where a newer one than the visitor pressed in may be on its way without what was pressed.
        """
        if switches is None:
            return gr.skip(), gr.skip()
        ids = switches.lists.get(number, [])
        is_known = place < len(ids)
        is_changed = is_known and switches.switch(ids[place], on=on, strength=strength)
        is_newest = is_known and number == max(switches.lists)
        relist = gr.skip() if is_newest else next(self._numbers)
        return relist, next(self._numbers) if is_changed and follow else gr.skip()

    def _reopened(self, switches: Switches) -> tuple[Any, ...]:
        return (*self.open(switches.recipe), "")

    @in_a_sentence
    def draw_sheet(
        self,
        switches: Switches | None,
        prompts: str,
        seed: float,
        count: float,
        steps: float,
        guidance: float,
        others: list[str],
        follow: bool,
    ) -> Iterator[str]:
        """Base, switches and other recipes side by side, one picture after the other.

        Ends early where the switches change meanwhile and pictures follow them.
        """
        switches = _chosen(switches)
        asked = [
            (line.strip(), int(seed or 0) + i)
            for line in prompts.splitlines()
            if line.strip()
            for i in range(int(count or 1))
        ]
        columns = [Column("base", {}), Column(switches.label, switches.strengths), *self._columns(switches, others)]
        if not asked or len(asked) * len(columns) > MOST_PICTURES:
            raise OverpaintError(
                f"{len(asked)} prompts and seeds in {len(columns)} columns; draw at least one picture, at most {MOST_PICTURES}"
            )
        fingerprint = self.workspace.registry.base(switches.base).fingerprint
        guidance = guidance or self.studio.guidance(switches.base)
        sheet, version, shown = Sheet(columns, asked), switches.version, monotonic()
        for row, (prompt, number) in enumerate(asked):
            for place, column in enumerate(columns):
                if column.error:
                    continue
                if follow and switches.version != version:
                    return
                try:
                    picture = self.studio.draw(
                        switches.base, column.strengths, prompt, number, steps=int(steps or 20), guidance=guidance
                    )
                except OverpaintError as error:
                    column.error = printed(str(error))
                    continue
                column.weights = picture.weights
                sheet.pictures[row, place] = picture
                is_last = (row, place) == (len(asked) - 1, len(columns) - 1)
                if monotonic() - shown > SHOW_AFTER and not is_last:
                    yield sheet.html(fingerprint)
                    shown = monotonic()
        yield sheet.html(fingerprint)

    def _columns(self, switches: Switches, others: list[str]) -> Iterator[Column]:
        for name in others or []:
            try:
                record = self.workspace.recipe(name).record
            except NotFound as error:
                yield Column(name, {}, error=str(error))
                continue
            problem = "" if record.base == switches.base else f"is on the base {record.base}, not {switches.base}"
            yield Column(name, dict(record.patches), error=problem)

    def switch_all(self, on: bool, switches: Switches | None) -> tuple[Any, Any, Any]:
        """Everything on, or the base; the pictures follow."""
        if switches is None:
            return gr.skip(), gr.skip(), gr.skip()
        switches.switch_all(on)
        return switches, next(self._numbers), next(self._numbers)

    @in_a_sentence
    def try_patch(self, switches: Switches | None, patch: str | None) -> tuple[Any, Any, Any, Any]:
        """A patch that the recipe does not have, switched on for this visitor."""
        if switches is None or not patch:
            return gr.skip(), gr.skip(), gr.skip(), None
        switches.try_patch(self.workspace.registry.patch(patch))
        return switches, next(self._numbers), next(self._numbers), None

    @in_a_sentence
    def save_switches(self, switches: Switches | None, why: str, request: gr.Request) -> tuple[Any, ...]:
        """The switches as the recipe's next revision, unless somebody changed the recipe meanwhile."""
        switches = _chosen(switches)
        recipe = self.workspace.recipe(switches.recipe)
        lines = recipe.set_patches(switches.strengths, revision=switches.revision, why=why, who=_who(request))
        gr.Info(
            f"revision {lines[0].revision} of {switches.recipe}" if lines else "the recipe has these patches already"
        )
        return self._reopened(switches)

    @in_a_sentence
    def undo_change(self, switches: Switches | None, why: str, request: gr.Request) -> tuple[Any, ...]:
        """Undo the newest change, as a new revision."""
        switches = _chosen(switches)
        lines = self.workspace.recipe(switches.recipe).undo(why=why, who=_who(request))
        gr.Info(f"undone; this is revision {lines[0].revision}")
        return self._reopened(switches)

    @in_a_sentence
    def restore_revision(
        self, switches: Switches | None, revision: int | None, why: str, request: gr.Request
    ) -> tuple[Any, ...]:
        """What an earlier revision held, as a new revision."""
        switches = _chosen(switches)
        if revision is None:
            raise OverpaintError("choose the revision to restore")
        lines = self.workspace.recipe(switches.recipe).checkout(revision, why=why, who=_who(request))
        gr.Info(f"restored {switches.recipe}@{revision}; this is revision {lines[0].revision}")
        return self._reopened(switches)

    @in_a_sentence
    def measure_crosstalk(
        self,
        switches: Switches | None,
        everything: bool,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  # how Gradio hands it in
    ) -> str:
        """What each patch of the recipe does to the other concepts."""
        progress(0, desc="measuring")
        with self.studio.lock:
            return views.crosstalk_html(self.workspace.crosstalk(_chosen(switches).recipe, everything=everything))

    @in_a_sentence
    def solve_concept(
        self,
        switches: Switches | None,
        name: str,
        kind: str,
        synonyms: str,
        anchor: str,
        solver: str,
        settings: str,
        seed: float,
        add: bool,
        why: str,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> str:
        """A patch for a concept on the recipe's base, stored and, if asked for, added to the recipe."""
        switches = _chosen(switches)
        words = tuple(word.strip() for word in synonyms.split(",") if word.strip())
        concept = self._concept(name.strip(), kind, words, anchor.strip())
        report = self._reporting(progress, switches)
        progress(0, desc="waiting for the base")
        with self.studio.lock:
            solved = self.workspace.solve(
                concept,
                base=switches.base,
                solver=solver,
                seed=int(seed or 0),
                settings=_settings(settings),
                progress=report,
            )
        done = f"{solved.record.concept}: patch {solved.id[:12]}, {solved.nbytes:,} bytes, {solved.seconds:.1f} s"
        if add:
            recipe = self.workspace.recipe(switches.recipe)
            line = recipe.add(solved, why=why, who=_who(request), exist_ok=True)
            done += f"; in {switches.recipe} since revision {line.revision}"
        return views.note_html(done)

    def _concept(self, name: str, kind: str, synonyms: tuple[str, ...], anchor: str) -> Concept:
        """A known concept by its name alone, or a new one as described. Raises where a known one is described otherwise."""
        described = Concept(name, kind, synonyms, anchor)
        known = self.workspace.known_or_new(described.name)
        if described in (known, Concept(name)):
            return known
        if name in {each.name for each in self.workspace.concepts()}:
            raise OverpaintError(
                f"{name!r} is known already, with another description; leave kind and words as they are"
            )
        return described

    def _reporting(self, progress: gr.Progress, switches: Switches) -> Progress:
        """Progress of work that begins now; it ends where its visitor stops it from now on."""
        switches.is_stopped = False

        def report(step: int, of: int, text: str) -> None:
            if switches.is_stopped:
                raise Stopped("stopped; nothing was stored")
            progress((step, of), desc=text)

        return report

    def stop_solving(self, switches: Switches | None) -> None:
        """The visitor's solve ends at its next step."""
        if switches is not None:
            switches.is_stopped = True

    @in_a_sentence
    def build_file(
        self,
        switches: Switches | None,
        format: str,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Iterator[str]:
        """The recipe as a checkpoint or a LoRA, as a link."""
        recipe = self.workspace.recipe(_chosen(switches).recipe)
        name = f"{recipe.record.name}-{recipe.record.revision}"
        notes: list[str] = []
        yield views.note_html("building")
        progress(0, desc="composing")
        with self.studio.lock:
            place = self._new_folder("build")
            if format in (ONE_FILE, FOLDER):
                out = place / (f"{name}.safetensors" if format == ONE_FILE else name)
                built = recipe.build(
                    out, format="single-file" if format == ONE_FILE else "diffusers", warn=notes.append
                )
                title = f"Weights {built.digest}"
            else:
                out = place / f"{name}.safetensors"
                exported = recipe.export(out, for_=format.removeprefix("LoRA for "))
                title = f"{exported.format}: {exported.sentence()}; {exported.readers_sentence()}"
            if out.is_dir():
                out = Path(shutil.make_archive(str(out), "zip", out))
        yield views.files_html(title, [out], "; ".join(notes))

    @in_a_sentence
    def evaluate_recipe(
        self,
        switches: Switches | None,
        suite: str,
        settings: str,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> str:
        """The recipe judged by pictures; the numbers stay in the registry."""
        switches = _chosen(switches)
        report = self._reporting(progress, switches)
        with self.studio.lock:
            recipe = self.workspace.recipe(switches.recipe)
            done = recipe.evaluate(suite, settings=_settings(settings), progress=report)
        return views.note_html(f"{len(done.record.results)} numbers by {done.record.judge}; now show the report")

    @in_a_sentence
    def show_report(
        self,
        switches: Switches | None,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> str:
        """What was measured of the recipe, as a page within the page and as files."""
        switches = _chosen(switches)
        report = self._reporting(progress, switches)
        with self.studio.lock:
            out = self._new_folder("report") / f"{switches.recipe}.html"
            done = self.workspace.recipe(switches.recipe).report(out, progress=report)
        links = views.files_html("The report and what is beside it", done.files, "; ".join(done.notices))
        return links + views.report_html(out.read_text("utf-8"))

    def _new_folder(self, what: str) -> Path:
        """A folder for files to download, made under the lock. Older ones for the same purpose go: checkpoints are large."""
        for old in self.folder.glob(f"{what}-*"):
            shutil.rmtree(old, ignore_errors=True)
        return Path(tempfile.mkdtemp(prefix=f"{what}-", dir=self.folder))


def theme() -> Any:
    """Gradio's, with the fonts of the visitor's system (nothing is fetched) and colours that can be read on each other."""
    plain = gr.themes.Default(
        primary_hue="orange",
        neutral_hue="zinc",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    mark, pale = "#b4421f", "#ff9c75"
    return plain.set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
        block_label_text_color="*neutral_700",
        block_title_text_color="*neutral_700",
        button_primary_background_fill=mark,
        button_primary_background_fill_dark=mark,
        button_primary_background_fill_hover="#96361a",
        button_primary_background_fill_hover_dark="#96361a",
        slider_color=mark,
        slider_color_dark=pale,
        checkbox_background_color_selected=mark,
        checkbox_background_color_selected_dark=mark,
        checkbox_border_color_selected=mark,
        checkbox_border_color_selected_dark=pale,
        color_accent=mark,
        input_placeholder_color="*neutral_500",
    )


def _chosen(switches: Switches | None) -> Switches:
    if switches is None:
        raise OverpaintError("choose a recipe first")
    return switches


def _who(request: gr.Request) -> str:
    """The name by which a visitor logged in, or whoever runs the page where nobody has to."""
    return request.username or current_user()


def _settings(text: str) -> dict[str, str]:
    pairs = [line.partition("=") for line in text.splitlines() if line.strip()]
    if wrong := [name for name, equals, _ in pairs if not equals]:
        raise OverpaintError(f"a setting is NAME=VALUE; got {wrong[0]!r}")
    return {name.strip(): value.strip() for name, _, value in pairs}


def _revision_label(number: int, lines: list[HistoryRecord]) -> str:
    of = [line for line in lines if line.revision == number]
    words = ", ".join(views.change_in_words(line) for line in of) or "as it was made"
    return f"{number}: {words}" + (f" ({of[0].who}, {of[0].at:%Y-%m-%d %H:%M})" if of else "")
