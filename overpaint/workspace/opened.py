"""A registry with what was opened from it: bases, patches, and the pipelines that follow a recipe.

What the use cases of this room take.
"""

from __future__ import annotations

import shlex
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from overpaint.core.concepts import Concept
from overpaint.core.errors import AlreadyExists, NotFound, OverpaintError
from overpaint.core.names import checked_texts
from overpaint.core.reporting import Progress, silent
from overpaint.registry.records import BaseRecord, RecipeRecord
from overpaint.registry.registry import Registry
from overpaint.registry.store import BlobCorrupt, BlobMissing
from overpaint.workspace.planning import SolveContext

if TYPE_CHECKING:
    from overpaint.bases.base import Base
    from overpaint.patches.compose import Term
    from overpaint.patches.live import Overlay
    from overpaint.patches.patch import Patch


ATTRIBUTE = "_overpaint_overlay"
"""Where a pipeline keeps the overlay that changes it, so that both are freed together."""

ReadTerm: TypeAlias = "Callable[[str, float, Base], Term]"
"""Reads a stored patch (id, strength) as a term of a composition on a base. Raises WrongBase."""


class LostPatch(OverpaintError):
    """A patch whose bytes are lost or damaged."""


class CannotFollow(OverpaintError):
    """A pipeline that carries a recipe and cannot take a change of it."""


class LivePipelines:
    """The pipelines of this process that carry recipes, by the name of the recipe; they are referred to weakly."""

    def __init__(self, term: ReadTerm) -> None:
        self._term = term
        self._overlays: dict[str, weakref.WeakSet[Overlay]] = {}

    def apply(self, recipe: str | None, pipe: Any, base: Base, strengths: Mapping[str, float]) -> None:
        """Make `pipe` carry these patches (strengths by id) and follow `recipe`, or nothing if None.

        Raises CannotFollow when the pipeline carries patches of another base, and what `Overlay` raises; the pipeline is
        then as it was.
        """
        from overpaint.patches.live import Overlay

        overlay: Overlay | None = getattr(pipe, ATTRIBUTE, None)
        if overlay is None:
            overlay = Overlay(_weakly(pipe), base)
        elif overlay.base.fingerprint != base.fingerprint:
            raise CannotFollow(
                f"the pipeline carries a recipe on the base {overlay.base.fingerprint[:12]}, and this one is on "
                f"{base.fingerprint[:12]}; load another pipeline"
            )
        overlay.set(self._terms(overlay, strengths))
        setattr(pipe, ATTRIBUTE, overlay)
        self._forget(overlay)
        if recipe is not None:
            self._overlays.setdefault(recipe, weakref.WeakSet()).add(overlay)

    def carries(self, pipe: Any) -> bool:
        """Whether a recipe was applied to `pipe`, be it an empty one, and not taken off again."""
        return getattr(pipe, ATTRIBUTE, None) is not None

    def release(self, pipe: Any) -> None:
        """Let go of a pipeline: it follows no recipe any more, and its weights stay as they are."""
        overlay: Overlay | None = getattr(pipe, ATTRIBUTE, None)
        if overlay is not None:
            delattr(pipe, ATTRIBUTE)
            self._forget(overlay)

    def restore(self, pipe: Any) -> None:
        """Give a pipeline the base's weights back and let go of it; one that carries nothing is left as it is.

        Raises ForeignChange where somebody else changed what it carries; it is let go of nevertheless.
        """
        overlay: Overlay | None = getattr(pipe, ATTRIBUTE, None)
        self.release(pipe)
        if overlay is not None:
            overlay.close()

    def release_all(self, recipe: str) -> None:
        """No pipeline follows `recipe` any more."""
        self._overlays.pop(recipe, None)

    @contextmanager
    def changing(self, recipe: str, strengths: Mapping[str, float]) -> Iterator[None]:
        """Make every pipeline of `recipe` carry these patches; all are as before when one cannot, or when the block raises.

        Raises CannotFollow.
        """
        changed: list[tuple[Overlay, tuple[Term, ...]]] = []
        try:
            for overlay in list(self._overlays.get(recipe, ())):
                before = overlay.terms
                try:
                    overlay.set(self._terms(overlay, strengths))
                except OverpaintError as error:
                    raise CannotFollow(
                        f"a pipeline that follows the recipe {recipe!r} cannot take the change, so the recipe stays as it "
                        f"was: {error}; or let go of that pipeline with recipe.release(pipe)"
                    ) from error
                changed.append((overlay, before))
            yield
        except BaseException:
            for overlay, before in reversed(changed):
                overlay.set(before)
            raise

    def _forget(self, overlay: Overlay) -> None:
        for overlays in self._overlays.values():
            overlays.discard(overlay)

    def _terms(self, overlay: Overlay, strengths: Mapping[str, float]) -> list[Term]:
        """Terms that the overlay carries already are taken from it, so that removing one reads no file."""
        carried = {(each.id, each.strength): each for each in overlay.terms}
        return [carried.get(each) or self._term(*each, overlay.base) for each in strengths.items()]


def _weakly(pipe: Any) -> Any:
    # The pipeline keeps its overlay; were it kept by it in turn, `del pipe` would free no memory until some later time.
    try:
        return weakref.proxy(pipe)
    except TypeError:
        return pipe


class OpenRegistry:
    """Bases and patches of a registry are opened once and kept.

    `progress` may be set: the fingerprint of a base, composing and building report to it. So may `on_base`, which is called
    with every base that is opened, before its first tensor is read.
    """

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.progress: Progress = silent
        self.on_base: Callable[[Base], None] = lambda base: None
        self.pipelines = LivePipelines(self.term_on)
        self._bases: dict[str, tuple[BaseRecord, Base]] = {}
        self._patches: dict[str, Patch] = {}

    # Bases

    def add_base(self, name: str, source: str | Path, exist_ok: bool = False) -> BaseRecord:
        """Remember a base: a diffusers folder, a single-file checkpoint, a model on the Hub (`ORG/MODEL[@REVISION]`, kept
        with its commit), or `emoji` for the embedded one. One base may have several names.

        A base that has this name already, and is no longer where it was, is remembered at `source` from now on: see the
        returned record. Raises AlreadyExists for a name that is taken (with `exist_ok`, only by another base),
        OverpaintError for a base that is missing, broken, unknown, or quantised so that no patch can be applied.
        """
        base, there = self._opened(source), None
        base.check_changeable(base.projections())
        with suppress(NotFound):
            there = self.registry.base(name)
        if there is None:
            record = self.registry.add_base(name, Path(base.source), base.layout.name, base.fingerprint)
        elif there.fingerprint != base.fingerprint:
            raise AlreadyExists(
                f"another base called {name!r} is there already: fingerprint {there.fingerprint[:12]}, and {source} has "
                f"{base.fingerprint[:12]}; choose another name"
            )
        elif not self._is_at(there.source, there.fingerprint):
            record = self.registry.move_base(name, Path(base.source), base.fingerprint)
        elif exist_ok:
            record = there
        else:
            raise AlreadyExists(
                f"this base is called {name!r} already, and its files are at {there.source}; there is nothing to add"
            )
        self._bases[record.name] = record, base
        return record

    def move_base(self, name: str, source: str | Path) -> BaseRecord:
        """Remember that the files of a base are at `source` now.

        Raises NotFound for an unknown name, OverpaintError when another base is there, both fingerprints in the message.
        """
        self.registry.base(name)
        base = self._opened(source)
        record = self.registry.move_base(name, Path(base.source), base.fingerprint)
        self._bases[record.name] = record, base
        return record

    def remove_base(self, name: str) -> None:
        """Forget a base; its files are left alone. What needs it goes over to another name of the same base.

        Raises NotFound, OverpaintError when there is no other name and patches or recipes need it.
        """
        self.registry.remove_base(name)
        self._bases.pop(name, None)

    def bases(self) -> list[BaseRecord]:
        """All bases of the registry."""
        return self.registry.bases()

    def base(self, name: str) -> Base:
        """An opened base. Raises NotFound for an unknown name, OverpaintError when its files are gone, broken or changed.

        Another process may have removed it and added another of that name, or moved its files; then it is opened anew.
        """
        record = self.registry.base(name)
        known, base = self._bases.get(record.name, (None, None))
        if base is None or known != record:
            if record.source.is_absolute() and not record.source.exists():
                raise OverpaintError(
                    f"the files of the base {name!r} are no longer at {record.source}; if they were moved, add them again "
                    f"under this name: `overpaint base add {shlex.quote(name)} PATH`"
                )
            base = self._opened(record.source)
            if base.fingerprint != record.fingerprint:
                raise OverpaintError(
                    f"the base {name!r} at {record.source} changed since it was added: fingerprint "
                    f"{base.fingerprint[:12]} instead of {record.fingerprint[:12]}; put its files back, or add it under "
                    "another name"
                )
            self._bases[record.name] = record, base
        return base

    def _is_at(self, source: Path, fingerprint: str) -> bool:
        try:
            return self._opened(source).fingerprint == fingerprint
        except OverpaintError:
            return False

    def base_name(self, name: str | None) -> str:
        """`name`, or the name of the only base there is. Raises OverpaintError when there are several, or none."""
        if name is not None:
            return name
        records = self.registry.bases()
        if len({record.fingerprint for record in records}) != 1:
            names = ", ".join(record.name for record in records) or "none; add one first"
            raise OverpaintError(f"say on which base, as base=NAME (known: {names})")
        return records[0].name

    def _opened(self, source: str | Path) -> Base:
        from overpaint.bases.base import Base

        base = Base.open(source)
        self.on_base(base)
        digests = (
            self.registry.folder / "cache" / "digests" / f"{sha256(str(base.path).encode()).hexdigest()[:32]}.json"
        )
        base.load_digests(digests)
        base.digests(base.names, self.progress)
        base.save_digests(digests)
        return base

    # Concepts and patches

    def concepts(self) -> list[Concept]:
        """All concepts of the registry."""
        return self.registry.concepts()

    def known_or_new(self, concept: str | Concept) -> Concept:
        """A concept as the registry knows it; a name that it does not know is an object of that name."""
        if isinstance(concept, Concept):
            return concept
        try:
            return self.registry.concept(concept)
        except NotFound:
            return Concept(concept)

    @property
    def vocabularies(self) -> Path:
        """The folder in which second moments of vocabularies are cached."""
        return self.registry.folder / "cache" / "vocabulary"

    @property
    def moments(self) -> Path:
        """The folder in which second moments of concepts are cached."""
        return self.registry.folder / "cache" / "moments"

    def solve_context(self, base: str, universe: Iterable[str] = ()) -> SolveContext:
        """What a solve on a base reads beside its request: all concepts, the prompts to preserve, the cache.

        With a `universe`, only those concepts that it names, and those of the recipes that it names. Raises NotFound.
        """
        preserved = tuple(each.prompt for each in self.registry.preserved_prompts(base))
        named = checked_texts(universe, "the concepts of a universe")
        concepts = (
            {each.name: each for key in named for each in self._named(key)}.values() if named else self.concepts()
        )
        return SolveContext(tuple(concepts), preserved, self.vocabularies)

    def _named(self, key: str) -> list[Concept]:
        """The concepts of a recipe, or the concept of that name."""
        if self.registry.has_recipe(key):
            names = sorted({record.concept for record, _ in self.registry.patches_on(key)})
            return [self.registry.concept(name) for name in names]
        try:
            return [self.registry.concept(key)]
        except NotFound as error:
            raise NotFound(
                f"no recipe and no concept is called {key!r}; a universe is named by either ({error})"
            ) from None

    def patch(self, key: str) -> Patch:
        """A stored patch by id, unique beginning of an id, or concept; its bytes and digests checked.

        Raises NotFound, and LostPatch where its bytes are gone or damaged.
        """
        from overpaint.patches.patch import read_patch

        record = self.registry.patch(key)
        if record.id not in self._patches:
            try:
                patch = read_patch(self.registry.blob(record))
            except (BlobMissing, BlobCorrupt) as error:
                raise LostPatch(
                    f"{error}; solve it again (`overpaint solve {shlex.quote(record.concept)} --base "
                    f"{shlex.quote(record.base)} --force`) or restore a backup; removing it works without them"
                ) from error
            if patch.id != record.id:
                raise OverpaintError(
                    f"the stored file of patch {record.id[:12]} is that of {patch.id[:12]}; solve it again"
                )
            self._patches[record.id] = patch
        return self._patches[record.id]

    def term(self, patch_id: str, strength: float, base: str) -> Term:
        """A stored patch as a term of a composition on a base. Raises WrongBase for a patch of another base, LostPatch."""
        return self.term_on(patch_id, strength, self.base(base))

    def term_on(self, patch_id: str, strength: float, base: Base) -> Term:
        """`term` on a base that is open already. Raises as `term`."""
        from overpaint.patches.compose import Term

        # A patch is what its id says, so one that was read needs no look at its row: a recipe may have a thousand.
        patch = self._patches.get(patch_id) or self.patch(patch_id)
        patch.check(base)
        return Term(patch.id, patch.delta, strength)

    def terms(self, record: RecipeRecord) -> list[Term]:
        """What `compose` takes for a recipe. Raises as `term`."""
        base = self.base(record.base)
        return [self.term_on(*each, base) for each in record.patches]
