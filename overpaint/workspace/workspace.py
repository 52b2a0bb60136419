"""The small public facade: the one place, beside the command line, that knows registry, solvers and patches together."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import date, datetime, timezone
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from overpaint.core.concepts import Concept
from overpaint.core.errors import AlreadyExists, OverpaintError
from overpaint.registry.records import BaseRecord, ExpiredEntry, PatchRecord, RecipeRecord, SearchResult, TagRecord
from overpaint.registry.registry import Registry
from overpaint.registry.store import BlobCorrupt, BlobMissing
from overpaint.workspace.live_pipelines import LivePipelines
from overpaint.workspace.recipe import LostPatch, Recipe, current_user

if TYPE_CHECKING:
    from overpaint.bases.base import Base
    from overpaint.evaluation.crosstalk import Crosstalk, Pair
    from overpaint.patches.build import Built
    from overpaint.patches.conversion import Form
    from overpaint.patches.formats.exporting import Exported
    from overpaint.patches.live import Overlay
    from overpaint.patches.patch import Patch
    from overpaint.registry.integrity import Verified
    from overpaint.registry.sharing.ingest import Received
    from overpaint.registry.sharing.sending import Sent
    from overpaint.workspace.compression import Compressed
    from overpaint.workspace.evaluating import Evaluated
    from overpaint.workspace.evaluating import EvaluationRequest as Evaluation
    from overpaint.workspace.exchange import ImportedPatch
    from overpaint.workspace.planning import SolveContext, SolvePlan, SolveRequest, Truncation
    from overpaint.workspace.report import Reported
    from overpaint.workspace.reseparation import Reseparated
    from overpaint.workspace.solving import SolveOutcome


# Bases of a registry: opened, compared with what was added, their digests remembered beside the database.


def add_base(registry: Registry, name: str, source: str | Path, exist_ok: bool) -> tuple[BaseRecord, Base]:
    """See `Workspace.add_base`."""
    from overpaint.bases.base import Base

    there = next((each for each in registry.bases() if each.name == name), None)
    if there is not None and not exist_ok:
        raise AlreadyExists(f"a base called {name!r} is there already; choose another name")
    base = Base.open(source)
    base.recall_digests(_cache_of(registry, base))
    if there is not None and there.fingerprint != base.fingerprint:
        raise AlreadyExists(
            f"another base called {name!r} is there already: fingerprint {there.fingerprint[:12]}, and {source} has "
            f"{base.fingerprint[:12]}; choose another name"
        )
    record = there or registry.add_base(name, Path(base.source), base.layout.name, base.fingerprint)
    base.keep_digests(_cache_of(registry, base))
    return record, base


def open_base(registry: Registry, name: str) -> Base:
    """The base of that name as it was when it was added. Raises NotFound, OverpaintError when its files changed."""
    from overpaint.bases.base import Base

    record = registry.base(name)
    base = Base.open(record.source)
    base.recall_digests(_cache_of(registry, base))
    if base.fingerprint != record.fingerprint:
        raise OverpaintError(
            f"the base {name!r} at {record.source} changed since it was added: fingerprint {base.fingerprint[:12]} "
            f"instead of {record.fingerprint[:12]}; put its files back, or add it under another name"
        )
    base.keep_digests(_cache_of(registry, base))
    return base


def _cache_of(registry: Registry, base: Base) -> Path:
    return registry.folder / "cache" / "digests" / f"{sha256(str(base.path).encode()).hexdigest()[:32]}.json"


# Bases, concepts, and the patches that are solved for them: the part of the facade that needs no recipe.


Report: TypeAlias = Callable[[int, int, str], None]
"""Is told of progress: the step, of how many, and what is being done."""


def silent(step: int, of: int, text: str) -> None:
    """Tells nobody."""


@dataclass(frozen=True)
class Solved:
    """A patch that was solved and stored, what its solver said about it, and the seconds it took."""

    record: PatchRecord
    diagnostics: Mapping[str, Any]
    seconds: float

    @property
    def id(self) -> str:
        """The patch's id: the digest of its manifest."""
        return self.record.id

    @property
    def nbytes(self) -> int:
        """Size of the patch's file, in bytes."""
        return self.record.nbytes


class Workspace:
    """A registry with everything that can be done on it. Bases are opened once and kept."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self._bases: dict[str, Base] = {}
        self._patches: dict[str, Patch] = {}
        self.pipelines = LivePipelines()

    # Bases and concepts

    def add_base(self, name: str, source: str | Path, exist_ok: bool = False) -> BaseRecord:
        """Remember a base: a diffusers folder, a single-file checkpoint, a model on the Hub (`ORG/MODEL[@REVISION]`, kept
        with its commit), or `emoji` for the embedded one.

        Raises AlreadyExists for a name that is taken (with `exist_ok`, only by another base), OverpaintError for a base that
        is missing, broken or unknown.
        """
        record, self._bases[name] = add_base(self.registry, name, source, exist_ok)
        return record

    def bases(self) -> list[BaseRecord]:
        """All bases of the registry."""
        return self.registry.bases()

    def base(self, name: str) -> Base:
        """An opened base. Raises NotFound for an unknown name, OverpaintError when its files are gone or broken."""

        if name not in self._bases:
            self._bases[name] = open_base(self.registry, name)
        return self._bases[name]

    def prepare(
        self,
        base: str,
        *,
        vocabulary: int = 0,
        device: str = "auto",
        report: Report = silent,
    ) -> None:
        """Encode now what every closed-form solve on a base needs once: the vocabulary and the registry's concepts.

        `vocabulary` is how many of its words, as the setting of `separable`; 0 is all.
        """
        from overpaint.bases.loading import resolve_device
        from overpaint.solvers.universe import PreservedPrompts, prepare

        around = self.surroundings(base)
        preserved = PreservedPrompts(around.keep, vocabulary, around.cache)
        prepare(self.base(base), around.universe, resolve_device(device), preserved=preserved, report=report)

    @property
    def vocabularies(self) -> Path:
        """The folder in which second moments of vocabularies are kept."""
        return self.registry.folder / "cache" / "vocabulary"

    def keep(self, base: str, prompts: Iterable[str]) -> int:
        """Preserve prompts in whatever is solved on a base from now on; returns how many are new. Raises NotFound."""
        return self.registry.keep_prompts(base, prompts, who=current_user())

    def add_concept(
        self,
        name: str,
        *,
        kind: str = "object",
        synonyms: Iterable[str] = (),
        anchor: str = "",
        prompts: Iterable[str] = (),
    ) -> Concept:
        """Remember a concept. Raises AlreadyExists for a name that is taken, OverpaintError for one that is not valid."""
        concept = Concept(name, kind, tuple(synonyms), anchor, tuple(prompts))
        self.registry.add_concept(concept)
        return concept

    def concepts(self) -> list[Concept]:
        """All concepts of the registry."""
        return self.registry.concepts()

    # Solving

    def solve(
        self,
        concept: str | Concept,
        *,
        base: str,
        solver: str = "separable",
        settings: Mapping[str, str] | None = None,
        seed: int = 0,
        compress: str | None = None,
        device: str = "auto",
        report: Report = silent,
    ) -> Solved:
        """Compute and store the patch that erases one concept from a base.

        A name the registry does not know becomes an object of that name. Every other concept in the registry is the
        universe: preserved, so that patches compose. `compress` keeps a rank ("4") or a share of energy ("0.99") of every
        tensor's change. Raises OverpaintError before anything is stored.
        """
        from overpaint.bases.loading import resolve_device
        from overpaint.workspace.planning import SolveRequest, provenance
        from overpaint.workspace.solving import make, store

        wanted = concept if isinstance(concept, Concept) else self._concept(concept)
        order = SolveRequest(wanted, solver, settings or {}, seed, _keeps(compress))
        around, method = self.surroundings(base), order.method()
        made = make(order, provenance(order, method, around), self.base(base), around, resolve_device(device), report)
        self.registry.ensure_concept(wanted)
        return Solved(store(self.registry, made, base), made.diagnostics, made.seconds)

    def orders(
        self,
        names: Iterable[str] = (),
        *,
        file: Path | None = None,
        solver: str | None = None,
        settings: Mapping[str, str] | None = None,
        seed: int | None = None,
        compress: str | None = None,
    ) -> list[SolveRequest]:
        """What to solve for concepts by name, and for those of a file (see `overpaint.workspace.concept_file`)."""
        from overpaint.workspace.concept_file import read_concepts
        from overpaint.workspace.planning import Defaults, completed

        plain = Defaults().overridden(solver, settings or {}, seed)
        found = [replace(plain.order(Concept(name)), described=False) for name in names]
        if file is not None:
            found += read_concepts(file, solver=solver, settings=settings, seed=seed)
        return completed(found, self.concepts(), _keeps(compress))

    def plan(
        self, orders: Iterable[SolveRequest], *, base: str, update: bool = False, again: bool = False
    ) -> SolvePlan:
        """What orders come down to: what is solved already, which concepts are new. See `overpaint.workspace.solving`."""
        from overpaint.workspace.planning import plan

        return plan(self.registry, orders, self.surroundings(base), base=base, update=update, again=again)

    def surroundings(self, base: str) -> SolveContext:
        """What every solve on a base knows beside its order."""
        from overpaint.workspace.planning import SolveContext

        kept = tuple(each.prompt for each in self.registry.kept_prompts(base))
        return SolveContext(tuple(self.concepts()), kept, self.vocabularies)

    def carry_out(
        self,
        plan: SolvePlan,
        *,
        device: str = "auto",
        report: Report = silent,
        told: Callable[[SolveOutcome], None] = lambda outcome: None,
    ) -> list[SolveOutcome]:
        """Solve and store what a plan leaves open. See `overpaint.workspace.solving`."""
        from overpaint.bases.loading import resolve_device
        from overpaint.workspace.solving import carry_out

        return carry_out(self.registry, plan, self.base, resolve_device(device), report=report, told=told)

    def compress(self, patch: str, keep: str) -> tuple[PatchRecord, Compressed]:
        """Store a smaller patch beside one that is there; `keep` is a rank or a share of energy. See `solving.compression`.

        Raises NothingSmaller when it would not be smaller.
        """
        from overpaint.workspace.compression import compressed, refuse_if_not_smaller
        from overpaint.workspace.planning import Truncation
        from overpaint.workspace.solving import store_patch

        record, asked = self.registry.patch(patch), Truncation.parse(keep)
        found = compressed(self.base(record.base), self.patch(record.id), asked)
        refuse_if_not_smaller(found, asked)
        return store_patch(self.registry, found.patch, record.base, 0.0), found

    def learn(self, names: Iterable[str]) -> None:
        """Make objects of the names the registry does not know, so that each preserves all the others when solved."""
        known = {concept.name for concept in self.concepts()}
        for name in names:
            if name not in known:
                self.registry.ensure_concept(Concept(name))

    def _concept(self, name: str) -> Concept:
        for known in self.concepts():
            if known.name == name:
                return known
        return Concept(name)

    def patch(self, key: str) -> Patch:
        """A stored patch by id, unique beginning of an id, or concept; its bytes and digests checked."""
        from overpaint.patches.patch import read_patch

        record = self.registry.patch(key)
        if record.id not in self._patches:
            try:
                patch = read_patch(self.registry.blob(record))
            except (BlobMissing, BlobCorrupt) as error:
                raise LostPatch(
                    f"the bytes of patch {record.id[:12]} for {record.concept!r} cannot be read ({error}); solve it again "
                    f"(`overpaint solve {shlex.quote(record.concept)} --base {shlex.quote(record.base)} --again`) or restore "
                    "a backup; removing it works without them"
                ) from error
            if patch.id != record.id:
                raise OverpaintError(
                    f"the stored file of patch {record.id[:12]} is that of {patch.id[:12]}; solve it again"
                )
            self._patches[record.id] = patch
        return self._patches[record.id]

    @classmethod
    def open(cls, location: str | Path, *, create: bool = True) -> Workspace:
        """See `overpaint.open`."""
        return cls(Registry.open(location, create=create))

    # Patches and recipes

    def patches(self, **where: Any) -> list[PatchRecord]:
        """All patches, or those of a `concept`, `base`, `solver` or `tag`; `limit` and `offset` give a page."""
        return self.registry.patches(**where)

    def recipe(self, name: str = "default", *, base: str | None = None) -> Recipe:
        """A recipe, made on `base` (or on the only base there is) when nothing has this name.

        Raises OverpaintError when it must be made and the base is not clear, or lies on another base.
        """
        if base is None:
            known = self.registry.bases()
            if not self.registry.has_recipe(name):
                if len(known) != 1:
                    names = ", ".join(record.name for record in known) or "none; add one first"
                    raise OverpaintError(f"the recipe {name!r} is new, so say on which base it lies (known: {names})")
                base = known[0].name
        if base is not None:
            self.registry.ensure_recipe(name, base)
        return Recipe(self, name)

    def create_recipe(self, name: str, *, base: str | None = None, exist_ok: bool = False) -> Recipe:
        """Make an empty recipe on `base`, which may be left out where there is one.

        Raises AlreadyExists for a name that is taken (with `exist_ok`, only by a recipe on another base), NotFound for an
        unknown base, OverpaintError when the base is not clear.
        """
        wanted = base or self._only_base()
        (self.registry.ensure_recipe if exist_ok else self.registry.create_recipe)(name, wanted)
        return Recipe(self, name)

    def _only_base(self) -> str:
        names = [record.name for record in self.registry.bases()]
        if len(names) != 1:
            raise OverpaintError(
                f"say on which base, as base=NAME (known: {', '.join(names) or 'none; add one first'})"
            )
        return names[0]

    def recipes(self) -> list[RecipeRecord]:
        """All recipes of the registry."""
        return self.registry.recipes()

    def known_recipe(self, name: str) -> Recipe:
        """A recipe that is there, as it is or (NAME@REVISION, NAME@TAG) as it was. Raises NotFound."""
        self.registry.recipe(name)
        return Recipe(self, name)

    def undelete_recipe(self, name: str, *, why: str = "") -> Recipe:
        """Bring back the recipe of that name that was deleted last. Raises NotFound, or AlreadyExists."""
        return Recipe(self, self.registry.undelete_recipe(name, why=why, who=current_user()).name)

    def due(self, on: date | None = None, *, recipe: str | None = None) -> list[ExpiredEntry]:
        """What lies on recipes (or one) though its day had come, by today (in UTC) or another day."""
        return self.registry.due(on or datetime.now(timezone.utc).date(), recipe=recipe)

    def tag(self, tag: str, *, patches: Iterable[str] = (), recipes: Iterable[str] = ()) -> list[TagRecord]:
        """Tie a tag to patches and recipes: all of them, or none. Raises NotFound, AlreadyExists."""
        return self.registry.tag(tag, patches=patches, recipes=recipes, who=current_user())

    def untag(self, tag: str, *, patches: Iterable[str] = (), recipes: Iterable[str] = ()) -> None:
        """Untie a tag from patches and recipes: all of them, or none. Raises NotFound."""
        self.registry.untag(tag, patches=patches, recipes=recipes)

    def search(self, text: str = "", **where: Any) -> SearchResult:
        """Patches and recipes that mention every word of a text; see `Registry.search`."""
        return self.registry.search(text, **where)

    def reseparate(self, recipe: str, **how: Any) -> Reseparated:
        """Solve a recipe's closed-form patches again for the registry's universe. See `overpaint.workspace.reseparation`."""
        from overpaint.workspace.reseparation import reseparate

        return reseparate(self, recipe, **how)

    def mixture(self, recipe: str) -> str:
        """One sentence when the closed-form patches of a recipe were solved for different universes, else nothing."""
        from overpaint.workspace.reseparation import mixture

        return mixture(self.registry, recipe)

    def crosstalk(
        self, recipe: str | None = None, *, base: str | None = None, everything: bool = False, device: str = "auto"
    ) -> Crosstalk:
        """How much each patch of a recipe moves the other concepts (see `overpaint.evaluation.crosstalk`).

        Without a recipe, the newest patch of each concept on `base` (or on the only base there is); with `everything`, also
        what moves the registry's concepts that have no patch here. Raises OverpaintError when there is no patch.
        """
        from overpaint.bases.loading import resolve_device
        from overpaint.evaluation.crosstalk import crosstalk
        from overpaint.workspace.evaluating import moments_cache, patches_for_crosstalk

        base, ids = patches_for_crosstalk(self.registry, recipe, base)
        return crosstalk(
            self.base(base),
            [self.patch(patch_id) for patch_id in ids],
            self.concepts() if everything else (),
            cache=moments_cache(self.registry),
            device=resolve_device(device),
        )

    def disturbances(self, recipe: str, patch_id: str) -> list[Pair]:
        """The strong cross-talk between one patch of a recipe and the others, both ways, where it has a closed form."""
        from overpaint.workspace.evaluating import disturbances, moments_cache

        record = self.registry.recipe(recipe)
        patches = [self.patch(each) for each, _ in record.patches]
        concept = self.patch(patch_id).concept.name
        return disturbances(self.base(record.base), patches, concept, cache=moments_cache(self.registry))

    def evaluate(
        self,
        name: str,
        request: Evaluation | None = None,
        *,
        report: Report = silent,
    ) -> Evaluated:
        """Run a suite (`quick`, unless the request names another) on a recipe, or on a patch alone, and keep its numbers.

        See `overpaint.workspace.evaluating`.
        """
        from overpaint.workspace.evaluating import EvaluationRequest, Subject, evaluate

        subject = Subject.named(self.registry, name)
        patches = [self.patch(record.id) for record, _ in subject.entries]
        asked = request or EvaluationRequest()
        return evaluate(
            self.registry, subject, self.base(subject.base), patches, asked, who=current_user(), progress=report
        )

    def report(self, recipe: str, out: str | Path, *, device: str = "auto", progress: Report = silent) -> Reported:
        """Write what was measured of a recipe as one HTML page, with JSON, CSV and PNG beside it."""
        from overpaint.workspace.evaluating import Subject
        from overpaint.workspace.report import report

        self.registry.recipe(recipe)
        subject = Subject.named(self.registry, recipe)
        patches = [self.patch(record.id) for record, _ in subject.entries]
        base = self.base(subject.base)
        return report(self.registry, subject, base, patches, Path(out), device=device, progress=progress)

    # Upkeep and sharing

    def verify(self, *, report: Report = silent) -> Verified:
        """Read every row, patch and blob again; damaged blobs go to quarantine. See `overpaint.registry.integrity`."""
        from overpaint.registry.integrity import verify

        return verify(self.registry, report=report)

    def export(
        self, file: str | Path, *, patches: Iterable[str] = (), recipes: Iterable[str] = (), sign: Path | None = None
    ) -> Sent:
        """Write patches and recipes, or everything, to one new file; `sign` is a key file. See `transport.sending`."""
        from overpaint.workspace.exchange import export_archive

        return export_archive(self, Path(file), patches=patches, recipes=recipes, sign=sign)

    def push(
        self,
        destination: str | Path,
        *,
        patches: Iterable[str] = (),
        recipes: Iterable[str] = (),
        sign: Path | None = None,
        report: Report = silent,
    ) -> Sent:
        """Send patches and recipes, or everything, to a folder or a URL. See `overpaint.registry.sharing.sending`."""
        from overpaint.workspace.exchange import push

        return push(self, destination, patches=patches, recipes=recipes, sign=sign, report=report)

    def import_file(self, file: str | Path, **asked: Any) -> Received:
        """Take patches and recipes from a file that `export` wrote, or a bare patch file; see `pull`."""
        from overpaint.workspace.exchange import import_file

        return import_file(self, Path(file), **asked)

    def pull(self, source: str | Path, **asked: Any) -> Received:
        """Take patches and recipes from a folder or a URL: everything, or the `patches` and `recipes` that are named.

        `trust` lists public key files, or folders of them: only what one of those keys has signed is taken. None verifies
        no signature, which the result says; an empty list is refused. `name` is
        another name for the one recipe that is taken. See `overpaint.registry.sharing.ingest`.
        """
        from overpaint.workspace.exchange import pull

        return pull(self, source, **asked)

    # Other tools' files

    def import_patch(self, file: str | Path, *, base: str, concept: str | Concept, **how: Any) -> ImportedPatch:
        """Store another tool's erasure (LoRA, differences, edited weights) as a patch; see `overpaint.workspace.exchange`."""
        from overpaint.workspace.exchange import import_patch

        wanted = concept if isinstance(concept, Concept) else self._concept(concept)
        return import_patch(self, Path(file), base=base, concept=wanted, **how)

    def export_patches(
        self, patches: Iterable[str], out: str | Path, format: str = "kohya", *, strength: float = 1.0, **how: Any
    ) -> Exported:
        """Write patches as one new file that other tools load; see `overpaint.patches.formats.exporting`."""
        from overpaint.workspace.exchange import export_patches

        return export_patches(self, patches, Path(out), format, strength, **how)

    def export_recipe(self, recipe: str, out: str | Path, format: str = "kohya", **how: Any) -> Exported:
        """Write what lies on a recipe as one new file that other tools load."""
        from overpaint.workspace.exchange import export_recipe

        return export_recipe(self, recipe, Path(out), format, **how)

    # Using

    def pipeline(self, recipe: str = "default", *, device: str = "auto") -> Any:
        """A diffusers pipeline with a recipe applied, which follows the recipe: see `Recipe.apply`."""
        return self.known_recipe(recipe).pipeline(device=device)

    def live(self, recipe: str, *, device: str = "auto") -> tuple[Any, Overlay]:
        """A pipeline and the overlay that changes what lies on it."""
        from overpaint.bases.loading import resolve_device
        from overpaint.patches.live import Overlay

        wanted = self.known_recipe(recipe)
        pipe: Any = wanted.base.pipeline(device=str(resolve_device(device)))
        overlay = Overlay(pipe, wanted.base)
        overlay.set(wanted.terms())
        return pipe, overlay

    def build(
        self,
        recipe: str,
        out: str | Path,
        *,
        notice: Callable[[str], None] = lambda text: None,
        form: Form | None = None,
    ) -> Built:
        """Bake a recipe into a new checkpoint of its base's form, or of another (see `overpaint.patches.build`).

        Raises AlreadyExists when `out` is there.
        """
        from overpaint.patches.build import build

        wanted = self.known_recipe(recipe)
        about: dict[str, Any] = {"card": wanted.card(), "record": wanted.as_json()}
        return build(wanted.base, wanted.terms(), Path(out), **about, notice=notice, form=form)


def _keeps(compress: str | None) -> tuple[Truncation, ...]:
    from overpaint.workspace.planning import Truncation

    return () if compress is None else (Truncation.parse(compress),)


__all__ = ["Solved", "Workspace"]
