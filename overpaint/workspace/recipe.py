"""A recipe: a base plus a set of patches, with a history of who changed it, when and why."""

from __future__ import annotations

import getpass
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from overpaint.core.errors import NotFound, OverpaintError
from overpaint.core.names import checked_list, shown, typed_path
from overpaint.core.reporting import Progress, html_table, silent
from overpaint.registry.history import Note, StaleRevision, refuse_stale, today
from overpaint.registry.records import (
    Difference,
    EvaluationRecord,
    ExpiredEntry,
    HistoryRecord,
    PatchRecord,
    RecipeEntry,
    RecipeRecord,
    TagRecord,
)
from overpaint.workspace.opened import LostPatch, OpenRegistry

if TYPE_CHECKING:
    from overpaint.bases.base import Base
    from overpaint.evaluation.crosstalk import Pair
    from overpaint.patches.build import Built, Form
    from overpaint.patches.compose import Term
    from overpaint.patches.formats.exporting import Exported
    from overpaint.workspace.evaluating import Evaluated
    from overpaint.workspace.report import Reported
    from overpaint.workspace.reseparation import Reseparated
    from overpaint.workspace.solving import Solved
    from overpaint.workspace.widget import RecipeWidget


TRIES = 20
"""How often a change is computed again when others keep changing the same recipe."""


def current_user() -> str:
    """Who runs this program: the name of the user, or the number where it has no name, as in many containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return str(os.getuid()) if hasattr(os, "getuid") else "unknown"


def _own_id(patch: Solved | PatchRecord) -> str:
    if not isinstance(found := getattr(patch, "id", None), str):
        raise OverpaintError(f"a patch is named by its id or concept, or is what `solve` returned; got {shown(patch)}")
    return found


@dataclass(frozen=True)
class _Change:
    """What a recipe holds after a change (strengths by id), and what records it and returns the revision: None for nothing."""

    strengths: Mapping[str, float]
    commit: Callable[[Note], int] | None


class Recipe:
    """One recipe of a registry, to read and to change; its entries are read anew each time.

    The name may say a revision, as NAME@NUMBER or NAME@TAG: that can be read, composed and built, but not changed.
    """

    def __init__(self, opened: OpenRegistry, name: str) -> None:
        self._opened, self.name = opened, name

    def __repr__(self) -> str:
        record = self.record
        concepts = ", ".join(patch.concept for patch, _ in self.patches()) or "nothing"
        return f"<Recipe {self.name} on {record.base}, revision {record.revision}: erases {concepts}>"

    def _repr_html_(self) -> str:
        rows = [[p.concept, p.id[:12], p.solver, f"{s:g}", f"{p.nbytes:,}"] for p, s in self.patches()]
        return html_table(repr(self), ["concept", "patch", "solver", "strength", "bytes"], rows)

    @property
    def record(self) -> RecipeRecord:
        """What the registry has under this name now: base, patches with strengths, revision. Raises NotFound."""
        return self._opened.registry.recipe(self.name)

    @property
    def base(self) -> Base:
        """The base, opened."""
        return self._opened.base(self.record.base)

    def terms(self) -> list[Term]:
        """What `compose` takes. Raises WrongBase when a patch was not solved for this base, LostPatch for lost bytes."""
        return self._opened.terms(self.record)

    def digest(self) -> str:
        """The digest of the composed weights: the base's fingerprint when the recipe is empty."""
        return self._composed(dict(self.record.patches))

    def _composed(self, strengths: Mapping[str, float]) -> str:
        from overpaint.patches.compose import compose, composition_digest

        base = self.base
        terms = [self._opened.term_on(*each, base) for each in strengths.items()]
        return composition_digest(base, compose(base, terms, self._opened.progress))

    # Changing

    def add(
        self,
        patch: Solved | PatchRecord | str,
        strength: float = 1.0,
        *,
        why: str = "",
        who: str = "",
        until: date | Literal["never"] | None = None,
        exist_ok: bool = False,
    ) -> HistoryRecord:
        """Add a patch, or change the strength of one that is there; returns the line of history.

        A patch is what `solve` returned, or named by its id, the beginning of one, or its concept: the newest patch of that
        concept for this recipe's base. `until` is the day from which it has expired: `due` lists it from then on, and nothing is
        removed by itself. If omitted, an expiry that is there is kept.

        Raises AlreadyExists when it is there like this (with `exist_ok`, its line is returned), WrongBase for a patch of
        another base, and CannotFollow when a pipeline cannot take the change. Composes first, so that a patch that does not
        fit is refused before anything is written.
        """
        lines = self.add_all([patch], strength, why=why, who=who, until=until, exist_ok=exist_ok)
        patch_id = self._id(patch, self.record.base)
        return next(line for line in reversed(lines or self.log()) if line.patch == patch_id)

    def add_all(
        self,
        patches: Iterable[Solved | PatchRecord | str],
        strength: float = 1.0,
        *,
        why: str = "",
        who: str = "",
        until: date | Literal["never"] | None = None,
        exist_ok: bool = False,
    ) -> list[HistoryRecord]:
        """Add several patches in one revision, all or none; see `add`. Returns the revision's lines, one for each patch."""
        patches = checked_list(patches, "patches", object, "ids, concepts or what `solve` returned")

        def wanted(before: RecipeRecord) -> dict[str, RecipeEntry | None]:
            entries = {each.patch: each for each in before.entries}
            changes: dict[str, RecipeEntry | None] = {}
            for patch in patches:
                patch_id = self._id(patch, before.base)
                there = entries.get(patch_id)
                day = there.until if until is None and there is not None else until
                entry = RecipeEntry(patch_id, strength, None if day == "never" else day)
                if not (exist_ok and entry == there):
                    changes[patch_id] = entry
            return changes

        return self._change(wanted, why, who)

    def remove(self, patch: Solved | PatchRecord | str, *, why: str = "", who: str = "") -> HistoryRecord:
        """Remove a patch: the weights are composed again from the base. Returns the line of history.

        A concept's name means the patch of it that is on this recipe. Raises NotFound when it is not there. Needs no bytes
        of the patch that goes; where those of a patch that stays are lost, the digest of the weights is left open.
        """
        return self.remove_all([patch], why=why, who=who)[0]

    def remove_all(
        self, patches: Iterable[Solved | PatchRecord | str], *, why: str = "", who: str = ""
    ) -> list[HistoryRecord]:
        """Remove several patches in one revision, all or none; see `remove`."""
        patches = checked_list(patches, "patches", object, "ids, concepts or what `solve` returned")
        return self._change(lambda before: dict.fromkeys(self._id_here(each) for each in patches), why, who)

    def hold(
        self,
        entries: Iterable[RecipeEntry],
        *,
        revision: int | RecipeRecord | None = None,
        why: str = "",
        who: str = "",
    ) -> list[HistoryRecord]:
        """Hold exactly these entries (full patch ids), in one revision; returns its lines, none where it is so already.

        `revision` is the one that the caller saw, or the `record` of it: raises StaleRevision when there is another by now.
        Raises NotFound, WrongBase, LostPatch and CannotFollow as `add` does; the recipe is then as it was.
        """
        asked = {entry.patch: entry for entry in checked_list(entries, "entries", RecipeEntry, "recipe entries")}

        def wanted(before: RecipeRecord) -> dict[str, RecipeEntry | None]:
            refuse_stale(before, revision)
            held = {entry.patch: entry for entry in before.entries}
            return {id: asked.get(id) for id in (*held, *asked) if held.get(id) != asked.get(id)}

        return self._change(wanted, why, who)

    def set_patches(
        self, strengths: Mapping[str, float], *, revision: int | None = None, why: str = "", who: str = ""
    ) -> list[HistoryRecord]:
        """`hold` these patches (strengths by id, or as `add` names patches); expiries that are there stay.

        `revision` is the one that the caller saw, or that of this moment. Raises StaleRevision when there is another by now.
        """
        record = self.record
        expiries = {each.patch: each.until for each in record.entries}
        wanted = {self._id(each, record.base): strength for each, strength in strengths.items()}
        entries = [RecipeEntry(patch_id, strength, expiries.get(patch_id)) for patch_id, strength in wanted.items()]
        return self.hold(entries, revision=record if revision is None else revision, why=why, who=who)

    def replace(self, new: Mapping[str, str], *, why: str = "", who: str = "") -> list[HistoryRecord]:
        """Replace patches in one revision, keeping strength and expiry; `new` maps old id to new id.

        Raises NotFound for what is not there, AlreadyExists for a patch that would be here twice, WrongBase.
        """

        def planned(before: RecipeRecord) -> _Change:
            strengths = {new.get(each, each): strength for each, strength in before.patches}
            exchange = self._opened.registry.exchange_patches
            return _Change(strengths, partial(exchange, self.name, new, expected=before))

        return self._record(planned, why, who)

    def checkout(self, revision: int | str, *, why: str = "", who: str = "") -> list[HistoryRecord]:
        """Restore the patches of an earlier revision, by number or tag; returns the lines of the new revision.

        Raises NotFound for an unknown revision, AlreadyExists when the recipe holds the same now, LostPatch when a patch has
        to be added whose bytes are lost.
        """
        return self._checkout(revision, None, why, who)

    def _checkout(self, revision: int | str, seen: RecipeRecord | None, why: str, who: str) -> list[HistoryRecord]:
        def planned(before: RecipeRecord) -> _Change:
            refuse_stale(before, seen)
            then = self._opened.registry.recipe(f"{before.name}@{revision}")
            checkout = self._opened.registry.checkout_recipe
            return _Change(dict(then.patches), partial(checkout, self.name, then.revision, expected=before))

        return self._record(planned, why, who)

    def undo(self, *, why: str = "", who: str = "") -> list[HistoryRecord]:
        """Revert the newest change, as a new revision (so undoing twice brings it back).

        Raises NotFound without any, StaleRevision when somebody makes a newer one meanwhile.
        """
        newest = self.record
        if newest.revision == 0:
            raise NotFound(f"recipe {self.name!r} was never changed, so there is nothing to undo")
        return self._checkout(newest.revision - 1, newest, why or f"undo of revision {newest.revision}", who)

    def _change(
        self, wanted: Callable[[RecipeRecord], dict[str, RecipeEntry | None]], why: str, who: str
    ) -> list[HistoryRecord]:
        """Set what `wanted` says of a revision: entries by patch, None to remove one."""

        def planned(before: RecipeRecord) -> _Change:
            changes = wanted(before)
            strengths = {each: strength for each, strength in before.patches if each not in changes}
            strengths |= {entry.patch: entry.strength for entry in changes.values() if entry is not None}
            change = self._opened.registry.change_patches
            commit = partial(change, self.name, changes, expected=before) if changes else None
            return _Change(strengths, commit)

        return self._record(planned, why, who)

    def _record(self, planned: Callable[[RecipeRecord], _Change], why: str, who: str) -> list[HistoryRecord]:
        """Compose, bring the pipelines along, then record; again from the start when another process was faster."""
        for attempt in range(TRIES):
            before = self.record
            if before.name != self.name and not self._opened.registry.has_recipe(self.name):
                raise NotFound(
                    f"{self.name!r} is recipe {before.name!r} as it was then and cannot be changed; change {before.name!r} itself"
                )
            change = planned(before)
            after = self._digest_after(before, change.strengths)
            note = Note(why, who or current_user(), self._digest_of(before), after)
            try:
                with self._opened.pipelines.changing(before.name, change.strengths):
                    revision = change.commit(note) if change.commit else None
            except StaleRevision:
                if attempt == TRIES - 1:
                    raise
            else:
                return [] if revision is None else self._opened.registry.log(self.name, revision=revision)
        raise AssertionError("unreachable")

    def _digest_of(self, record: RecipeRecord) -> str | None:
        """The digest of a revision as it is recorded, computed where nobody recorded one, None where that is impossible."""
        if record.digest is not None:
            return record.digest
        try:
            return self._composed(dict(record.patches))
        except LostPatch:
            return None

    def _digest_after(self, before: RecipeRecord, strengths: Mapping[str, float]) -> str | None:
        """The digest of what a change leads to. Lost bytes stand in the way only of a change that adds something."""
        carried = dict(before.patches)
        if strengths == carried:
            return before.digest
        if not strengths:
            return self._opened.registry.base(before.base).fingerprint
        try:
            return self._composed(strengths)
        except LostPatch:
            if any(carried.get(each) != strength for each, strength in strengths.items()):
                raise
            return self._recorded(before, strengths)

    def _recorded(self, before: RecipeRecord, strengths: Mapping[str, float]) -> str | None:
        """The digest of an earlier revision that held the same, if there was one."""
        for revision in reversed(range(1, before.revision)):
            then = self._opened.registry.recipe(f"{before.name}@{revision}")
            if dict(then.patches) == strengths and then.digest is not None:
                return then.digest
        return None

    def _id(self, patch: Solved | PatchRecord | str, base: str) -> str:
        """The id of a patch; a concept's name means its newest patch for `base`."""
        return self._opened.registry.patch(patch, base=base).id if isinstance(patch, str) else _own_id(patch)

    def _id_here(self, patch: Solved | PatchRecord | str) -> str:
        """The id of a patch; a concept's name means the patch of it that is on this recipe."""
        if not isinstance(patch, str):
            return _own_id(patch)
        records = [record for record, _ in self._opened.registry.patches_on(self.name)]
        named = [record.id for record in records if record.concept == patch]
        begun = [record.id for record in records if len(patch) >= 4 and record.id.startswith(patch.lower())]
        if len(here := named or begun) == 1:
            return here[0]
        return self._opened.registry.patch(patch).id

    # Pipelines that follow

    def pipeline(self, *, device: str = "auto") -> Any:
        """A fresh diffusers pipeline of the base with this recipe applied; it follows the recipe, see `apply`."""
        from overpaint.bases.loading import resolve_device

        return self.apply(self.base.pipeline(device=str(resolve_device(device))))

    def apply(self, pipe: Any) -> Any:
        """Make a loaded pipeline of this base carry this recipe; returns the pipeline.

        From then on it follows: whatever is added, removed, checked out or undone here, in this process, it carries at
        once, restored bit for bit when the recipe is empty; `refresh` takes what other processes changed. A revision
        (NAME@3) is applied as it was and followed by nobody. Not while the pipeline draws, and from one thread at a time.

        Raises BadPipeline or ForeignChange for a pipeline that is not the base's, LostPatch for a patch whose bytes are
        lost; the pipeline is then as it was.
        """
        record = self.record
        follows = record.name if self._opened.registry.has_recipe(self.name) else None
        self._opened.pipelines.apply(follows, pipe, self.base, dict(record.patches))
        return pipe

    def applied(self, pipe: Any) -> AppliedRecipe:
        """`apply` as a handle: closing it, or the end of its `with` block, gives the pipeline the base's weights back.

        Raises OverpaintError for a pipeline that carries a recipe already: it would carry none afterwards.
        """
        if self._opened.pipelines.carries(pipe):
            raise OverpaintError(
                "the pipeline carries a recipe already, and would draw with the bare base once this handle is closed; close the "
                "handle that is open, or use `apply`, which replaces what is carried"
            )
        return AppliedRecipe(self._opened, self.apply(pipe))

    def widget(
        self,
        prompts: str | Iterable[str] = "a photo of a cat",
        *,
        seed: int = 0,
        steps: int = 20,
        guidance: float | None = None,
        device: str = "auto",
    ) -> RecipeWidget:
        """Switches and strengths beside pictures, for a notebook: base and recipe, drawn anew after every switch.

        The recipe itself stays as it is until `widget.save(why=...)`. `guidance` None is the base's own. Raises
        OverpaintError without anywidget, the extra `overpaint[notebook]`.
        """
        try:
            from overpaint.workspace.widget import RecipeWidget
        except ModuleNotFoundError as error:
            raise OverpaintError(f"a widget needs anywidget ({error}): pip install 'overpaint[notebook]'") from error
        asked = (prompts,) if isinstance(prompts, str) else tuple(prompts)

        def keep(strengths: Mapping[str, float], revision: int, why: str) -> list[HistoryRecord]:
            return self.set_patches(strengths, revision=revision, why=why)

        how: dict[str, Any] = {"seed": seed, "steps": steps, "guidance": guidance, "device": device}
        return RecipeWidget(self._opened, self.record, self.patches(), keep, asked, **how)

    def refresh(self) -> None:
        """Bring the pipelines that follow this recipe to what it holds now, whoever changed it. Raises CannotFollow."""
        record = self.record
        with self._opened.pipelines.changing(record.name, dict(record.patches)):
            pass

    def release(self, pipe: Any) -> None:
        """Let go of a pipeline: it follows no recipe any more, and its weights stay as they are."""
        self._opened.pipelines.release(pipe)

    # Checkpoints, files and numbers

    def build(
        self,
        out: str | Path,
        *,
        format: Form | None = None,
        warn: Callable[[str], None] = lambda text: None,
        original: str | Path | None = None,
    ) -> Built:
        """Bake this recipe into a new checkpoint `out` of its base's form, or of another (see `overpaint.patches.build`).

        A name that ends in .safetensors means a single file. With `original`, a file of the base's denoiser as another
        program has it (safetensors or GGUF), `out` is a copy of that (see `overpaint.patches.model_file`). Raises
        AlreadyExists when `out` is there.
        """
        from overpaint.patches.build import build
        from overpaint.patches.model_file import build_file

        out = typed_path(out)
        if original is not None:
            if format is not None:
                raise OverpaintError("a copy of an original file has its form; leave out the format, or the original")
            built = build_file(
                self.base,
                self.terms(),
                typed_path(original),
                out,
                record=self.as_json(),
                notice=warn,
                progress=self._opened.progress,
            )
        else:
            built = build(
                self.base,
                self.terms(),
                out,
                card=self.card(),
                record=self.as_json(),
                notice=warn,
                form=format or ("single-file" if out.suffix == ".safetensors" else None),
                progress=self._opened.progress,
            )
        recorded = self.record.digest
        if recorded is not None and built.digest != recorded:
            warn(
                f"what was built has the digest {built.digest[:12]}, and the recipe's history says {recorded[:12]}: it was "
                "composed on another kind of processor, or the history was changed; see `overpaint recipe log` and `verify`"
            )
        return built

    def evaluate(
        self,
        suite: str = "quick",
        *,
        settings: Mapping[str, str] | None = None,
        judge: str = "",
        prompts: Path | None = None,
        seed: int = 0,
        steps: int = 20,
        guidance: float | None = None,
        batch: int = 50,
        device: str = "auto",
        on: str = "",
        progress: Progress = silent,
    ) -> Evaluated:
        """Draw with this recipe, judge the pictures, and store the numbers in the registry.

        `judge` is one of `overpaint.evaluation.judges`; empty is the base's own. `prompts` is a CSV file of prompts of your
        own. `guidance` None is the base's own, `batch` how many pictures are drawn at once. All seeds follow from
        `seed`. `on` names a Ray cluster that draws (`ray`, `ray://HOST:PORT`); empty is this process. Raises NotFound for an
        unknown suite or judge, BlindJudge for a judge that recognises too little.
        """
        from overpaint.workspace.evaluating import EvaluationRequest, evaluate

        request = EvaluationRequest(suite, settings or {}, judge, prompts, seed, steps, guidance, batch, device, on)
        return evaluate(self._opened, self.name, request, who=current_user(), progress=progress)

    def report(self, out: str | Path, *, device: str = "auto", progress: Progress = silent) -> Reported:
        """Write what was measured of this recipe as one HTML page, with JSON, CSV and PNG beside it.

        Raises OverpaintError when it was not evaluated as it is now, AlreadyExists when one of the files is there.
        """
        from overpaint.workspace.report import report

        return report(self._opened, self.name, typed_path(out), device=device, progress=progress)

    def export(
        self,
        out: str | Path,
        format: str | None = None,
        *,
        for_: str | None = None,
        dtype: str = "float32",
        truncate: int | None = None,
        progress: Progress = silent,
    ) -> Exported:
        """Write this recipe as one new file that other tools load; see `Workspace.export_patches`."""
        from overpaint.workspace.exchange import export_patches

        out, base = typed_path(out), self.record.base
        return export_patches(
            self._opened,
            base,
            self.patches(),
            out,
            format,
            self.name,
            for_=for_,
            dtype=dtype,
            truncate=truncate,
            progress=progress,
        )

    # Together with the other patches

    def reseparate(
        self, *, device: str = "auto", why: str = "", who: str = "", progress: Progress = silent
    ) -> Reseparated:
        """Solve the closed-form patches again for all concepts known now, and replace them in one revision.

        See `overpaint.workspace.reseparation`, also for what it raises; the recipe is then as it was.
        """
        from overpaint.workspace.reseparation import reseparate

        def exchange(new: Mapping[str, str], reason: str) -> list[HistoryRecord]:
            return self.replace(new, why=why or reason, who=who)

        return reseparate(self._opened, self.name, exchange, device=device, progress=progress)

    def mixture(self) -> str:
        """One sentence when the closed-form patches were solved for different universes, else nothing."""
        from overpaint.workspace.reseparation import mixture

        return mixture(self._opened.registry, self.name)

    def disturbances(self, patch_id: str) -> list[Pair]:
        """The strong cross-talk between one patch and the others, both ways, where it has a closed form."""
        from overpaint.evaluation.crosstalk import disturbances

        patches = [self._opened.patch(each) for each, _ in self.record.patches]
        concept = self._opened.patch(patch_id).concept.name
        return disturbances(self.base, patches, concept, cache=self._opened.moments)

    # Keeping

    def copy(self, name: str, *, why: str = "", who: str = "") -> Recipe:
        """A new recipe with the patches of this one. Raises AlreadyExists."""
        self._opened.registry.copy_recipe(self.name, name, why=why, who=who or current_user())
        return Recipe(self._opened, name)

    def delete(self, *, why: str = "", who: str = "") -> None:
        """Delete this recipe. Its history stays, and `Workspace.undelete_recipe` brings it back."""
        self._opened.registry.delete_recipe(self.name, why=why, who=who or current_user())
        self._opened.pipelines.release_all(self.name)

    def tag(self, tag: str, *, who: str = "") -> TagRecord:
        """Tie a tag to this recipe as it is now: `checkout(tag)` comes back to it. Raises AlreadyExists."""
        return self._opened.registry.tag(tag, recipes=[self.name], who=who or current_user())[0]

    def untag(self, tag: str) -> None:
        """Untie a tag from this recipe. Raises NotFound."""
        self._opened.registry.untag(tag, recipes=[self.record.name])

    # Reading

    def as_file(self) -> str:
        """This recipe as a file that `Workspace.apply_recipe` takes (YAML)."""
        from overpaint.workspace.recipe_file import written

        return written(self._opened, self.name)

    def log(self) -> list[HistoryRecord]:
        """Every change, oldest first."""
        return self._opened.registry.log(self.record.name)

    def diff(self, other: str) -> list[Difference]:
        """Every patch that differs between this recipe and another recipe or revision (NAME, NAME@NUMBER, NAME@TAG)."""
        return self._opened.registry.diff(self.name, other)

    def due(self, on: date | None = None) -> list[ExpiredEntry]:
        """The patches of this recipe that have expired, as of today (in UTC) or another day."""
        return self._opened.registry.due(on or today(), recipe=self.record.name)

    def remove_expired(self, on: date | None = None, *, why: str = "", who: str = "") -> list[HistoryRecord]:
        """Remove what has expired by today (in UTC) or another day, in one revision; returns its lines, none for nothing."""
        day = on or today()

        def wanted(before: RecipeRecord) -> dict[str, RecipeEntry | None]:
            return dict.fromkeys(each.patch for each in before.entries if each.has_expired(day))

        return self._change(wanted, why or "expired", who)

    def evaluations(self) -> list[EvaluationRecord]:
        """The latest run of every suite on this recipe as it is (or, NAME@REVISION, as it was)."""
        return self._opened.registry.evaluations(recipe=self.name, latest=True)

    def patches(self) -> list[tuple[PatchRecord, float]]:
        """The patches of the recipe, with strengths, by concept."""
        entries = [(patch, entry.strength) for patch, entry in self._opened.registry.patches_on(self.name)]
        return sorted(entries, key=lambda item: item[0].concept)

    def as_json(self) -> dict[str, Any]:
        """Name, base and patches, as a build's files and tables state them."""
        record = self.record
        patches = [
            {"id": patch.id, "concept": patch.concept, "solver": patch.solver, "strength": strength}
            for patch, strength in self.patches()
        ]
        return {"recipe": self.name, "base_name": record.base, "patches": patches}

    def card(self) -> str:
        """A model card for a build: what is erased, and how well, as measured."""
        from overpaint.workspace.report import model_card

        return model_card(self.name, self.record.base, self.base.fingerprint, self.patches())


class AppliedRecipe:
    """A pipeline with a recipe applied, until it is closed; a context manager. It follows the recipe as after `apply`."""

    def __init__(self, opened: OpenRegistry, pipe: Any) -> None:
        self._opened, self.pipe = opened, pipe
        self._is_open = True

    def close(self) -> None:
        """Give the base's weights back, bit for bit, and follow the recipe no more. Closing twice is closing once.

        Raises ForeignChange where somebody else changed the weights; the pipeline is let go of nevertheless.
        """
        if self._is_open:
            self._is_open = False
            self._opened.pipelines.restore(self.pipe)

    def __enter__(self) -> AppliedRecipe:
        if not self._is_open:
            raise OverpaintError("this handle is closed, and its pipeline has the base's weights; ask for a new one")
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
