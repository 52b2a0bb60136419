"""A file that says what a recipe holds (YAML or JSON), the plan that makes it so, and writing one back.

    recipe: safe
    base: emoji
    why: what this service may not show
    defaults: {solver: separable}
    patches:
      - dog
      - name: watercolor
        kind: style
        strength: 0.8
        expires: 2027-01-31
        why: court order
      - patch: 3f9a12bc4d5e

An entry is a concept, as a file of concepts has it (`concept_file`), or a `patch` by its id, or both: then the concept says how
to solve it where there is no such patch. `strength` is 1 if omitted; without `expires` a patch never does.

A concept means a patch that was solved for it as it is described, with the solver, settings and seed that are asked for: one
that is on the recipe, else the newest there is, else it is solved. Whether other concepts joined since does not matter: a file
that was applied stays applied (`recipe reseparate` solves for them).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml  # type: ignore[import-untyped]

from overpaint.core.errors import AlreadyExists, NotFound, OverpaintError
from overpaint.registry.records import HistoryRecord, PatchRecord, RecipeEntry
from overpaint.registry.registry import Registry
from overpaint.registry.store import BlobCorrupt, BlobMissing, PatchFiles
from overpaint.workspace.concept_file import (
    BadConceptFile,
    ConceptReader,
    Items,
    Node,
    Pairs,
    Text,
    TextPosition,
    read_nodes,
)
from overpaint.workspace.planning import (
    SolvePlan,
    SolveRequest,
    as_texts,
    brief,
    completed,
    manifest_of,
    plan_solves,
    same_but_for_universe,
)

if TYPE_CHECKING:
    from overpaint.workspace.opened import OpenRegistry
    from overpaint.workspace.solving import SolveOutcome

KEYS = ("recipe", "base", "why", "defaults", "patches")
ENTRY_KEYS = ("patch", "strength", "expires", "why")
Action = Literal["keep", "add", "change", "remove"]


@dataclass(frozen=True)
class FileEntry:
    """One patch that a file asks for: by `patch`, by how to solve it, or both."""

    patch: str | None
    request: SolveRequest | None
    strength: float
    expires: date | None
    why: str


@dataclass(frozen=True)
class RecipeFile:
    """What a file says. `base` None is the only base there is."""

    recipe: str
    base: str | None
    why: str
    entries: tuple[FileEntry, ...]


@dataclass(frozen=True)
class PlannedEntry:
    """What is done for one patch. `record` None is solved first; `asked` None is removed: the file has no such entry."""

    action: Action
    concept: str
    record: PatchRecord | None
    asked: FileEntry | None


@dataclass(frozen=True)
class RecipePlan:
    """What makes a recipe as a file says: a recipe to create or to change, and patches to solve before."""

    recipe: str
    base: str
    why: str
    is_new: bool
    entries: tuple[PlannedEntry, ...]
    solve: SolvePlan

    @property
    def is_done(self) -> bool:
        """Whether the recipe is as the file says already."""
        return not self.is_new and all(entry.action == "keep" for entry in self.entries)


@dataclass(frozen=True)
class RecipeFileOutcome:
    """What applying a file came to: the lines of history of the one revision it made, and the patches that were solved."""

    lines: list[HistoryRecord]
    solved: list[PatchRecord]


def read_recipe(path: Path) -> RecipeFile:
    """What a file says. Raises NotFound for one that is not there, BadConceptFile with all mistakes and their places."""
    reader = _RecipeReader(path)
    found = reader.recipe(read_nodes(path, "recipe"))
    if reader.mistakes or found is None:
        raise BadConceptFile(reader.message(str(path)))
    return found


class _RecipeReader(ConceptReader):
    """A pass over a file of a recipe."""

    def recipe(self, root: Node | None) -> RecipeFile | None:
        """The whole file; None where it has no recipe or no list of patches."""
        if root is None:
            self.wrong(
                TextPosition(1, 1), "the file is empty; write `recipe: NAME`, `base: NAME` and `patches:` with a list"
            )
            return None
        top = self.pairs(root, KEYS, "a file of a recipe")
        if "defaults" in top:
            self.defaults = self.read_defaults(top["defaults"])
        name, base = self.word(top.get("recipe"), "the recipe"), self.word(top.get("base"), "the base")
        why, listed = self.reason(top.get("why")), top.get("patches")
        for key, example in (("recipe", "`recipe: NAME`"), ("patches", "`patches:` with a list, `[]` for none")):
            if isinstance(root, Pairs) and key not in top:
                self.wrong(root.at, f"there is no `{key}`; write {example}")
        if (
            listed is not None
            and not isinstance(listed, Items)
            and not (isinstance(listed, Text) and listed.is_nothing)
        ):
            self.wrong(listed.at, "patches must be a list; write below it one line `- NAME` for each")
        entries = [self.entry(node) for node in (listed.items if isinstance(listed, Items) else ())]
        if name is None:
            return None
        return RecipeFile(name, base, why, tuple(each for each in entries if each is not None))

    def entry(self, node: Node) -> FileEntry | None:
        """One patch, or None where it has a mistake."""
        before = len(self.mistakes)
        own = (
            {key.value: value for key, value in node.pairs if key.value in ENTRY_KEYS}
            if isinstance(node, Pairs)
            else {}
        )
        patch, expires = self.word(own.get("patch"), "a patch"), self.day(own.get("expires"))
        strength, why = self.strength(own.get("strength")), self.reason(own.get("why"))
        names_concept = not isinstance(node, Pairs) or any(key.value not in ENTRY_KEYS for key, _ in node.pairs)
        if not names_concept and patch is None and len(self.mistakes) == before:
            self.wrong(node.at, "this entry names nothing; add `name: CONCEPT`, or `patch: ID`")
        request = self.concept(node, ENTRY_KEYS) if names_concept else None
        return None if len(self.mistakes) > before else FileEntry(patch, request, strength, expires, why)

    def strength(self, node: Node | None) -> float:
        """A finite number."""
        text = self.word(node, "a strength")
        with suppress(ValueError):
            if text is None or math.isfinite(float(text)):
                return 1.0 if text is None else float(text)
        assert node is not None
        self.wrong(node.at, f"a strength is a number, such as 0.5; got {text!r}")
        return 1.0

    def day(self, node: Node | None) -> date | None:
        """A day; None where there is none, or `never`."""
        text = self.word(node, "the day on which a patch expires")
        if node is None or text in (None, "never"):
            return None
        try:
            return date.fromisoformat(text or "")
        except ValueError:
            self.wrong(node.at, f"the day on which a patch expires is YYYY-MM-DD, or never; got {text!r}")
            return None

    def reason(self, node: Node | None) -> str:
        """Why something is done."""
        if node is None or (isinstance(node, Text) and node.is_nothing):
            return ""
        return self.word(node, "a reason") or ""


def plan_recipe(opened: OpenRegistry, file: RecipeFile, *, update: bool = False) -> RecipePlan:
    """What has to be done; nothing is stored. `update` takes the file's description of a concept that is known.

    Raises NotFound for an unknown base or patch, AlreadyExists for a recipe that is on another base, and what `plan_solves`
    raises.
    """
    registry = opened.registry
    base = registry.base(opened.base_name(file.base))
    is_new = not registry.has_recipe(file.recipe)
    held: Mapping[str, RecipeEntry] = {}
    if not is_new:
        record = registry.recipe(file.recipe)
        if registry.base(record.base).fingerprint != base.fingerprint:
            raise AlreadyExists(
                f"the recipe {record.name!r} is there already, on base {record.base!r} and not on {base.name!r}"
            )
        held = {entry.patch: entry for entry in record.entries}
    finder = _Finder(opened, base.name, held)
    planned = [finder.planned(entry) for entry in file.entries]
    named = [entry.record.id for entry in planned if entry.record is not None]
    if twice := next((id for id in named if named.count(id) > 1), None):
        raise OverpaintError(f"the file asks twice for the patch {twice[:12]}; keep one of the entries")
    gone = [registry.patch(id) for id in held if id not in named]
    removed = [PlannedEntry("remove", record.concept, record, None) for record in gone]
    requests = [entry.asked.request for entry in planned if entry.record is None and entry.asked is not None]
    context = opened.solve_context(base.name)
    solve = plan_solves(
        registry, [each for each in requests if each is not None], context, base=base.name, update=update
    )
    return RecipePlan(file.recipe, base.name, file.why, is_new, (*planned, *removed), solve)


class _Finder:
    """Finds the patches that entries mean."""

    def __init__(self, opened: OpenRegistry, base: str, held: Mapping[str, RecipeEntry]) -> None:
        self._registry, self._base, self._held = opened.registry, base, held
        self._known = opened.concepts()

    def planned(self, entry: FileEntry) -> PlannedEntry:
        """What is done for an entry."""
        record = self._named(entry) if entry.patch is not None else None
        if record is None and entry.request is not None:
            (request,) = completed([entry.request], self._known, ())
            entry = FileEntry(None, request, entry.strength, entry.expires, entry.why)
            record = next(self._matching(request), None)
        concept = record.concept if record is not None else entry.request.concept.name if entry.request else ""
        there = self._held.get(record.id) if record is not None else None
        action: Action = "add" if there is None else "change"
        if there is not None and (there.strength, there.until) == (entry.strength, entry.expires):
            action = "keep"
        return PlannedEntry(action, concept, record, entry)

    def _named(self, entry: FileEntry) -> PatchRecord | None:
        try:
            return self._registry.patch(entry.patch or "", base=self._base)
        except NotFound:
            if entry.request is None:
                raise
            return None

    def _matching(self, request: SolveRequest) -> Iterator[PatchRecord]:
        """Sound patches that were solved for a request, those on the recipe first, then the newest."""
        method, files = request.method(), PatchFiles(self._registry.blobs)
        with suppress(NotFound):  # a concept that is new here
            records = self._registry.patches(concept=request.concept.name, base=self._base, newest_first=True)
            for record in sorted(records, key=lambda each: each.id not in self._held):
                fits = (record.solver, record.seed) == (request.solver, request.seed)
                if fits and files.holds(record.id, record.blob):
                    with suppress(BlobCorrupt, BlobMissing):
                        if same_but_for_universe(manifest_of(self._registry, record), request, method):
                            yield record


def wanted_entries(plan: RecipePlan, outcomes: Sequence[SolveOutcome]) -> tuple[list[RecipeEntry], list[str]]:
    """What the recipe is to hold once the plan's solves came out, and the reasons that the file gives for its entries.

    Raises OverpaintError when one of them could not be solved.
    """
    if failed := [f"{each.task.order.concept.name}: {each.error}" for each in outcomes if each.record is None]:
        raise OverpaintError(
            "the recipe is as it was, because not everything could be solved:\n  " + "\n  ".join(failed)
        )
    solved = {each.task.order: each.record for each in outcomes if each.record is not None}
    entries, reasons = [], []
    for planned in plan.entries:
        if planned.asked is None:
            continue
        record = planned.record or (solved[planned.asked.request] if planned.asked.request else None)
        assert record is not None, "an entry without a patch was not solved"
        entries.append(RecipeEntry(record.id, planned.asked.strength, planned.asked.expires))
        if planned.asked.why and planned.action != "keep":
            reasons.append(f"{planned.concept}: {planned.asked.why}")
    return entries, reasons


def written(opened: OpenRegistry, name: str) -> str:
    """A recipe as such a file: patches by id, and how each was solved where another registry could do it again."""
    record = opened.registry.recipe(name)
    entries = []
    for patch, held in sorted(opened.registry.patches_on(name), key=lambda item: item[0].concept):
        entry = {"patch": patch.id, **_described(opened.registry, patch)}
        if held.strength != 1.0:
            entry["strength"] = held.strength
        if held.until is not None:
            entry["expires"] = held.until
        entries.append(entry)
    content = {"recipe": record.name, "base": record.base, "patches": entries}
    text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1 << 16)
    return text


def _described(registry: Registry, record: PatchRecord) -> dict[str, Any]:
    """How a patch was solved; nothing where that cannot be done again from a file: pictures, compressions, imports."""
    concept = registry.concept(record.concept)
    request = SolveRequest(concept, record.solver, as_texts(record.settings), record.seed)
    try:
        manifest, method = manifest_of(registry, record), request.method()
        if method.uses_pictures or not same_but_for_universe(manifest, request, method):
            return {}
    except OverpaintError:
        return {}
    described = {**brief(concept), "solver": record.solver}
    if record.settings:
        described["settings"] = as_texts(record.settings)
    if record.seed:
        described["seed"] = record.seed
    return described
