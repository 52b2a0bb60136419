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

An entry is a concept, as a file of concepts has it (`concept_file`), or a `patch` by its id, or both: then the concept says
how to solve it where there is no such patch. `strength` is a decimal number, 1 if omitted; `expires` is YYYY-MM-DD, or `never`,
as if it were omitted. `patches: []` removes all patches; a file that ends before its list is a mistake.

A concept means a patch that was solved for it as it is described, with the solver, settings and seed that are asked for: one
that is on the recipe, else the newest there is, else it is solved. Concepts that the registry learned later change nothing:
a file that was applied stays applied, and `recipe reseparate` solves its patches for those concepts too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml  # type: ignore[import-untyped]

from overpaint.core.errors import AlreadyExists, NotFound, OverpaintError
from overpaint.core.names import checked_note, parsed_day, parsed_number, sought_name
from overpaint.registry.history import check_entry
from overpaint.registry.records import HistoryRecord, PatchRecord, RecipeEntry, RecipeRecord
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
    parse,
    read_nodes,
)
from overpaint.workspace.planning import (
    SolvePlan,
    SolveRequest,
    as_texts,
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
    """One patch that a file asks for: by `patch`, by how to solve it, or both; and where in the file."""

    patch: str | None
    request: SolveRequest | None
    strength: float
    expires: date | None
    why: str
    at: TextPosition


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
    """What makes a recipe as a file says: a recipe to create or to change, and patches to solve before.

    `revision` is the one of the recipe that the plan was made from, 0 for a new recipe, and `seen` the recipe as it was then,
    None for a new one: the plan holds for no other.
    """

    recipe: str
    base: str
    why: str
    is_new: bool
    revision: int
    entries: tuple[PlannedEntry, ...]
    solve: SolvePlan
    seen: RecipeRecord | None = None

    @property
    def is_done(self) -> bool:
        """Whether the recipe is as the file says already."""
        return not self.is_new and all(entry.action == "keep" for entry in self.entries)

    def reason(self, why: str = "") -> str:
        """What history says: `why`, or else the file's reason, and those of entries. Raises OverpaintError if it is too long."""
        of_entries = [
            f"{each.concept}: {each.asked.why}"
            for each in self.entries
            if each.asked is not None and each.asked.why and each.action != "keep"
        ]
        return checked_note("; ".join(filter(None, (why or self.why, *of_entries))), "the reason for a change")


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
        name, base = self.known(top.get("recipe"), "recipe"), self.known(top.get("base"), "base")
        why, listed = self.note(top.get("why"), "a reason"), top.get("patches")
        for key, example in (("recipe", "`recipe: NAME`"), ("patches", "`patches:` with a list, `[]` for none")):
            if isinstance(root, Pairs) and key not in top:
                self.wrong(root.at, f"there is no `{key}`; write {example}")
        if isinstance(listed, Text) and listed.is_nothing:
            self.wrong(
                listed.at, "no patch is listed; write `patches: []` to remove all, or one line `- NAME` for each"
            )
        elif listed is not None and not isinstance(listed, Items):
            self.wrong(listed.at, "patches must be a list; write below it one line `- NAME` for each")
        entries = [self.entry(node) for node in (listed.items if isinstance(listed, Items) else ())]
        if name is None:
            return None
        return RecipeFile(name, base, why, tuple(each for each in entries if each is not None))

    def entry(self, node: Node) -> FileEntry | None:
        """One patch, or None where it has a mistake."""
        before = len(self.mistakes)
        pairs = node.pairs if isinstance(node, Pairs) else []
        names_concept = not isinstance(node, Pairs) or any(key.value not in ENTRY_KEYS for key, _ in pairs)
        # Where a concept is named, what is there twice is found with the rest of its keys.
        own = {key.value: value for key, value in pairs} if names_concept else self.pairs(node, ENTRY_KEYS, "an entry")
        patch, expires = self.text(own.get("patch"), "a patch"), self.day(own.get("expires"))
        strength, why = self.strength(own.get("strength")), self.note(own.get("why"), "a reason")
        if not names_concept and patch is None and len(self.mistakes) == before:
            self.wrong(node.at, "this entry names nothing; add `name: CONCEPT`, or `patch: ID`")
        # Several patches of a concept are told apart by their ids.
        request = self.concept(node, ENTRY_KEYS, once=patch is None) if names_concept else None
        return None if len(self.mistakes) > before else FileEntry(patch, request, strength, expires, why, node.at)

    def known(self, node: Node | None, what: str) -> str | None:
        """The name of what may be there already: one that is new is checked when it is made."""
        text = self.text(node, f"the {what}")
        return None if node is None or text is None else self.checked(node, sought_name, text, what)

    def strength(self, node: Node | None) -> float:
        """A finite number."""
        text = self.text(node, "a strength")
        number = None if node is None or text is None else self.checked(node, parsed_number, text, "a strength")
        return 1.0 if number is None else number

    def day(self, node: Node | None) -> date | None:
        """A day; None where there is none, or `never`."""
        what = "the day from which a patch has expired"
        text = self.text(node, what)
        if node is None or text is None or text == "never":
            return None
        return self.checked(node, partial(parsed_day, other="never"), text, what)


def plan_recipe(opened: OpenRegistry, file: RecipeFile, *, update: bool = False) -> RecipePlan:
    """What has to be done; nothing is stored. `update` takes the file's description of a concept that is known.

    Raises NotFound for an unknown base or patch, AlreadyExists for a recipe that is on another base, BadConceptFile for an
    entry that contradicts itself, what the registry would raise for the new entries, and what `plan_solves` raises.
    """
    registry = opened.registry
    base = registry.base(opened.base_name(file.base))
    is_new = not registry.has_recipe(file.recipe)
    held: Mapping[str, RecipeEntry] = {}
    seen: RecipeRecord | None = None
    if not is_new:
        seen = registry.recipe(file.recipe)
        if registry.base(seen.base).fingerprint != base.fingerprint:
            raise AlreadyExists(
                f"the recipe {seen.name!r} is there already, on base {seen.base!r} and not on {base.name!r}"
            )
        held = {entry.patch: entry for entry in seen.entries}
    finder = _Finder(opened, base.name, held)
    planned = [finder.planned(entry) for entry in file.entries]
    named = {entry.record.id: entry for entry in planned if entry.record is not None}
    requests = [each.asked.request for each in planned if each.record is None and each.asked and each.asked.request]
    _refuse_twice([*(each.record.id for each in planned if each.record is not None), *requests])
    wanted = [RecipeEntry(id, each.asked.strength, each.asked.expires) for id, each in named.items() if each.asked]
    registry.check_entries(file.recipe, base.name, wanted)
    gone = [registry.patch(id) for id in held if id not in named]
    removed = [PlannedEntry("remove", record.concept, record, None) for record in gone]
    solve = plan_solves(registry, requests, opened.solve_context(base.name), base=base.name, update=update)
    plan = RecipePlan(
        file.recipe, base.name, file.why, is_new, seen.revision if seen else 0, (*planned, *removed), solve, seen
    )
    plan.reason()
    return plan


def _refuse_twice(asked: Sequence[str | SolveRequest]) -> None:
    """Raise OverpaintError when an id of a patch, or how one is to be solved, is there twice."""
    for each, count in Counter(asked).items():
        if count > 1:
            called = f"the patch {each[:12]}" if isinstance(each, str) else f"{each.concept.name!r}, solved in one way"
            raise OverpaintError(f"the file asks twice for {called}; keep one of the entries")


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
            entry = replace(entry, patch=None, request=request)
            record = next(self._matching(request), None)
        there = self._held.get(record.id) if record is not None else None
        try:
            check_entry(there, RecipeEntry("", entry.strength, entry.expires))
        except OverpaintError as error:
            raise BadConceptFile(f"{entry.at}: {error}") from error
        concept = record.concept if record is not None else entry.request.concept.name if entry.request else ""
        action: Action = "add" if there is None else "change"
        if there is not None and (there.strength, there.until) == (entry.strength, entry.expires):
            action = "keep"
        return PlannedEntry(action, concept, record, entry)

    def _named(self, entry: FileEntry) -> PatchRecord | None:
        try:
            record = self._registry.patch(entry.patch or "", base=self._base)
        except NotFound:
            if entry.request is None:
                raise
            return None
        if entry.request is not None and entry.request.concept.name != record.concept:
            raise BadConceptFile(
                f"{entry.at}: the patch {record.id[:12]} erases {record.concept!r}, and this entry is named "
                f"{entry.request.concept.name!r}; keep `patch` or `name`, whichever is meant"
            )
        return record

    def _matching(self, request: SolveRequest) -> Iterator[PatchRecord]:
        """Sound patches that were solved for a request, those on the recipe first, then the newest."""
        solver, files = request.configured(), PatchFiles(self._registry.blobs)
        with suppress(NotFound):  # a concept that is new here
            records = self._registry.patches(concept=request.concept.name, base=self._base, newest_first=True)
            for record in sorted(records, key=lambda each: each.id not in self._held):
                fits = (record.solver, record.seed) == (request.solver, request.seed)
                if fits and files.holds(record.id, record.blob):
                    with suppress(BlobCorrupt, BlobMissing):
                        if same_but_for_universe(manifest_of(self._registry, record), request, solver):
                            yield record


def wanted_entries(plan: RecipePlan, outcomes: Sequence[SolveOutcome]) -> list[RecipeEntry]:
    """What the recipe is to hold once the plan's solves came out. Raises OverpaintError when one could not be solved."""
    if failed := [f"{each.task.request.concept.name}: {each.error}" for each in outcomes if each.record is None]:
        raise OverpaintError(
            "the recipe is as it was, because not everything could be solved:\n  " + "\n  ".join(failed)
        )
    solved = {each.task.request: each.record for each in outcomes if each.record is not None}
    entries = []
    for planned in plan.entries:
        if planned.asked is None:
            continue
        record = planned.record or (solved[planned.asked.request] if planned.asked.request else None)
        assert record is not None, "an entry without a patch was not solved"
        entries.append(RecipeEntry(record.id, planned.asked.strength, planned.asked.expires))
    return entries


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
    return _yaml(content)


def _described(registry: Registry, record: PatchRecord) -> dict[str, Any]:
    """How a patch was solved; nothing where that cannot be done again from a file: pictures, compressions, imports.

    Nor where a file would be read as something else: earlier versions let names pass that no file may have.
    """
    concept = registry.concept(record.concept)
    request = SolveRequest(concept, record.solver, as_texts(record.settings), record.seed)
    try:
        manifest, solver = manifest_of(registry, record), request.configured()
        if solver.uses_pictures or not same_but_for_universe(manifest, request, solver):
            return {}
    except OverpaintError:
        return {}
    described = {**concept.brief(), "solver": record.solver}
    if record.settings:
        described["settings"] = as_texts(record.settings)
    if record.seed:
        described["seed"] = record.seed
    node = parse(_yaml(described).encode())
    entry = node and _RecipeReader(Path()).entry(node)
    again = entry and entry.request and replace(entry.request, is_bare_name=False)
    return described if again == request else {}


def _yaml(content: dict[str, Any]) -> str:
    text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1 << 16)
    return text
