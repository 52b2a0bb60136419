"""What `overpaint.open` returns: a registry with everything that can be done on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from overpaint.core.concepts import Concept
from overpaint.core.errors import OverpaintError
from overpaint.core.names import checked_count, checked_texts, shown, typed_path
from overpaint.core.reporting import Progress, html_table, silent
from overpaint.registry.history import refuse_stale, today
from overpaint.registry.records import ExpiredEntry, HistoryRecord, PatchRecord, RecipeEntry, RecipeRecord
from overpaint.registry.registry import Registry
from overpaint.solvers import PREPARED
from overpaint.workspace.opened import OpenRegistry
from overpaint.workspace.planning import (
    Defaults,
    SolvePlan,
    SolveRequest,
    Truncation,
    completed,
    decoupling_rule,
    plan_solves,
    setting_texts,
    truncations,
)
from overpaint.workspace.recipe import Recipe, current_user

if TYPE_CHECKING:
    from overpaint.evaluation.crosstalk import Crosstalk
    from overpaint.patches.formats.exporting import Exported
    from overpaint.patches.formats.importing import Meaning
    from overpaint.registry.sharing.hub import Beside
    from overpaint.registry.sharing.ingest import Listed, Received
    from overpaint.registry.sharing.sending import Sent
    from overpaint.registry.upkeep import Verified
    from overpaint.workspace.derived_patches import Compressed, DecoupledPatch
    from overpaint.workspace.exchange import ImportedPatch
    from overpaint.workspace.recipe_file import RecipeFileOutcome, RecipePlan
    from overpaint.workspace.solving import Solved, SolveOutcome, SolverInfo


class Workspace(OpenRegistry):
    """A registry with everything that can be done on it; what `overpaint.open` returns."""

    @classmethod
    def open(cls, location: str | Path, *, create: bool = True) -> Workspace:
        """See `overpaint.open`."""
        return cls(Registry.open(location, create=create))

    def __repr__(self) -> str:
        bases = ", ".join(record.name for record in self.bases()) or "none"
        counts = f"{self.registry.count_concepts()} concepts, {self.registry.count_patches()} patches"
        return (
            f"<Workspace {self.registry.folder}: bases {bases}; {counts}, {len(self.registry.recipe_names())} recipes>"
        )

    def _repr_html_(self) -> str:
        rows = [[record.name, record.base, str(len(record.entries)), str(record.revision)] for record in self.recipes()]
        return html_table(repr(self), ["recipe", "base", "patches", "revision"], rows)

    # Bases and concepts

    def prepare(
        self,
        base: str,
        *,
        vocabulary: int = 0,
        device: str = "auto",
        progress: Progress = silent,
        on: str = "",
        solver: str = "separable",
    ) -> None:
        """Encode now what every closed-form solve on a base needs once: the vocabulary and the registry's concepts.

        `vocabulary` is how many of its words, as the setting of `separable`; 0 is all. `solver` is one of `PREPARED`:
        `separable_mlp` reads the vocabulary inside of text encoders, every other one as `separable` does. `on` says where they
        are encoded, as for `solve_many`. Raises OverpaintError where that fails; the next call goes on with what is missing.
        """
        from overpaint.bases.loading import resolve_device
        from overpaint.core.executors import open_executor
        from overpaint.solvers.universe import PreservedPrompts, prepare

        words = checked_count(vocabulary, "how much of the vocabulary is encoded")
        if solver not in PREPARED:
            raise OverpaintError(f"a base is prepared for one of {', '.join(PREPARED)}; got {shown(solver)}")
        context = self.solve_context(base)
        preserved = PreservedPrompts(context.preserve_prompts, words, context.cache)
        with closing(open_executor(on)) as executor:
            prepare(
                self.base(base),
                context.universe,
                resolve_device(device),
                preserved=preserved,
                report=progress,
                executor=executor if on else None,
                is_inside=solver == "separable_mlp",
            )

    def preserve(self, base: str, prompts: Iterable[str]) -> int:
        """Preserve prompts in whatever is solved on a base from now on; returns how many are new. Raises NotFound."""
        return self.registry.preserve_prompts(base, prompts, who=current_user())

    def add_concept(
        self,
        name: str,
        *,
        kind: str = "object",
        synonyms: Iterable[str] = (),
        anchor: str = "",
        prompts: Iterable[str] = (),
        exist_ok: bool = False,
    ) -> Concept:
        """Remember a concept.

        Raises AlreadyExists for a name that is taken (with `exist_ok`, only by another description), OverpaintError for a
        concept that is not valid.
        """
        concept = Concept(
            name,
            kind,
            checked_texts(synonyms, "the synonyms of a concept"),
            anchor,
            checked_texts(prompts, "the prompts of a concept"),
        )
        self.registry.add_concept(concept, exist_ok=exist_ok)
        return concept

    def edit_concept(
        self,
        name: str,
        *,
        kind: str | None = None,
        synonyms: Iterable[str] | None = None,
        anchor: str | None = None,
        prompts: Iterable[str] | None = None,
    ) -> Concept:
        """Change a concept's description; what is None stays, and so do patches that are stored.

        Raises NotFound for an unknown name, OverpaintError for a concept that is not valid.
        """
        known = self.registry.concept(name)
        concept = Concept(
            known.name,
            known.kind if kind is None else kind,
            known.synonyms if synonyms is None else checked_texts(synonyms, "the synonyms of a concept"),
            known.anchor if anchor is None else anchor,
            known.prompts if prompts is None else checked_texts(prompts, "the prompts of a concept"),
        )
        self.registry.learn_concepts([concept], update=True)
        return concept

    def remove_concept(self, name: str) -> None:
        """Forget a concept. Raises NotFound, OverpaintError while there are patches for it."""
        self.registry.remove_concept(name)

    # Solving

    def solvers(self) -> list[SolverInfo]:
        """All solvers there are, those of other installed packages too: name, what it does, its settings and presets."""
        from overpaint.workspace.solving import solver_infos

        return solver_infos()

    def solve(
        self,
        concept: str | Concept,
        *,
        base: str | None = None,
        solver: str = "separable",
        seed: int = 0,
        device: str = "auto",
        compress: str | None = None,
        decoupled: str = "",
        universe: Iterable[str] = (),
        progress: Progress = silent,
        **settings: object,
    ) -> Solved:
        """Compute and store the patch that erases one concept from a base, which may be left out where there is one.

        A name the registry does not know becomes an object of that name. Every other concept in the registry is preserved, so
        that patches compose; `universe` names the concepts to preserve instead, and recipes for all of theirs. `decoupled`
        ("ridge" or "exact") takes out of the change what it does to any of them, whatever the solver (see `decouple`).
        `compress` keeps a rank ("4") or a share of energy ("0.99") of every tensor's change. Other keywords are settings of
        the solver (see `solvers`), or `settings=` a mapping of them.

        Raises NotFound for an unknown base or solver, BadSetting for a setting that the solver has not (the nearest name is
        in the message) or cannot take, OverpaintError for what the solver refuses; nothing is stored then.
        """
        from overpaint.bases.loading import resolve_device
        from overpaint.solvers.trained.denoiser import releasing
        from overpaint.workspace.solving import Solved, solve_request, store_patch

        base_name = self.base_name(base)
        request = SolveRequest(
            self.known_or_new(concept),
            solver,
            setting_texts(settings),
            seed,
            truncations(compress),
            decoupled=decoupling_rule(decoupled),
        )
        request.configured()  # so that a setting that cannot be is refused before a base is opened
        context = self.solve_context(base_name, universe)
        opened = self.base(base_name)
        with releasing(opened):
            solved = solve_request(request, opened, context, resolve_device(device), progress)
        self.registry.add_concept(request.concept, exist_ok=True)
        record = store_patch(self.registry, solved.patch, base_name, solved.seconds)
        return Solved(record, solved.diagnostics, solved.seconds)

    def solve_many(
        self,
        concepts: Iterable[str] = (),
        *,
        file: str | Path | None = None,
        base: str | None = None,
        solver: str | None = None,
        seed: int | None = None,
        device: str = "auto",
        compress: str | None = None,
        decoupled: str = "",
        universe: Iterable[str] = (),
        update: bool = False,
        force: bool = False,
        on: str = "",
        progress: Progress = silent,
        on_result: Callable[[SolveOutcome], None] = lambda outcome: None,
        **settings: object,
    ) -> list[SolveOutcome]:
        """Solve concepts by name, and those of a file; what was solved before with equal inputs is not solved again.

        Each patch is stored before the next is begun, so a run that was interrupted goes on where it was. `update` takes
        the file's description of a known concept, `force` solves everything again. `on` says where the solvers run: `ray` for
        a Ray cluster on this machine, `ray://HOST:PORT` for another; empty is this process. Raises as `solve` before anything is
        solved; a solver that gives up on one concept is an outcome with an error.
        """
        plan = self.plan(
            concepts,
            file=file,
            base=base,
            solver=solver,
            seed=seed,
            compress=compress,
            decoupled=decoupled,
            universe=universe,
            update=update,
            force=force,
            settings=setting_texts(settings),
        )
        return self.carry_out(plan, device=device, on=on, progress=progress, on_result=on_result)

    def plan(
        self,
        concepts: Iterable[str] = (),
        *,
        file: str | Path | None = None,
        base: str | None = None,
        solver: str | None = None,
        seed: int | None = None,
        compress: str | None = None,
        decoupled: str = "",
        universe: Iterable[str] = (),
        update: bool = False,
        force: bool = False,
        **settings: object,
    ) -> SolvePlan:
        """What `solve_many` would do: which concepts are new, and what is solved already. Nothing is stored or solved."""
        from overpaint.workspace.concept_file import read_concepts

        given, base_name = setting_texts(settings), self.base_name(base)
        defaults = Defaults().overridden(solver, given, seed)
        names = checked_texts(concepts, "the concepts to solve")
        requests = [replace(defaults.request(Concept(name)), is_bare_name=True) for name in names]
        if file is not None:
            requests += read_concepts(typed_path(file), solver=solver, settings=given, seed=seed)
        known = self.concepts()
        requests = completed(requests, known, truncations(compress), decoupling_rule(decoupled))
        context = self.solve_context(base_name, universe)
        return plan_solves(
            self.registry, requests, context, base=base_name, update=update, force=force, known_concepts=known
        )

    def carry_out(
        self,
        plan: SolvePlan,
        *,
        device: str = "auto",
        on: str = "",
        progress: Progress = silent,
        on_result: Callable[[SolveOutcome], None] = lambda outcome: None,
    ) -> list[SolveOutcome]:
        """Solve and store what a plan leaves open; see `solve_many`."""
        from overpaint.bases.loading import resolve_device
        from overpaint.core.executors import open_executor
        from overpaint.workspace.solving import carry_out

        with closing(open_executor(on)) as executor:
            return carry_out(
                self.registry,
                plan,
                self.base,
                resolve_device(device),
                executor=executor,
                report=progress,
                on_result=on_result,
            )

    def compress(self, patch: str, keep: str) -> tuple[PatchRecord, Compressed]:
        """Store a smaller patch beside one that is there; `keep` is a rank or a share of energy. See `workspace.derived_patches`.

        Raises NothingSmaller when it would not be smaller.
        """
        from overpaint.workspace.derived_patches import compress_patch, refuse_if_not_smaller
        from overpaint.workspace.solving import store_patch

        record, asked = self.registry.patch(patch), Truncation.parse(keep)
        smaller = compress_patch(self.base(record.base), self.patch(record.id), asked)
        refuse_if_not_smaller(smaller, asked)
        return store_patch(self.registry, smaller.patch, record.base, 0.0), smaller

    def decouple(
        self,
        patch: str,
        rule: str = "ridge",
        *,
        universe: Iterable[str] = (),
        device: str = "auto",
        progress: Progress = silent,
    ) -> tuple[PatchRecord, DecoupledPatch]:
        """Store, beside a patch that is there, what it does to its own concept and to no other concept of the registry, or of
        the `universe`: names of concepts and recipes.

        `rule` "ridge" holds the other concepts, the vocabulary and the preserved prompts by least squares, as the solver
        `separable` does, so that decoupled patches can be summed; "exact" also leaves the bare names of the others exactly
        where they are, as far as the text encoder has room. Raises Unsolvable where nothing acts through the text, or no room
        is left.
        """
        from overpaint.bases.loading import resolve_device
        from overpaint.workspace.derived_patches import decouple_patch
        from overpaint.workspace.solving import store_patch

        record, rule = self.registry.patch(patch), decoupling_rule(rule)
        where, context = resolve_device(device), self.solve_context(record.base, universe)
        found = decouple_patch(self.base(record.base), self.patch(record.id), rule, context, where, progress)
        return store_patch(self.registry, found.patch, record.base, found.diagnostics["seconds"]), found

    # Patches and recipes

    def patches(
        self,
        *,
        concept: str | None = None,
        base: str | None = None,
        solver: str | None = None,
        tag: str | None = None,
        limit: int | None = None,
        offset: int = 0,
    ) -> list[PatchRecord]:
        """All patches, oldest first, or those of a concept, base, solver or tag; `limit` and `offset` give a page.

        Raises NotFound for an unknown concept or base.
        """
        return self.registry.patches(concept=concept, base=base, solver=solver, tag=tag, limit=limit, offset=offset)

    def remove_patch(self, key: str, *, dry_run: bool = False) -> PatchRecord:
        """Forget a patch (id, beginning of one, or concept); its bytes go when garbage is collected.

        Raises NotFound, OverpaintError while a recipe's history needs it; with `dry_run` that is all it does.
        """
        record = self.registry.remove_patch(key, dry_run=dry_run)
        if not dry_run:
            self._patches.pop(record.id, None)
        return record

    def recipe(self, name: str = "default") -> Recipe:
        """A recipe that is there, as it is or (NAME@REVISION, NAME@TAG) as it was. Raises NotFound with the nearest name."""
        self.registry.recipe(name)
        return Recipe(self, name)

    def create_recipe(self, name: str, *, base: str | None = None, exist_ok: bool = False) -> Recipe:
        """Make an empty recipe on `base`, which may be left out where there is one.

        Raises AlreadyExists for a name that is taken (with `exist_ok`, only by a recipe on another base), NotFound for an
        unknown base, OverpaintError when the base is not clear.
        """
        self.registry.create_recipe(name, self.base_name(base), exist_ok=exist_ok)
        return Recipe(self, name)

    def plan_recipe(self, file: str | Path, *, update: bool = False, compose: bool = False) -> RecipePlan:
        """What makes a recipe as a file says (see `overpaint.workspace.recipe_file`); nothing is stored or solved.

        `update` takes the file's description of a known concept. With `compose`, the weights are composed if no patch has to
        be solved first: it raises what `apply_recipe` would. Raises NotFound for an unknown file, base or patch,
        BadConceptFile for a file with mistakes, AlreadyExists for a recipe that is on another base, ConceptDiffers.
        """
        from overpaint.workspace.recipe_file import plan_recipe, read_recipe, wanted_entries

        plan = plan_recipe(self, read_recipe(typed_path(file)), update=update)
        if compose and not plan.is_done and all(each.record is not None for each in plan.entries):
            self._compose(plan.base, wanted_entries(plan, ()))
        return plan

    def _compose(self, base: str, entries: Iterable[RecipeEntry]) -> None:
        from overpaint.patches.compose import compose

        compose(self.base(base), [self.term(each.patch, each.strength, base) for each in entries], self.progress)

    def apply_recipe(
        self,
        plan: RecipePlan | str | Path,
        *,
        why: str = "",
        who: str = "",
        device: str = "auto",
        progress: Progress = silent,
        on_result: Callable[[SolveOutcome], None] = lambda outcome: None,
    ) -> RecipeFileOutcome:
        """Make a recipe as a file (or the plan of one) says: solve what is missing, then change it in one revision.

        Applying a file again changes nothing. Raises as `plan_recipe`, StaleRevision when somebody changed the recipe after
        the plan was made, and OverpaintError when something cannot be solved; the recipe is then as it was.
        """
        from overpaint.workspace.recipe_file import RecipeFileOutcome, RecipePlan, wanted_entries

        todo = plan if isinstance(plan, RecipePlan) else self.plan_recipe(plan)
        reason = todo.reason(why)
        if not todo.is_new:
            refuse_stale(self.registry.recipe(todo.recipe), todo.seen)  # before hours of solving
        outcomes = self.carry_out(todo.solve, device=device, progress=progress, on_result=on_result)
        entries = wanted_entries(todo, outcomes)
        if todo.is_new:
            self._compose(todo.base, entries)  # so that what cannot be applied leaves no empty recipe
            self.create_recipe(todo.recipe, base=todo.base, exist_ok=True)
        recipe = self.recipe(todo.recipe)
        lines = recipe.hold(entries, revision=todo.seen or todo.revision, why=reason, who=who)
        solved = [each.record for each in outcomes if each.record is not None and not each.before]
        return RecipeFileOutcome(lines, solved)

    def recipes(self, *, limit: int | None = None, offset: int = 0) -> list[RecipeRecord]:
        """All recipes of the registry, in the order they were made; `limit` and `offset` give a page."""
        return self.registry.recipes(limit=limit, offset=offset)

    def undelete_recipe(self, name: str, *, why: str = "") -> Recipe:
        """Bring back the recipe of that name that was deleted last. Raises NotFound, or AlreadyExists."""
        return Recipe(self, self.registry.undelete_recipe(name, why=why, who=current_user()).name)

    def due(self, on: date | None = None, *, recipe: str | None = None) -> list[ExpiredEntry]:
        """The patches of recipes (or of one) that have expired, as of today (in UTC) or another day."""
        return self.registry.due(on or today(), recipe=recipe)

    def remove_expired(
        self, on: date | None = None, *, recipe: str | None = None, why: str = "", who: str = ""
    ) -> list[HistoryRecord]:
        """Remove what has expired from recipes (or one), each in one revision; returns the lines of history.

        Raises NotFound for an unknown recipe, and LostPatch or CannotFollow from the first recipe that cannot be changed.
        """
        names = dict.fromkeys(each.recipe for each in self.due(on, recipe=recipe))
        return [line for name in names for line in self.recipe(name).remove_expired(on, why=why, who=who)]

    def crosstalk(
        self, recipe: str | None = None, *, base: str | None = None, everything: bool = False, device: str = "auto"
    ) -> Crosstalk:
        """How much each patch of a recipe moves the other concepts (see `overpaint.evaluation.crosstalk`).

        Without a recipe, the newest patch of each concept on `base` (or on the only base there is); with `everything`, also
        what moves the registry's concepts that have no patch here. Raises OverpaintError when there is no patch.
        """
        from overpaint.bases.loading import resolve_device
        from overpaint.evaluation.crosstalk import crosstalk

        if recipe is not None:
            record = self.registry.recipe(recipe)
            base, ids = record.base, [patch_id for patch_id, _ in record.patches]
        else:
            base = self.base_name(base)
            ids = list({each.concept: each.id for each in self.patches(base=base)}.values())
        if not ids:
            place = f"the recipe {recipe!r}" if recipe is not None else f"the base {base!r}"
            raise OverpaintError(f"there is no patch on {place}; solve one and add it first")
        return crosstalk(
            self.base(base),
            [self.patch(patch_id) for patch_id in ids],
            self.concepts() if everything else (),
            cache=self.moments,
            device=resolve_device(device),
        )

    # Upkeep and sharing

    def verify(self, *, progress: Progress = silent, resume: bool = False) -> Verified:
        """Read every row, patch and blob again; damaged blobs go to quarantine. See `overpaint.registry.upkeep`.

        With `resume`, what was read by a call that was stopped is not read again.
        """
        from overpaint.registry.upkeep import verify

        return verify(self.registry, resume=resume, progress=progress)

    def export(
        self, file: str | Path, *, patches: Iterable[str] = (), recipes: Iterable[str] = (), sign: Path | None = None
    ) -> Sent:
        """Write patches and recipes, or everything, to one new file; `sign` is a key file.

        A recipe brings every patch of its history. Raises AlreadyExists when the file is there, NotFound for unknown names.
        """
        from overpaint.registry.sharing.sending import export
        from overpaint.registry.sharing.signing import load_signer

        signer = None if sign is None else load_signer(typed_path(sign))
        return export(
            self.registry,
            typed_path(file),
            patches=patches,
            recipes=recipes,
            signer=signer,
            vocabularies=self.vocabularies,
        )

    def push(
        self,
        destination: str | Path,
        *,
        patches: Iterable[str] = (),
        recipes: Iterable[str] = (),
        sign: Path | None = None,
        check: bool = False,
        accept_older: bool = False,
        progress: Progress = silent,
        overwrite: bool = False,
        license: str = "",
        warn: Callable[[str], None] = lambda text: None,
    ) -> Sent:
        """Send patches and recipes, or everything, to a folder, a URL, an OCI registry or the Hub; `sign` is a key file.

        What is there already and damaged is replaced; `check` looks for damage also in large blobs behind a URL, which
        reads them all. `overwrite` moves a tag of an OCI registry away from what is no list of patches. To the Hub
        go also a card, with `license` in it, and LoRA files where the patches can be exported so; `warn` says where not. Raises
        NotFound for unknown names, and HistoriesDiverged when a recipe has another history there.
        """
        from overpaint.registry.sharing.hub import is_hub
        from overpaint.registry.sharing.selection import Selection
        from overpaint.registry.sharing.sending import push
        from overpaint.registry.sharing.signing import load_signer

        asked = Selection.by(patches, recipes)
        beside: Beside = lambda entries: {}  # noqa: E731
        if is_hub(destination):
            from overpaint.workspace.exchange import hub_files

            beside = hub_files(self, str(destination), asked, license=license, progress=progress, warn=warn)
        return push(
            self.registry,
            destination,
            patches=asked.patches,
            recipes=asked.recipes,
            signer=None if sign is None else load_signer(typed_path(sign)),
            vocabularies=self.vocabularies,
            check=check,
            overwrite=overwrite,
            accept_older=accept_older,
            beside=beside,
            progress=progress,
        )

    def pull(
        self,
        source: str | Path,
        *,
        patches: Iterable[str] = (),
        recipes: Iterable[str] = (),
        name: str | None = None,
        trust: Iterable[str | Path] | None = None,
        accept_older: bool = False,
        progress: Progress = silent,
        warn: Callable[[str], None] = lambda text: None,
    ) -> Received:
        """Take patches and recipes from a folder or a URL: everything, or those that are named.

        `trust` lists public key files, or folders of them: only what one of those keys has signed is taken. None verifies
        no signature, which the result says; an empty list is refused. A place that shows an older signed list of such a key
        than before is refused unless `accept_older`. `name` is another name for the one recipe that is taken. Raises
        NotFound for what is not there, Untrusted, MissingBase, HistoriesDiverged when a recipe has another history here,
        OverpaintError for what contradicts itself or its digest.
        """
        from overpaint.registry.sharing.ingest import pull
        from overpaint.workspace.exchange import pull_request

        request = pull_request(
            self.vocabularies,
            patches=patches,
            recipes=recipes,
            name=name,
            trust=trust,
            accept_older=accept_older,
            progress=progress,
            warn=warn,
        )
        return pull(self.registry, source, request)

    def browse(
        self,
        source: str | Path,
        *,
        patches: Iterable[str] = (),
        recipes: Iterable[str] = (),
        name: str | None = None,
        trust: Iterable[str | Path] | None = None,
        accept_older: bool = False,
        base: str | None = None,
        referring: bool = False,
        strict: bool = False,
        warn: Callable[[str], None] = lambda text: None,
    ) -> list[Listed]:
        """What a folder, URL, OCI registry or archive has, and what pulling it would change here; nothing is taken.

        `base` leaves out what is for another base. `referring` also finds, in an OCI registry, the patches that other tags
        list for the bases here. `strict` raises all that `pull` would raise before it takes anything; otherwise only what
        contradicts itself or is not signed as `trust` asks is refused.
        """
        from overpaint.registry.sharing.ingest import PullRequest, browse
        from overpaint.registry.sharing.signing import load_keyring

        trusted = None if trust is None else load_keyring(trust)
        request = PullRequest(patches, recipes, trusted, name, accept_older, warn=warn)
        return browse(self.registry, source, request, base=base, referring=referring, strict=strict)

    def import_file(
        self,
        file: str | Path,
        *,
        patches: Iterable[str] = (),
        recipes: Iterable[str] = (),
        name: str | None = None,
        trust: Iterable[str | Path] | None = None,
        progress: Progress = silent,
        warn: Callable[[str], None] = lambda text: None,
    ) -> Received:
        """Take patches and recipes from a file that `export` wrote, or a bare patch file; see `pull`."""
        from overpaint.registry.sharing.ingest import import_file
        from overpaint.workspace.exchange import pull_request

        request = pull_request(
            self.vocabularies, patches=patches, recipes=recipes, name=name, trust=trust, progress=progress, warn=warn
        )
        return import_file(self.registry, typed_path(file), request)

    # Other tools' files

    def import_patch(
        self,
        file: str | Path,
        *,
        base: str | None = None,
        concept: str | Concept,
        meaning: Meaning | None = None,
        allow_unmatched: bool = False,
        keep_rounding: bool = False,
        tolerance: float = 0.0,
        progress: Progress = silent,
    ) -> ImportedPatch:
        """Store another tool's erasure (LoRA, differences, edited weights) as a patch.

        See `overpaint.patches.formats.importing` for what the options mean and what is raised; nothing is stored then.
        """
        from overpaint.patches.formats.importing import Options
        from overpaint.workspace.exchange import import_patch

        options = Options(meaning, allow_unmatched, keep_rounding, tolerance)
        wanted = self.known_or_new(concept)
        return import_patch(
            self, typed_path(file), base=self.base_name(base), concept=wanted, options=options, progress=progress
        )

    def export_patches(
        self,
        patches: Iterable[str],
        out: str | Path,
        format: str | None = None,
        *,
        for_: str | None = None,
        strength: float = 1.0,
        dtype: str = "float32",
        truncate: int | None = None,
        progress: Progress = silent,
    ) -> Exported:
        """Write patches (by id, beginning of an id, or concept) of one base, all at one strength, as one new file.

        `for_` names the tool that is to load it: a1111, comfyui, diffusers or kohya. Without it and without a format, the
        format is kohya; see `overpaint.patches.formats.exporting`.
        """
        from overpaint.workspace.exchange import export_patches

        named = checked_texts(patches, "the patches to export")
        records = list({record.id: record for record in map(self.registry.patch, named)}.values())
        if len(bases := sorted({record.base for record in records})) != 1:
            raise OverpaintError(f"one file is for one base; these patches are for {', '.join(bases) or 'none'}")
        out, listed = typed_path(out), [(record, strength) for record in records]
        return export_patches(
            self, bases[0], listed, out, format, out.stem, for_=for_, dtype=dtype, truncate=truncate, progress=progress
        )
