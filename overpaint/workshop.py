"""The small public facade: the one place, beside the command line, that knows registry, solvers and patches together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import date, datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overpaint.concepts import Concept
from overpaint.errors import OverpaintError
from overpaint.recipes import Recipe, me
from overpaint.registry.records import Due, Found, PatchRecord, RecipeRecord, TagRecord
from overpaint.registry.registry import Registry
from overpaint.workbench import Report, Solved, Workbench, silent

__all__ = ["Solved", "Workshop"]

if TYPE_CHECKING:
    from overpaint.evaluating import Evaluated
    from overpaint.evaluating import Request as Evaluation
    from overpaint.evaluation.crosstalk import Crosstalk, Pair
    from overpaint.interchange import Taken
    from overpaint.patches.build import Built
    from overpaint.patches.converting import Form
    from overpaint.patches.formats.exporting import Exported
    from overpaint.patches.live import Overlay
    from overpaint.registry.verify import Verified
    from overpaint.reporting.page import Reported
    from overpaint.solving.separation import Reseparated
    from overpaint.transport.receiving import Received
    from overpaint.transport.sending import Sent


class Workshop(Workbench):
    """A registry with everything that can be done on it. Bases are opened once and kept."""

    @classmethod
    def open(cls, location: str | Path, *, create: bool = True) -> Workshop:
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

    def recipes(self) -> list[RecipeRecord]:
        """All recipes of the registry."""
        return self.registry.recipes()

    def known_recipe(self, name: str) -> Recipe:
        """A recipe that is there, as it is or (NAME@REVISION, NAME@TAG) as it was. Raises NotFound."""
        self.registry.recipe(name)
        return Recipe(self, name)

    def undelete_recipe(self, name: str, *, why: str = "") -> Recipe:
        """Bring back the recipe of that name that was deleted last. Raises NotFound, or AlreadyExists."""
        return Recipe(self, self.registry.undelete_recipe(name, why=why, who=me()).name)

    def due(self, on: date | None = None, *, recipe: str | None = None) -> list[Due]:
        """What lies on recipes (or one) though its day had come, by today (in UTC) or another day."""
        return self.registry.due(on or datetime.now(timezone.utc).date(), recipe=recipe)

    def tag(self, tag: str, *, patches: Iterable[str] = (), recipes: Iterable[str] = ()) -> list[TagRecord]:
        """Tie a tag to patches and recipes: all of them, or none. Raises NotFound, AlreadyExists."""
        return self.registry.tag(tag, patches=patches, recipes=recipes, who=me())

    def untag(self, tag: str, *, patches: Iterable[str] = (), recipes: Iterable[str] = ()) -> None:
        """Untie a tag from patches and recipes: all of them, or none. Raises NotFound."""
        self.registry.untag(tag, patches=patches, recipes=recipes)

    def search(self, text: str = "", **where: Any) -> Found:
        """Patches and recipes that mention every word of a text; see `Registry.search`."""
        return self.registry.search(text, **where)

    def reseparate(self, recipe: str, **how: Any) -> Reseparated:
        """Solve a recipe's closed-form patches again for the registry's universe. See `overpaint.solving.separation`."""
        from overpaint.solving.separation import reseparate

        return reseparate(self, recipe, **how)

    def mixture(self, recipe: str) -> str:
        """One sentence when the closed-form patches of a recipe were solved for different universes, else nothing."""
        from overpaint.solving.separation import mixture

        return mixture(self.registry, recipe)

    def crosstalk(
        self, recipe: str | None = None, *, base: str | None = None, everything: bool = False, device: str = "auto"
    ) -> Crosstalk:
        """How much each patch of a recipe moves the other concepts (see `overpaint.evaluation.crosstalk`).

        Without a recipe, the newest patch of each concept on `base` (or on the only base there is); with `everything`, also
        what moves the registry's concepts that have no patch here. Raises OverpaintError when there is no patch.
        """
        from overpaint.disturbing import crosstalk_on

        return crosstalk_on(self, recipe, base, everything, device)

    def disturbances(self, recipe: str, patch_id: str) -> list[Pair]:
        """The strong cross-talk between one patch of a recipe and the others, both ways, where it has a closed form."""
        from overpaint.disturbing import disturbances

        return disturbances(self, recipe, patch_id)

    def evaluate(
        self,
        name: str,
        request: Evaluation | None = None,
        *,
        report: Report = silent,
    ) -> Evaluated:
        """Run a suite (`quick`, unless the request names another) on a recipe, or on a patch alone, and keep its numbers.

        See `overpaint.evaluating`.
        """
        from overpaint.evaluating import Request, evaluate

        return evaluate(self, name, request or Request(), report=report)

    def report(self, recipe: str, out: str | Path, **options: Any) -> Reported:
        """Write what was measured of a recipe as one HTML page, with JSON, CSV and PNG beside it. See `overpaint.reporting`."""
        from overpaint.reporting.page import report

        return report(self, recipe, Path(out), **options)

    # Upkeep and sharing

    def verify(self, *, report: Report = silent) -> Verified:
        """Read every row, patch and blob again; damaged blobs go to quarantine. See `overpaint.registry.verify`."""
        from overpaint.registry.verify import verify

        return verify(self.registry, report=report)

    def export(
        self, file: str | Path, *, patches: Iterable[str] = (), recipes: Iterable[str] = (), sign: Path | None = None
    ) -> Sent:
        """Write patches and recipes, or everything, to one new file; `sign` is a key file. See `transport.sending`."""
        from overpaint.sharing import export

        return export(self, Path(file), patches=patches, recipes=recipes, sign=sign)

    def push(
        self,
        destination: str | Path,
        *,
        patches: Iterable[str] = (),
        recipes: Iterable[str] = (),
        sign: Path | None = None,
        report: Report = silent,
    ) -> Sent:
        """Send patches and recipes, or everything, to a folder or a URL. See `overpaint.transport.sending`."""
        from overpaint.sharing import push

        return push(self, destination, patches=patches, recipes=recipes, sign=sign, report=report)

    def import_file(self, file: str | Path, **asked: Any) -> Received:
        """Take patches and recipes from a file that `export` wrote, or a bare patch file; see `pull`."""
        from overpaint.sharing import import_file

        return import_file(self, Path(file), **asked)

    def pull(self, source: str | Path, **asked: Any) -> Received:
        """Take patches and recipes from a folder or a URL: everything, or the `patches` and `recipes` that are named.

        `trust` names public key files, or folders of them: only what one of those keys has signed is taken. `name` is
        another name for the one recipe that is taken. See `overpaint.transport.receiving`.
        """
        from overpaint.sharing import pull

        return pull(self, source, **asked)

    # Other tools' files

    def import_patch(self, file: str | Path, *, base: str, concept: str | Concept, **how: Any) -> Taken:
        """Store another tool's erasure (LoRA, differences, edited weights) as a patch; see `overpaint.interchange`."""
        from overpaint.interchange import import_patch

        wanted = concept if isinstance(concept, Concept) else self._concept(concept)
        return import_patch(self, Path(file), base=base, concept=wanted, **how)

    def export_patches(
        self, patches: Iterable[str], out: str | Path, format: str = "kohya", *, strength: float = 1.0, **how: Any
    ) -> Exported:
        """Write patches as one new file that other tools load; see `overpaint.patches.formats.exporting`."""
        from overpaint.interchange import export_patches

        return export_patches(self, patches, Path(out), format, strength, **how)

    def export_recipe(self, recipe: str, out: str | Path, format: str = "kohya", **how: Any) -> Exported:
        """Write what lies on a recipe as one new file that other tools load."""
        from overpaint.interchange import export_recipe

        return export_recipe(self, recipe, Path(out), format, **how)

    # Using

    def pipeline(self, recipe: str = "default", *, device: str = "auto") -> Any:
        """A `StableDiffusionPipeline` with the recipe applied."""
        return self.live(recipe, device=device)[0]

    def live(self, recipe: str, *, device: str = "auto") -> tuple[Any, Overlay]:
        """A pipeline and the overlay that changes what lies on it."""
        from overpaint.bases.device import resolve_device
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
